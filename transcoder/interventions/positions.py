"""Where an edit acts: positions of a state, in whatever form a notebook has them at hand."""

# Axes: batch, pos

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Int64

Positions: TypeAlias = (
    "int | Sequence[int] | Tensor | np.ndarray | np.integer | Callable[[Tensor], Tensor] | None"
)
"""A position, several, booleans [batch pos] or [pos] (tensors or NumPy's arrays), a function from the tokens
[batch pos] to booleans of that shape, such as `lambda x: x == mask_id`, or None for all."""


def where(positions: Positions, x: Int64[Tensor, "batch pos"], whose: str) -> Bool[Tensor, "batch pos"]:
    """The positions as booleans.

    Args:
        x: Tokens of the pass.
        whose: What an error names first.
    Raises:
        DataError: If a position is outside the sequences, or booleans have another shape.
    """
    if positions is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    found = positions(x) if callable(positions) else positions
    if isinstance(found, np.ndarray | np.integer):
        found = torch.as_tensor(found)
    if isinstance(found, Tensor) and found.dtype == torch.bool:
        if found.shape not in (x.shape, x.shape[1:]):
            raise DataError(
                f"{whose}: positions as booleans have the tokens' shape {list(x.shape)} or {list(x.shape[1:])}, "
                f"got {list(found.shape)}"
            )
        return found.to(x.device).expand(x.shape)
    if callable(positions):
        got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"{whose}: a function for positions returns booleans {list(x.shape)}, got {got.removeprefix('torch.')}"
        )
    chosen = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    chosen[:, _numbers(found, x.shape[1], whose)] = True
    return chosen


def _numbers(positions: object, n_positions: int, whose: str) -> list[int]:
    """Checked, each below the length."""
    if isinstance(positions, Tensor):
        positions = positions.reshape(-1).tolist()
    numbers = [positions] if isinstance(positions, int) else positions
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise DataError(f"{whose}: positions are whole numbers or booleans, got {positions!r}")
    for number in numbers:
        if type(number) is not int or not 0 <= number < n_positions:
            raise DataError(
                f"{whose}: positions must be whole numbers in [0, {n_positions}), got {number!r}; "
                f"they count from 0 in each sequence"
            )
    return list(numbers)
