"""Activations of a few features at every position, state by state: the whole life of each."""

# Axes: state, feature, batch, pos

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import check_pair, chosen, filled
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Float64, Int64
from transcoder.replacement import ReplacementModel
from transcoder.trajectories.encoding import check_features, encoded


@dataclass(frozen=True, kw_only=True)
class FeatureCourses:
    """Activations over the states of a trajectory."""

    features: tuple[tuple[int, int], ...]
    """(layer, feature)."""
    rows: tuple[int, ...]
    """Of the trajectory's batch."""
    commit: Int64[Tensor, "batch pos"]
    """Step that wrote the final token over a mask; -1 where none did."""
    is_masked: Bool[Tensor, "state batch pos"]
    acts: Float64[Tensor, "state feature batch pos"]

    def around_commit(self, feature: int) -> list[dict[str, Any]]:
        """Mean activation of one of the features over filled positions, by state relative to the commit.

        Args:
            feature: Its number within `features`.
        Raises:
            DataError: If there is no such number.
        """
        chosen("feature", [feature], len(self.features))
        states = torch.arange(len(self.acts))[:, None, None]
        relative = (states - self.commit).masked_fill(self.commit < 0, -len(self.acts))
        acts = self.acts[:, feature]
        found = []
        for offset in range(1 - len(self.acts), len(self.acts)):
            here = acts[relative == offset]
            if len(here):
                found.append(
                    {
                        "to_commit": offset,
                        "positions": len(here),
                        "mean": float(here.mean()),
                        "active": float((here > 0).double().mean()),
                    }
                )
        return found


def feature_courses(
    replacement: ReplacementModel,
    trajectory: Trajectory,
    features: Sequence[tuple[int, int]],
    *,
    rows: Sequence[int] | None = None,
) -> FeatureCourses:
    """Follow some features through every state, the final one included.

    Args:
        features: (layer, feature) of each.
    Raises:
        DataError: If a feature or row does not exist, or the trajectory is another model's.
    """
    check_pair(replacement.model, trajectory)
    if not features:
        raise DataError("name one or more features to follow, as (layer, feature); got none")
    check_features(replacement, features)
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    layers, numbers = (torch.tensor(part) for part in zip(*features, strict=True))
    acts, masked = [], []
    for seen in encoded(replacement, trajectory, at_rows):
        acts.append(seen.acts[layers, :, :, numbers].double())
        masked.append(seen.is_masked)
    commit = trajectory.revealed_at.masked_fill(~filled(trajectory), -1)
    return FeatureCourses(
        features=tuple((int(layer), int(number)) for layer, number in features),
        rows=at_rows,
        commit=commit[list(at_rows)],
        is_masked=torch.stack(masked),
        acts=torch.stack(acts),
    )
