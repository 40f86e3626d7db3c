"""The order: which of the open positions come first.

Every order but "drawn_confidence" looks only at the state and at random words of its own. One token a step then draws
from the model's conditional distributions exactly, whichever position is taken, so that with an exact denoiser the
samples follow the exact law. "drawn_confidence", the published form of LLaDA and Dream, prefers positions whose drawn
token happens to be probable; above temperature 0 that favours probable tokens and changes the law.

Source:
    Nie et al. 2025, arXiv:2502.09992 (low-confidence remasking); Ye et al. 2025, Dream (margin and entropy).
"""

# Axes: batch, pos

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mdlm_interp.decoding.draws import Measured
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Float64, Int64

OrderName = Literal["confidence", "drawn_confidence", "margin", "entropy", "random", "left_to_right"]
Order = OrderName | tuple[int, ...]
"""A name, or positions in the order in which they are to be filled."""


def scores(
    order: Order,
    measured: Measured,
    is_open: Bool[Tensor, "batch pos"],
    uniform: Float64[Tensor, "batch pos"],
) -> Float64[Tensor, "batch pos"]:
    """How early each position should come: the highest first; -inf where it is not open.

    Args:
        uniform: Random numbers for the random order.
    Raises:
        DataError: If a given order leaves out an open position.
    """
    length = is_open.shape[1]
    if order == "entropy":
        found = -measured.entropy
    elif order == "random":
        found = uniform
    elif order == "left_to_right":
        found = -torch.arange(length, dtype=torch.float64).expand_as(uniform)
    elif isinstance(order, tuple):
        found = _given(order, is_open)
    else:
        found = {
            "confidence": measured.confidence,
            "drawn_confidence": measured.drawn,
            "margin": measured.margin,
        }[order]
    return found.masked_fill(~is_open, -torch.inf)


def highest(score: Float64[Tensor, "batch pos"], count: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch pos"]:
    """The `count` highest scores of each row, never one of -inf; of equals the earlier position comes first."""
    rank = score.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return (rank < count[:, None]) & (score > -torch.inf)


def _given(order: tuple[int, ...], is_open: Tensor) -> Tensor:
    length = is_open.shape[1]
    if len(set(order)) != len(order) or not all(0 <= position < length for position in order):
        raise DataError(f"an order must name positions in [0, {length}), each once; got {list(order)}")
    left_out = is_open.any(0)
    left_out[list(order)] = False
    if bool(left_out.any()):
        raise DataError(
            f"the order leaves out position {int(left_out.nonzero()[0, 0])}, which is masked; name every masked one"
        )
    rank = torch.zeros(length, dtype=torch.float64)
    rank[list(order)] = -torch.arange(len(order), dtype=torch.float64)
    return rank.expand(is_open.shape)
