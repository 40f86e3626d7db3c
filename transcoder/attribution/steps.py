"""Why a token was committed, and why the tokens before it were: graphs along a denoising trajectory.

1. The root is a token of the final text; its graph is that of the state it was predicted from.
2. A share of its influence begins at the embeddings of tokens that earlier steps committed. Each of these can be the
   root of a graph of its own, at its own step, with that share as its weight.
3. Graphs are made from the largest weight down, as many as are wanted. Weights are then summed over all of them.

Every share is of influence as `influence.py` defines it: what begins at a position is either a given token, a mask, a
token committed before, or an error term of some layer, and these add up to one.
"""

# Axes: state, pos, node

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.analysis import sigma_at
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.shapes import Int64
from transcoder.attribution.building import attribute
from transcoder.attribution.graph import Graph
from transcoder.attribution.influence import influence
from transcoder.attribution.targets import Centre, Targets
from transcoder.replacement import ReplacementModel


@dataclass(frozen=True, kw_only=True)
class Commitment:
    """A token, the step that committed it, and the graph of its logit in the state before that step."""

    step: int
    position: int
    token: int
    weight: float
    """Share of the root's influence that passes through this token; 1 for the root."""
    graph: Graph
    given: float
    """Share of its own influence that begins at tokens given from the start."""
    masks: float
    """At masks, its own among them."""
    committed: float
    """At tokens that earlier steps committed."""
    errors: float
    """At error terms."""

    @property
    def slug(self) -> str:
        """A name for files."""
        return f"step-{self.step}-position-{self.position}"


@dataclass(frozen=True)
class Link:
    """A commitment that stands in the state of a later one."""

    earlier: int
    """Number of the commitment."""
    later: int
    share: float
    """Of the later one's influence that begins at the earlier one's embedding."""
    embedding_node: int
    """In the later one's graph; the earlier one's is its only logit node."""


