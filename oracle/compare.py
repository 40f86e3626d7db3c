"""Differences between tensors, in value and in units in the last place (ulp), worst element first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Int64

_INTEGER_TYPE = {torch.float64: torch.int64, torch.float32: torch.int32}


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ."""

    name: str
    n_different: int
    """Elements whose bits differ, +0 and -0 counted as equal."""
    max_abs: float
    """Largest absolute difference."""
    max_ulp: int
    """Largest number of representable values from one to the other."""
    worst: tuple[int, ...]
    """Index of the element with the largest absolute difference."""
    values: tuple[float, float]
    """The two values there."""

    def __str__(self) -> str:
        if self.n_different == 0:
            return f"{self.name}: identical"
        at = ", ".join(map(str, self.worst))
        return (
            f"{self.name}: {self.n_different} elements differ, by up to {self.max_abs:.3e} "
            f"({self.max_ulp} ulp at most); worst at [{at}]: {self.values[0]!r} against {self.values[1]!r}"
        )


def ulp_distance(a: Tensor, b: Tensor) -> Int64[Tensor, "*shape"]:
    """Number of representable values between the elements of a and b, in their common type.

    Both zeros are one value. Infinities are one step beyond the largest finite value. A float64 distance
    beyond the largest int64 is given as that.

    Raises:
        DataError: If the types differ, are neither float32 nor float64, or a value is not a number.
    """
    if a.dtype != b.dtype or a.dtype not in _INTEGER_TYPE:
        raise DataError(
            f"ulp_distance compares two float32 or two float64 tensors, got {a.dtype} and {b.dtype}"
        )
    if a.shape != b.shape:
        raise DataError(f"ulp_distance compares equal shapes, got {list(a.shape)} and {list(b.shape)}")
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        raise DataError("ulp_distance cannot place NaN; check both tensors with isnan() first")
    place_a, place_b = _place(a), _place(b)
    largest = torch.iinfo(torch.int64).max
    beyond = (place_a.sign() * place_b.sign() < 0) & (place_a.abs() > largest - place_b.abs())
    return torch.where(beyond, largest, (place_a - place_b).abs())


def _place(x: Tensor) -> Tensor:
    """Position of each value among all of its type, zero at zero."""
    bits = x.contiguous().view(_INTEGER_TYPE[x.dtype]).to(torch.int64)
    sign = 1 << (31 if x.dtype == torch.float32 else 63)
    magnitude = bits & (sign - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Difference]:
    """Differences by name, the largest in value first; names must be the same on both sides.

    Raises:
        DataError: If one side lacks a name, or shapes or types differ.
    """
    missing = sorted(set(a) ^ set(b))
    if missing:
        side = "second" if missing[0] in a else "first"
        raise DataError(f"{missing[0]!r} is missing on the {side} side; compare the same hook points")
    found = []
    for name in a:
        ulps = ulp_distance(a[name], b[name])
        gaps = (a[name].double() - b[name].double()).abs().nan_to_num(nan=0.0)
        if gaps.numel() == 0:
            found.append(Difference(name, 0, 0.0, 0, (), (0.0, 0.0)))
            continue
        worst = tuple(int(i) for i in torch.unravel_index(gaps.argmax(), gaps.shape))
        values = (float(a[name][worst]), float(b[name][worst]))
        n_different = int((ulps > 0).sum())
        found.append(Difference(name, n_different, float(gaps.max()), int(ulps.max()), worst, values))
    return sorted(found, key=lambda difference: -difference.max_abs)
