"""The life of features along a trajectory: when each comes on at a position, relative to the token's commitment.

1. Every state of the trajectory, the final one included, goes through the model and the encoders.
2. A feature lives at a position from the first state in which it is active there to the last.
3. Times are counted from the commit of that position: in state 0 it is still a mask, and its token is drawn from this
   state; in state 1 the token stands there. So an onset of 0 or less came before the token, one of 1 or more after it.

A feature that is active in the first state has no onset that was seen; such lives are marked `from_start`.
"""

# Axes: state, layer, batch, pos, feature, life (a feature at a position of a sequence)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import check_pair, chosen, need_filled
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.shapes import Bool, Float64, Int64
from transcoder.replacement import ReplacementModel
from transcoder.trajectories.encoding import check_features, encoded


@dataclass(frozen=True, kw_only=True)
class FeatureLives:
    """When features are active at the positions that were filled."""

    n_layers: int
    rows: tuple[int, ...]
    """Of the trajectory's batch."""
    commit: Int64[Tensor, "batch pos"]
    """Step that wrote the final token over a mask; -1 where none did: such positions are left out."""
    is_masked: Bool[Tensor, "state batch pos"]
    layer: Int64[Tensor, " life"]
    batch: Int64[Tensor, " life"]
    """Number within `rows`."""
    position: Int64[Tensor, " life"]
    feature: Int64[Tensor, " life"]
    onset: Int64[Tensor, " life"]
    """First state in which it is active."""
    last: Int64[Tensor, " life"]
    """Last state in which it is active."""
    n_active: Int64[Tensor, " life"]
    """States in which it is active; fewer than from onset to last if it went off in between."""
    peak: Float64[Tensor, " life"]
    """Its largest activation."""
    peak_state: Int64[Tensor, " life"]
    """The first state that has it."""

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def n_states(self) -> int:
        """States of the trajectory, the first and the final one included."""
        return len(self.is_masked)

    @property
    def to_commit(self) -> Int64[Tensor, " life"]:
        """State of the onset minus step of the commit."""
        return self.onset - self.commit[self.batch, self.position]

    @property
    def from_start(self) -> Bool[Tensor, " life"]:
        """Whether it was active in the first state, so that its onset was not seen."""
        return self.onset == 0

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each life, as plain values."""
        relative, start = self.to_commit, self.from_start
        return [
            {
                "layer": int(self.layer[i]),
                "feature": int(self.feature[i]),
                "row": self.rows[int(self.batch[i])],
                "position": int(self.position[i]),
                "onset": int(self.onset[i]),
                "to_commit": int(relative[i]),
                "from_start": bool(start[i]),
                "last": int(self.last[i]),
                "n_active": int(self.n_active[i]),
                "peak": float(self.peak[i]),
                "peak_state": int(self.peak_state[i]),
            }
            for i in range(len(self))
        ]

    def rates(self, layer: int) -> list[dict[str, Any]]:
        """Onsets by time relative to the commit: how many a position has there, on average.

        The first state is left out on both sides, since what is active in it may be older. Without this division early
        times would seem rich, or poor, only because many, or few, positions are observed there.

        Raises:
            DataError: If there is no such layer.
        """
        chosen("layer", [layer], self.n_layers)
        seen = (self.layer == layer) & ~self.from_start
        relative = self.to_commit[seen]
        commits = self.commit[self.commit >= 0]
        found = []
        for offset in range(1 - int(commits.max()), self.n_states - int(commits.min())):
            state = commits + offset
            observed = int(((state >= 1) & (state < self.n_states)).sum())
            if observed:
                onsets = int((relative == offset).sum())
                found.append(
                    {
                        "to_commit": offset,
                        "positions": observed,
                        "onsets": onsets,
                        "rate": onsets / observed,
                    }
                )
        return found

    def by_distance(self, layer: int) -> list[dict[str, Any]]:
        """Onsets at positions that are still masks, by their distance to the nearest token that was just written.

        Only positions that will be filled count, and states before which something was written. The rate is given
        again for the positions that are filled in the very next step, and for those that are filled later.

        Raises:
            DataError: If there is no such layer.
        """
        chosen("layer", [layer], self.n_layers)
        near, ours = self._distances(), self.layer == layer
        place = self.onset[ours], self.batch[ours], self.position[ours]
        onsets = torch.zeros_like(near).index_put_(place, torch.ones_like(place[0]), accumulate=True)
        is_next = self.commit == torch.arange(self.n_states)[:, None, None]
        found = []
        for distance in sorted(set(near[near > 0].tolist())):
            here = near == distance
            found.append(
                {
                    "distance": distance,
                    "positions": int(here.sum()),
                    "onsets": int(onsets[here].sum()),
                    "rate": float(onsets[here].double().mean()),
                    # The mean of none is NaN.
                    "rate_if_next": float(onsets[here & is_next].double().mean()),
                    "rate_if_later": float(onsets[here & ~is_next].double().mean()),
                }
            )
        return found

    def _distances(self) -> Int64[Tensor, "state batch pos"]:
        """From each mask to the nearest position whose mask the last step replaced; 0 where that is not defined."""
        found = torch.zeros(self.is_masked.shape, dtype=torch.int64)
        places = torch.arange(self.is_masked.shape[-1])
        for state in range(1, self.n_states):
            written = self.is_masked[state - 1] & ~self.is_masked[state]
            for row in written.any(1).nonzero()[:, 0].tolist():
                far = (places[:, None] - written[row].nonzero()[:, 0]).abs().amin(1)
                counts = self.is_masked[state, row] & (self.commit[row] >= state)
                found[state, row] = torch.where(counts, far, 0)
        return found

    def summary(self) -> list[dict[str, Any]]:
        """By layer: lives, and which share of them began when."""
        relative, start = self.to_commit, self.from_start
        found = []
        for layer in range(self.n_layers):
            here = self.layer == layer
            times, known = relative[here], ~start[here]
            n = int(here.sum())

            def share(flags: Tensor, of: int = n) -> float:
                return int(flags.sum()) / of if of else float("nan")

            found.append(
                {
                    "layer": layer,
                    "lives": n,
                    "from_start": share(~known),
                    "before_commit_state": share(known & (times < 0)),
                    "in_commit_state": share(known & (times == 0)),
                    "with_the_token": share(known & (times == 1)),
                    "later": share(known & (times > 1)),
                    "median_to_commit": float(times[known].double().median())
                    if bool(known.any())
                    else float("nan"),
                }
            )
        return found


def feature_lives(
    replacement: ReplacementModel,
    trajectory: Trajectory,
    *,
    features: Sequence[tuple[int, int]] | None = None,
    rows: Sequence[int] | None = None,
) -> FeatureLives:
    """When features come on and go off at every position that was filled.

    Args:
        features: (layer, feature) of those to follow; all if none.
        rows: Of the trajectory's batch; all if none.
    Raises:
        DataError: If a feature or row does not exist, nothing was filled, or the trajectory is another model's.
    """
    check_pair(replacement.model, trajectory)
    config = replacement.clt.config
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    commit = trajectory.revealed_at[list(at_rows)].masked_fill(~need_filled(trajectory, at_rows), -1)
    wanted = _wanted(check_features(replacement, features), config.n_layers, config.n_features)
    shape = (config.n_layers, *commit.shape, config.n_features)
    keys, values, states, masked = [], [], [], []
    for seen in encoded(replacement, trajectory, at_rows):
        active = (seen.acts > 0) & (commit >= 0)[..., None] & wanted[:, None, None]
        keys.append(active.flatten().nonzero()[:, 0])
        values.append(seen.acts.flatten()[keys[-1]].double())
        states.append(torch.full_like(keys[-1], seen.state))
        masked.append(seen.is_masked)
    lives, number = torch.unique(torch.cat(keys), return_inverse=True)
    places = torch.stack(torch.unravel_index(lives, shape)) if len(lives) else lives.new_zeros(4, 0)
    return FeatureLives(
        n_layers=config.n_layers,
        rows=at_rows,
        commit=commit,
        is_masked=torch.stack(masked),
        layer=places[0],
        batch=places[1],
        position=places[2],
        feature=places[3],
        **_reduced(number, torch.cat(states), torch.cat(values), len(lives)),
    )


def _wanted(
    features: Sequence[tuple[int, int]] | None, n_layers: int, n_features: int
) -> Bool[Tensor, "layer feature"]:
    found = torch.full((n_layers, n_features), features is None)
    for layer, feature in features or ():
        found[layer, feature] = True
    return found


def _reduced(number: Tensor, state: Tensor, value: Tensor, n_lives: int) -> dict[str, Tensor]:
    """First and last state, count and peak of each life, from its active states in ascending order."""

    def over(values: Tensor, how: str, start: int | float) -> Tensor:
        return torch.full((n_lives,), start, dtype=values.dtype).scatter_reduce(0, number, values, how)

    end = int(state.max()) + 1 if len(state) else 0
    peak = over(value, "amax", -torch.inf)
    at_peak = torch.where(value == peak[number], state, end)
    return {
        "onset": over(state, "amin", end),
        "last": over(state, "amax", -1),
        "n_active": over(torch.ones_like(state), "sum", 0),
        "peak": peak,
        "peak_state": over(at_peak, "amin", end),
    }
