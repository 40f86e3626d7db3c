"""What a reconstruction misses, kept so that adding it back gives the target to the bit.

In one floating-point number y_hat + (y - y_hat) need not be y: the difference is rounded, and so is the sum. Here
the difference is a sum of two float64, high + low, that equals y - y_hat exactly (Knuth's TwoSum), and it is added
back in the same way:

    total, rest = TwoSum(y_hat, high);   y = total + (rest + low), rounded to the type of y

The exact value of that sum is y. Either `rest` is zero and `total + low` is y before any rounding, or y is so much
larger than `rest + low` that the one rounding of it cannot reach half a unit in the last place of y. So the result
is y for all finite float32 and float64 below overflow; only a zero loses its sign. If y_hat comes out otherwise,
because a feature was edited or a kernel rounded elsewhere, the change is added with one rounding.

Source:
    Knuth, The Art of Computer Programming, volume 2, 4.2.2, theorem B.
"""

# Axes: layer, batch, pos, d_model

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Float64, Shaped


@dataclass(frozen=True)
class ErrorTerm:
    """y - y_hat exactly, as high + low."""

    high: Float64[Tensor, "*shape"]
    low: Float64[Tensor, "*shape"] | None
    """None if all zero, as it is unless one of y and y_hat is a 2^29th of the other or less."""

    @classmethod
    def between(cls, y: Shaped[Tensor, "*shape"], y_hat: Shaped[Tensor, "*shape"]) -> ErrorTerm:
        """What y_hat misses of y."""
        high, low = two_sum(y.double(), -y_hat.double())
        return cls(high, low if bool(low.any()) else None)

    def added_to(self, y_hat: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """y, in the type of y_hat."""
        total, rest = two_sum(y_hat.double(), self.high)
        return (total + (rest if self.low is None else rest + self.low)).to(y_hat.dtype)


@dataclass(frozen=True)
class ErrorTerms:
    """What the reconstructions miss in one pass of the model, by layer; each [batch pos d_model]."""

    terms: list[ErrorTerm]
    y_hat: list[Tensor]
    """The reconstructions of that pass."""

    @property
    def values(self) -> Float[Tensor, "layer batch pos d_model"]:
        """The error terms, each rounded to one float64."""
        return torch.stack([term.high for term in self.terms])


def two_sum(
    a: Float64[Tensor, "*shape"], b: Float64[Tensor, "*shape"]
) -> tuple[Float64[Tensor, "*shape"], Float64[Tensor, "*shape"]]:
    """(s, r) with s = a + b rounded and s + r = a + b exactly.

    >>> s, r = two_sum(torch.tensor([1.0]).double(), torch.tensor([2.0**-60]).double())
    >>> float(s), float(r) == 2.0**-60
    (1.0, True)
    """
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
