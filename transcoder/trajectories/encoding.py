"""Features of every state of a trajectory, one state at a time."""

# Axes: state, layer, batch, pos, feature

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import chosen, replay
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.shapes import Bool, Float
from transcoder.replacement import ReplacementModel


@dataclass(frozen=True)
class Encoded:
    """One state, on the CPU."""

    state: int
    is_masked: Bool[Tensor, "batch pos"]
    acts: Float[Tensor, "layer batch pos feature"]


def encoded(replacement: ReplacementModel, trajectory: Trajectory, rows: Sequence[int]) -> Iterator[Encoded]:
    """Every state, the final one included, of some rows: features in the model, whose MLPs stay."""
    names = replacement.clt.config.input_hooks
    states = range(trajectory.n_steps + 1)
    for seen in replay(replacement.model, trajectory, steps=states, rows=rows, hooks=names):
        x = torch.stack([seen.cache[name] for name in names])
        with torch.no_grad():
            acts = replacement.clt.encode(x.flatten(1, 2)).reshape(*x.shape[:3], -1)
        yield Encoded(seen.step, seen.is_masked, acts.cpu())


def check_features(
    replacement: ReplacementModel, features: Sequence[tuple[int, int]] | None
) -> Sequence[tuple[int, int]] | None:
    """The (layer, feature) pairs, if each exists in the transcoder; or none.

    Raises:
        DataError: If one does not.
    """
    config = replacement.clt.config
    for layer, feature in features or ():
        chosen("layer", [layer], config.n_layers)
        chosen("feature", [feature], config.n_features)
    return features
