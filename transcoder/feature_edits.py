"""Edits of features, and what they add to the features' activations."""

# Axes: batch, pos, feature

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Float


@dataclass(frozen=True)
class FeatureEdit:
    """Multiply a feature's activation; 0 ablates it."""

    layer: int
    feature: int
    positions: tuple[int, ...] | None = None
    """Positions of the sequences; None for all."""
    scale: float = 0.0
    """Factor on the activation."""


def changes_of(
    edits: Sequence[FeatureEdit], acts: Float[Tensor, "batch pos feature"]
) -> dict[int, Float[Tensor, "batch pos"]]:
    """What edits of one layer add to its features' activations, by feature; edits of one feature chain."""
    edited: dict[int, Tensor] = {}
    for edit in edits:
        before = edited.get(edit.feature, acts[..., edit.feature])
        edited[edit.feature] = torch.where(_at(edit.positions, before), edit.scale * before, before)
    return {feature: after - acts[..., feature] for feature, after in edited.items()}


def with_change(
    written: Float[Tensor, "batch pos d_model"],
    change: Float[Tensor, "batch pos"],
    row: Float[Tensor, " d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """An MLP output after a feature with this decoder row changed; where it did not, every bit stays."""
    # Not a sum over all positions: x + 0 would turn -0 into 0.
    return torch.where(change[..., None] != 0, written + change[..., None] * row, written)


def _at(positions: Sequence[int] | None, acts: Float[Tensor, "batch pos"]) -> Bool[Tensor, " pos"]:
    n_positions = acts.shape[-1]
    if positions is None:
        return torch.ones(n_positions, dtype=torch.bool, device=acts.device)
    for position in positions:
        if not 0 <= position < n_positions:
            raise DataError(
                f"positions must be in [0, {n_positions}), got {position}; they count from 0 in each sequence"
            )
    at = torch.zeros(n_positions, dtype=torch.bool, device=acts.device)
    at[list(positions)] = True
    return at
