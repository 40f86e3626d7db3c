"""The draw: which token a position takes, given its logits.

In this order:
1. tokens that may not be drawn, the mask and the suppressed ones, are taken out;
2. the logits are divided by the temperature (0 takes the first of the most probable tokens);
3. top-k keeps the tokens that are at least as probable as the k-th (ties stay);
4. top-p keeps the smallest set of the most probable tokens that holds at least p of what is left (as one published
   sampler has it, of the probabilities before step 2, with `top_p_first`);
5. one token is drawn by the inverse CDF from one 64-bit word.

A `DrawArithmetic` says what step 2 and step 5 compute. `Float64Draws` is the ordinary one; integer counts,
which are the same on every machine, take its place without any other change.
"""

# Axes: row (one position of one sequence), vocab

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.decoding.checks import check_whole
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import ConfigError
from mdlm_interp.shapes import Float, Float64, Int64, Shaped

Words = NDArray[np.uint64]
"""Random 64-bit words: one for each row, or [batch pos]."""

PIECE_ELEMENTS = 1 << 24
"""Elements of a table that are looked at together: what bounds the memory of a long vocabulary."""


@runtime_checkable
class DrawArithmetic(Protocol):
    """What probabilities are while sampling. Weights are float64 or int64, and need not add up to one."""

    def weights(self, logits: Float[Tensor, "row vocab"], temperature: float) -> Shaped[Tensor, "row vocab"]:
        """Weights in proportion to exp(logits / temperature)."""

    def pick(self, weights: Shaped[Tensor, "row vocab"], words: Words) -> Int64[Tensor, " row"]:
        """The first column whose cumulative weight exceeds its word's share of the total."""

    def entropy(self, weights: Shaped[Tensor, "row vocab"]) -> Float64[Tensor, " row"]:
        """Entropy of each row, in nats."""

    def sigma(self, n_masked: Int64[Tensor, " batch"], length: int) -> Float[Tensor, " batch"]:
        """Total noise at which that many of `length` tokens are masked on average."""


class Float64Draws:
    """Softmax, sums and inverse CDF in float64. (float32 Gumbel noise, as first published, lowers the temperature.)

    Source:
        Zheng et al. 2024, arXiv:2409.02908, on float32 noise.
    """

    def weights(self, logits: Float[Tensor, "row vocab"], temperature: float) -> Float64[Tensor, "row vocab"]:
        """See `DrawArithmetic.weights`."""
        wide = logits.double()
        if temperature != 1.0:
            # Less the largest first: where a small temperature makes a quotient overflow, it is then exp(-inf) = 0.
            wide = (wide - wide.amax(-1, keepdim=True)) / temperature
        return wide.softmax(-1)

    def pick(self, weights: Shaped[Tensor, "row vocab"], words: Words) -> Int64[Tensor, " row"]:
        """See `DrawArithmetic.pick`; of each word the upper 53 bits count."""
        return inverse_cdf(weights, torch.from_numpy(as_uniforms(words)).to(weights.device))

    def entropy(self, weights: Shaped[Tensor, "row vocab"]) -> Float64[Tensor, " row"]:
        """See `DrawArithmetic.entropy`."""
        return -torch.xlogy(weights, weights).sum(-1)

    def sigma(self, n_masked: Int64[Tensor, " batch"], length: int) -> Float[Tensor, " batch"]:
        """See `DrawArithmetic.sigma`."""
        return LogLinearSchedule().sigma(n_masked.double() / length).float()


