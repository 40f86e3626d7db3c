"""Graphs as pages of our own explorer: one graph, or a token's commitment with those of the tokens before it."""

# Axes: state, pos, node

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.viewer.commitments_page import (
    CommitmentData,
    Dependence,
    Origins,
    Unfollowed,
    commitments_page,
)
from mdlm_interp.viewer.graph_page import GraphData, check_graph
from mdlm_interp.viewer.page import Link
from mdlm_interp.viewer.text import Decoder
from mdlm_interp.viewer.trajectory_page import check_tokenizer
from transcoder.attribution.export import graph_json
from transcoder.attribution.graph import Graph
from transcoder.attribution.influence import Pruned, prune
from transcoder.attribution.steps import Commitment, CommitmentGraph, written_by


def graph_data(
    graph: Graph,
    pruned: Pruned,
    tokenizer: Decoder,
    *,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> GraphData:
    """The kept part of a graph as the viewer shows it.

    Args:
        labels: What features are called, by layer and number; the others have no name.
    """
    ids, predicted = graph.input_ids.tolist(), set(graph.logits[:, 1].tolist())
    found = graph_json(
        graph,
        pruned,
        [tokenizer.token(token) for token in ids],
        logit_tokens={token: tokenizer.token(token) for token in predicted},
        slug="graph",
        scan="",
        labels=labels,
    )
    return check_graph(found)


def check_commitments(
    found: CommitmentGraph,
    trajectory: Trajectory,
    tokenizer: Decoder,
    *,
    row: int = 0,
    features: tuple[int, int] | None = None,
) -> None:
    """Raise DataError unless a commitment graph is of this row of this trajectory.

    Args:
        features: Layers and features of a layer that there are; none takes any.
    """
    check_tokenizer(trajectory, tokenizer)
    states = trajectory.states
    if not 0 <= row < states.shape[1]:
        raise DataError(f"row must be in [0, {states.shape[1]}), got {row}")
    for one in found.commitments:
        if one.step >= trajectory.n_steps or states[one.step, row].tolist() != one.graph.input_ids.tolist():
            raise DataError(
                f"the state before step {one.step} is another in row {row} of this trajectory; give the trajectory "
                f"and row that the graph was made of"
            )
        if features is not None:
            n_layers, n_features = features
            for layer, _, number in one.graph.features.tolist():
                if layer >= n_layers or number >= n_features:
                    raise DataError(
                        f"the commitment of step {one.step} has feature {number} of layer {layer}, the transcoder has "
                        f"{n_layers} layers of {n_features}; is the graph another transcoder's?"
                    )


def commitment_graph_page(
    found: CommitmentGraph,
    trajectory: Trajectory,
    tokenizer: Decoder,
    *,
    row: int = 0,
    pruned: Sequence[Pruned] | None = None,
    feature_name: Callable[[int, int], str] | None = None,
    feature_href: Callable[[int, int], str] | None = None,
    nav: Sequence[Link] = (),
) -> str:
    """The page of a commitment graph.

    Args:
        trajectory: Which the graph was made of.
        tokenizer: Of the model.
        row: Of the trajectory's batch.
        pruned: Kept part of each commitment's graph, in their order; `prune`'s defaults if none.
        feature_name: What a feature (layer, number) is called; none leaves them without names.
        feature_href: Where the dashboard of a feature (layer, number) is; none links to no dashboards.
        nav: Pages of the same site.
    Raises:
        DataError: If trajectory or row are others than the graph's, or the page would be too large.
    """
    check_commitments(found, trajectory, tokenizer, row=row)
    states = trajectory.states
    kept = [prune(one.graph) for one in found.commitments] if pruned is None else pruned
    written = written_by(trajectory, row)
    commitments = [
        _commitment(one, part, written[one.step].tolist(), tokenizer, feature_name)
        for one, part in zip(found.commitments, kept, strict=True)
    ]
    return commitments_page(
        commitments,
        [Dependence(earlier=link.earlier, later=link.later, share=link.share) for link in found.links],
        [
            Unfollowed(
                step=step,
                position=position,
                token=tokenizer.token(int(states[step + 1, row, position])),
                weight=weight,
            )
            for position, step, weight in found.left_out
        ],
        n_steps=trajectory.n_steps,
        feature_href=feature_href,
        nav=nav,
    )


def _commitment(
    one: Commitment,
    pruned: Pruned,
    writers: list[int],
    tokenizer: Decoder,
    feature_name: Callable[[int, int], str] | None,
) -> CommitmentData:
    graph, labels = one.graph, {}
    if feature_name is not None:
        kept = graph.features[pruned.nodes[: graph.n_features]]
        labels = {(layer, number): feature_name(layer, number) for layer, _, number in kept.tolist()}
    masked = (graph.input_ids == graph.mask_id).tolist()
    # Influence weighs a logit by its probability; a share is of all that leads to it.
    shares = pruned.influence[graph.embedding_start : graph.logit_start] / float(graph.probabilities.sum())
    return CommitmentData(
        step=one.step,
        position=one.position,
        token=tokenizer.token(one.token),
        weight=one.weight,
        origins=Origins(given=one.given, masks=one.masks, committed=one.committed, errors=one.errors),
        shares=shares.tolist(),
        # A step that took a token back wrote a mask.
        writers=[-1 if mask else step for mask, step in zip(masked, writers, strict=True)],
        masked=masked,
        graph=graph_data(graph, pruned, tokenizer, labels=labels),
    )
