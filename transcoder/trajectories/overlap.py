"""How much of a position's features stays from one state of a trajectory to the next."""

# Axes: state, pair (a state and the next), layer, batch, pos, feature

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import check_pair, chosen
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Float, Float64
from transcoder.replacement import ReplacementModel
from transcoder.trajectories.encoding import encoded


@dataclass(frozen=True, kw_only=True)
class FeatureOverlap:
    """How much of a position's strongest features stays from one state to the next."""

    k: int | None
    """Features that count at most; None for all that are active."""
    jaccard: Float64[Tensor, "pair layer batch pos"]
    """Features in both sets over features in either; NaN if neither state has an active one."""
    was_masked: Bool[Tensor, "state batch pos"]

    def summary(self) -> list[dict[str, Any]]:
        """By layer: mean overlap while a position stays a mask, as it is filled, and while its token stays."""
        now, then = self.was_masked[:-1], self.was_masked[1:]
        kinds = {"masked": now & then, "filled": now & ~then, "token": ~now & ~then}
        return [
            {"layer": layer}
            | {name: float(self.jaccard[:, layer][where].nanmean()) for name, where in kinds.items()}
            for layer in range(self.jaccard.shape[1])
        ]


def feature_overlap(
    replacement: ReplacementModel,
    trajectory: Trajectory,
    *,
    k: int | None = None,
    rows: Sequence[int] | None = None,
) -> FeatureOverlap:
    """Compare each position's k strongest features with those of the next state.

    Args:
        k: All that are active if none; fewer than k count where fewer are active.
    Raises:
        DataError: If k or a row is out of range, or the trajectory is another model's.
    """
    check_pair(replacement.model, trajectory)
    n_features = replacement.clt.config.n_features
    if k is not None and not 1 <= k <= n_features:
        raise DataError(f"k must be in [1, {n_features}], the features of a layer; got {k}")
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    found, masked = [], []
    before: Tensor | None = None
    for seen in encoded(replacement, trajectory, at_rows):
        among = _strongest(seen.acts, k)
        if before is not None:
            # 0 / 0 of two empty sets is NaN, as promised.
            found.append((before & among).sum(-1).double() / (before | among).sum(-1).double())
        before = among
        masked.append(seen.is_masked)
    return FeatureOverlap(k=k, jaccard=torch.stack(found), was_masked=torch.stack(masked))


def _strongest(
    acts: Float[Tensor, "layer batch pos feature"], k: int | None
) -> Bool[Tensor, "layer batch pos feature"]:
    if k is None:
        return acts > 0
    top = acts.topk(k, -1)
    return torch.zeros_like(acts, dtype=torch.bool).scatter(-1, top.indices, top.values > 0)