def as_uniforms(words: Words) -> NDArray[np.float64]:
    """Multiples of 2**-53 in [0, 1) from the words' upper bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def inverse_cdf(
    weights: Float64[Tensor, "*rows vocab"], uniform: Float64[Tensor, "*rows"]
) -> Int64[Tensor, "*rows"]:
    """The first token of each row whose cumulative weight exceeds the uniform's share of the total."""
    cumulative = weights.cumsum(-1)
    # Scaling by the last sum keeps a uniform near 1 from falling past the end; "right" never picks a zero.
    target = uniform[..., None] * cumulative[..., -1:]
    found = torch.searchsorted(cumulative, target, right=True)[..., 0]
    return found.clamp(max=weights.shape[-1] - 1)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a token is drawn from a position's probabilities; the module says in which order."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Keep tokens at least as probable as the k-th; all if none."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens with at least this mass; all if none."""
    top_p_first: bool = False
    """Choose top-p's set by the probabilities before temperature and top-k."""
    suppress: tuple[int, ...] = ()
    """Token ids that are never drawn; the mask never is."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None:
            check_whole("top_k", self.top_k)
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or none for all tokens; got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1], or none for all tokens; got {self.top_p}")
        if any(token < 0 for token in self.suppress):
            raise ConfigError(f"suppressed token ids must be at least 0, got {min(self.suppress)}")


@dataclass(frozen=True)
class Measured:
    """What the model says of some positions, and the token drawn for each.

    The probabilities are the model's own: without mask and suppressed tokens, before temperature, top-k and top-p.
    """

    tokens: Int64[Tensor, "*rows"]
    """Token drawn for each position, whether or not it will be kept."""
    confidence: Float64[Tensor, "*rows"]
    """Probability of the most probable token."""
    drawn: Float64[Tensor, "*rows"]
    """Probability of the drawn token."""
    margin: Float64[Tensor, "*rows"]
    """Probability of the best token minus that of the second."""
    entropy: Float64[Tensor, "*rows"]
    """In nats."""


def restrict(
    weights: Shaped[Tensor, "row vocab"], top_k: int | None, top_p: float | None
) -> Shaped[Tensor, "row vocab"]:
    """Weights with zeros in place of what top-k, then top-p of the rest, leave out."""
    if top_k is not None and top_k < weights.shape[-1]:
        kth = weights.topk(top_k, -1).values[:, -1:]
        weights = weights.masked_fill(weights < kth, 0)
    if top_p is not None and top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        total = ordered.sum(-1, keepdim=True).double()
        # A token stays while those before it hold less than p: the one that reaches p is the last.
        kept = before.double() < top_p * total
        kept[:, 0] = True
        weights = weights.masked_fill(~torch.zeros_like(kept).scatter_(-1, order, kept), 0)
    return weights


def measure(
    logits: Float[Tensor, "row vocab"],
    words: Words,
    draw: Draw,
    arithmetic: DrawArithmetic,
    allowed: Int64[Tensor, " allowed"],
) -> Measured:
    """Draw a token for each row and say how sure the model is; on the logits' device.

    Args:
        words: One for each row.
        allowed: Ids of the tokens that may be drawn, ascending.
    """
    step = max(1, PIECE_ELEMENTS // logits.shape[-1])
    pieces = [
        _measure_piece(logits[first : first + step], words[first : first + step], draw, arithmetic, allowed)
        for first in range(0, max(1, logits.shape[0]), step)
    ]
    return Measured(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in MEASURES))


MEASURES = ("tokens", "confidence", "drawn", "margin", "entropy")


def _measure_piece(
    logits: Tensor, words: Words, draw: Draw, arithmetic: DrawArithmetic, allowed: Tensor
) -> Measured:
    logits = logits[:, allowed]
    plain = arithmetic.weights(logits, 1.0)
    if draw.temperature == 0.0:
        # Not argmax, which need not take the first of equals on every device.
        column = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    else:
        tempered = plain if draw.temperature == 1.0 else arithmetic.weights(logits, draw.temperature)
        if draw.top_p_first:
            tempered = tempered.masked_fill(restrict(plain, None, draw.top_p) == 0, 0)
        kept = restrict(tempered, draw.top_k, None if draw.top_p_first else draw.top_p)
        column = arithmetic.pick(kept, words)
    total = plain.sum(-1).double()
    best = plain.topk(min(2, plain.shape[-1]), -1).values
    second = best[:, 1] if best.shape[-1] > 1 else torch.zeros_like(best[:, 0])
    return Measured(
        tokens=allowed[column],
        confidence=best[:, 0].double() / total,
        drawn=plain.gather(-1, column[:, None])[:, 0].double() / total,
        margin=(best[:, 0] - second).double() / total,
        entropy=arithmetic.entropy(plain),
    )