@dataclass(frozen=True)
class CommitmentGraph:
    """A token's graph with those of the tokens committed before it."""

    commitments: list[Commitment]
    """The root first, then from the largest weight down as they were found."""
    links: list[Link]
    left_out: list[tuple[int, int, float]]
    """Position, step and weight of commitments that were found and not followed."""

    def save(self, directory: str | Path) -> None:
        """Write the graphs and commitments.json; see `step_storage.save_commitments`."""
        from transcoder.attribution.step_storage import save_commitments

        save_commitments(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> CommitmentGraph:
        """Read what `save` wrote; see `step_storage.load_commitments`."""
        from transcoder.attribution.step_storage import load_commitments

        return load_commitments(directory)


def commitment_graph(
    replacement: ReplacementModel,
    trajectory: Trajectory,
    position: int,
    *,
    row: int = 0,
    max_tokens: int = 8,
    min_weight: float = 0.01,
    centre: Centre = "log_odds",
    max_features: int | None = None,
    progress: bool = False,
) -> CommitmentGraph:
    """Graphs of a token's commitment and of those it depends on.

    With guidance or a temperature, graphs are still of the model's own logits on the tokens as they stood.

    Args:
        position: Of the token, in the final state.
        row: Of the trajectory's batch.
        max_tokens: Graphs at most.
        min_weight: Do not follow tokens of a smaller weight.
        max_features: Of each graph; see `attribute`.
    Raises:
        DataError: If no step committed the token, it was written over another token and not a mask, or the
            trajectory is of another model.
    """
    if max_tokens < 1 or not min_weight >= 0.0:
        raise ConfigError(
            f"max_tokens must be at least 1 and min_weight 0, got {max_tokens} and {min_weight}"
        )
    _check(trajectory, replacement, position, row)
    written = written_by(trajectory, row)
    explorer = _Explorer(replacement, trajectory, row, written, centre, max_features)
    pending: dict[tuple[int, int], float] = {(int(written[-1, position]), position): 1.0}
    with tqdm(total=max_tokens, desc="graphs", disable=None if progress else True) as bar:
        while pending and len(explorer.found) < max_tokens:
            key = max(pending, key=lambda one: pending[one])
            if pending.pop(key) < min_weight:
                break
            explorer.add(*key)
            bar.update()
            pending = {one: weight for one, weight in explorer.weights().items() if one not in explorer.found}
    return explorer.result(pending)


def written_by(trajectory: Trajectory, row: int) -> Int64[Tensor, "state pos"]:
    """For each state and position, the step that wrote the token standing there; -1 if it was there from the start.

    A step that writes the same token again leaves no trace in the states and does not count.
    """
    states = trajectory.states[:, row]
    found = torch.full_like(states, -1)
    for state in range(1, len(states)):
        changed = states[state] != states[state - 1]
        found[state] = torch.where(changed, state - 1, found[state - 1])
    return found


class _Explorer:
    """Commitments as they are found."""

    def __init__(
        self,
        replacement: ReplacementModel,
        trajectory: Trajectory,
        row: int,
        written: Tensor,
        centre: Centre,
        max_features: int | None,
    ) -> None:
        self._replacement, self._trajectory, self._row, self._written = replacement, trajectory, row, written
        self._centre, self._max_features = centre, max_features
        self.found: dict[tuple[int, int], tuple[Graph, Tensor]] = {}
        """Graph, and influence of its nodes, by step and position."""

    def add(self, step: int, position: int) -> None:
        """Make the graph of a commitment."""
        trajectory, model = self._trajectory, self._replacement.model
        state = trajectory.states[step, self._row]
        token = int(trajectory.states[step + 1, self._row, position])
        if int(state[position]) != trajectory.mask_id:
            raise DataError(
                f"step {step} wrote position {position} over token {int(state[position])}, and only masks are "
                f"predicted; choose a position that was filled from a mask"
            )
        sigma = sigma_at(trajectory, step)[self._row, None]
        graph = attribute(
            self._replacement,
            state[None].to(model.device),
            (sigma if model.dtype == torch.float64 else sigma.float()).to(model.device),
            targets=Targets(tokens={position: [token]}, centre=self._centre),
            max_features=self._max_features,
        )
        self.found[step, position] = graph, influence(graph) / float(graph.probabilities.sum())

    def origins(self, key: tuple[int, int]) -> dict[tuple[int, int], float]:
        """Shares of a commitment's influence that begin at earlier ones, by step and position."""
        graph, shares = self.found[key]
        state, written = graph.input_ids, self._written[key[0]]
        return {
            (int(written[q]), q): float(shares[graph.embedding_node(q)])
            for q in range(graph.n_positions)
            if int(written[q]) >= 0 and int(state[q]) != graph.mask_id
        }

    def weights(self) -> dict[tuple[int, int], float]:
        """Share of the root's influence that passes through each commitment, as far as graphs tell."""
        root = next(iter(self.found))
        found = {root: 1.0}
        # An origin is always of an earlier step, so a weight is complete when its own step is reached.
        for key in sorted(self.found, reverse=True):
            for origin, share in self.origins(key).items():
                found[origin] = found.get(origin, 0.0) + found.get(key, 0.0) * share
        return found

    def result(self, pending: dict[tuple[int, int], float]) -> CommitmentGraph:
        """Commitments, links between them, and what was not followed."""
        weights, numbers = self.weights(), {key: number for number, key in enumerate(self.found)}
        links = [
            Link(numbers[origin], numbers[key], share, self.found[key][0].embedding_node(origin[1]))
            for key in self.found
            for origin, share in self.origins(key).items()
            if origin in numbers
        ]
        left = sorted(((q, step, weight) for (step, q), weight in pending.items()), key=lambda one: -one[2])
        return CommitmentGraph([self._commitment(key, weights[key]) for key in self.found], links, left)

    def _commitment(self, key: tuple[int, int], weight: float) -> Commitment:
        graph, shares = self.found[key]
        step, position = key
        embeddings = shares[graph.embedding_start : graph.logit_start]
        masked = graph.input_ids == graph.mask_id
        given = ~masked & (self._written[step] < 0)
        return Commitment(
            step=step,
            position=position,
            token=int(graph.logits[0, 1]),
            weight=weight,
            graph=graph,
            given=float(embeddings[given].sum()),
            masks=float(embeddings[masked].sum()),
            committed=float(embeddings[~masked & ~given].sum()),
            errors=float(shares[graph.n_features : graph.embedding_start].sum()),
        )


def _check(trajectory: Trajectory, replacement: ReplacementModel, position: int, row: int) -> None:
    _, batch, n_positions = trajectory.states.shape
    for name, value, end in (("row", row, batch), ("position", position, n_positions)):
        if not 0 <= value < end:
            raise DataError(f"{name} must be in [0, {end}), got {value}")
    mask_id = replacement.model.config.mask_id
    if trajectory.mask_id != mask_id:
        raise DataError(
            f"the trajectory's mask is token {trajectory.mask_id}, the model's {mask_id}; give the model that "
            f"was sampled from"
        )
    if int(trajectory.final[row, position]) == mask_id:
        raise DataError(f"position {position} is still a mask at the end; choose one that was filled")
    if bool((trajectory.states[:, row, position] == trajectory.final[row, position]).all()):
        raise DataError(f"position {position} was given from the start; choose one that the model filled")


def words(tokens: Sequence[str], found: CommitmentGraph) -> list[str]:
    """One line for each commitment, in the order of their steps."""
    lines = []
    for one in sorted(found.commitments, key=lambda each: each.step):
        lines.append(
            f"step {one.step}: {tokens[one.position]!r} at {one.position}, weight {one.weight:.3f}, its influence from "
            f"given {one.given:.0%}, committed {one.committed:.0%}, masks {one.masks:.0%}, errors {one.errors:.0%}"
        )
    return lines
