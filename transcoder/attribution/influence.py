"""Influence of nodes and edges on the logits; pruning, scores, and what the graph says an ablation does.

Influence forgets signs: each target's incoming edges are divided by the sum of their sizes, logits weigh as much as
their tokens are probable, and a node's influence is the sum over all paths from it to the logits. Nodes, then edges,
are kept from the most influential down until they hold the wanted share; features without an edge in or out go too.

    replacement    share of the influence from embeddings in that from embeddings and error terms, end to end
    completeness   share of incoming edges that come from features or embeddings, averaged over nodes by influence

Total effects keep signs and units: an ablated feature takes its edges with it, and every feature downstream passes its
change on in proportion, which holds while all of them stay active.

Source:
    Ameisen et al. 2025, Circuit Tracing (pruning; replacement and completeness scores); circuit-tracer, graph.py.
"""

# Axes: node (target, then source), column (a possible source), row (a visited feature), logit

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.shapes import Bool, Float, Float64, Int64
from transcoder.attribution.graph import Graph

NODE_SHARE, EDGE_SHARE = 0.8, 0.98
"""What pruning keeps by default, as circuit-tracer does."""


@dataclass(frozen=True)
class Pruned:
    """Which part of a graph is kept."""

    nodes: Bool[Tensor, " node"]
    """Embeddings and logits always are."""
    edges: Bool[Tensor, "node node"]
    influence: Float64[Tensor, " node"]
    """Of each node on the logits."""
    cumulative: Float64[Tensor, " node"]
    """Share of the influence that this node and all more influential ones hold."""
    node_share: float
    edge_share: float


@dataclass(frozen=True)
class Scores:
    """How much of a graph goes through features."""

    replacement: float
    completeness: float


def influence(graph: Graph) -> Float64[Tensor, " node"]:
    """Share of all paths to the logits that begin at a node, edges taken by size.

    Raises:
        DataError: If no chosen logit has any probability, so that nothing can be weighed by it.
    """
    return _through(normalised(graph.edges), logit_weights(graph))


def logit_weights(graph: Graph) -> Float64[Tensor, " node"]:
    """Probability of each logit's token; zero for other nodes."""
    weights = torch.zeros(graph.n_nodes, dtype=torch.float64)
    weights[graph.logit_start :] = graph.probabilities.cpu()
    if not float(weights.sum()) > 0.0:
        raise DataError("no chosen token has any probability, so nothing weighs their graph; choose others")
    return weights


def normalised(edges: Float[Tensor, "node node"]) -> Float64[Tensor, "node node"]:
    """Each target's incoming edges by size, their sum one; zero where there is none."""
    sizes = edges.detach().cpu().double().abs()
    totals = sizes.sum(1, keepdim=True)
    return sizes / torch.where(totals > 0, totals, 1.0)


def _through(matrix: Tensor, weights: Tensor) -> Tensor:
    """weights times the sum of all powers of a matrix that has no cycle."""
    found, current = torch.zeros_like(weights), weights
    for _ in range(len(weights)):
        current = current @ matrix
        if not bool(current.any()):
            return found
        found = found + current
    raise DataError("the graph has a cycle, and influence does not end; were its edges changed?")


def prune(graph: Graph, node_share: float = NODE_SHARE, edge_share: float = EDGE_SHARE) -> Pruned:
    """The influential part of a graph.

    Args:
        node_share: Share of the nodes' influence to keep, from the most influential down.
        edge_share: Share of the edges' influence to keep, likewise, among the nodes that are kept.
    Raises:
        ConfigError: If a share is not between 0 and 1.
    """
    for name, value in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} must be in [0, 1], got {value}")
    of_nodes, weights = influence(graph), logit_weights(graph)
    nodes = of_nodes >= _threshold(of_nodes, node_share)
    nodes[graph.embedding_start :] = True
    kept = normalised(graph.edges * (nodes[:, None] & nodes[None]).to(graph.edges))
    scores = kept * (_through(kept, weights) + weights)[:, None]
    edges = (scores >= _threshold(scores.flatten(), edge_share)) & (scores > 0)
    _drop_loose_ends(graph, nodes, edges)
    order = of_nodes.argsort(descending=True, stable=True)
    cumulative = torch.empty_like(of_nodes)
    cumulative[order] = of_nodes[order].cumsum(0) / of_nodes.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Pruned(nodes, edges, of_nodes, cumulative, node_share, edge_share)


def _threshold(scores: Float64[Tensor, " score"], share: float) -> float:
    """The smallest score that is needed for a share of the sum; never zero, which every score reaches."""
    ordered = scores[scores > 0].sort(descending=True).values
    if not len(ordered):
        return torch.inf
    sums = ordered.cumsum(0)
    index = int(torch.searchsorted(sums, share * sums[-1]))
    return float(ordered[min(index, len(ordered) - 1)])


def _drop_loose_ends(graph: Graph, nodes: Tensor, edges: Tensor) -> None:
    """Take out, in place, features and errors that lead nowhere and features that nothing leads to."""
    while True:
        edges &= nodes[:, None] & nodes[None]
        before = int(nodes.sum())
        nodes[: graph.embedding_start] &= edges[:, : graph.embedding_start].any(0)
        nodes[: graph.n_features] &= edges[: graph.n_features].any(1)
        if int(nodes.sum()) == before:
            return


def scores(graph: Graph) -> Scores:
    """How much of a graph goes through features and not through error terms."""
    matrix, weights = normalised(graph.edges), logit_weights(graph)
    of_nodes = _through(matrix, weights)
    errors = slice(graph.n_features, graph.embedding_start)
    from_errors = float(of_nodes[errors].sum())
    from_tokens = float(of_nodes[graph.embedding_start : graph.logit_start].sum())
    explained = 1.0 - matrix[:, errors].sum(1)
    by_output = of_nodes + weights
    return Scores(
        replacement=from_tokens / (from_tokens + from_errors),
        completeness=float((explained * by_output).sum() / by_output.sum()),
    )


def partial_influence(
    logit_rows: Float[Tensor, "logit column"],
    weights: Float64[Tensor, " logit"],
    rows: Float[Tensor, "row column"],
    visited: Int64[Tensor, " row"],
) -> Float64[Tensor, " column"]:
    """Influence of every source on the logits, where only the visited features' own edges are known.

    Args:
        visited: Column of the feature that each row belongs to.
    """
    of_logits, of_rows = _rows_normalised(logit_rows), _rows_normalised(rows)
    current = weights @ of_logits
    found = current
    for _ in range(len(visited) + 1):
        current = current[visited] @ of_rows
        if not bool(current.any()):
            break
        found = found + current
    return found


def _rows_normalised(rows: Tensor) -> Tensor:
    sizes = rows.detach().cpu().double().abs()
    totals = sizes.sum(1, keepdim=True)
    return sizes / torch.where(totals > 0, totals, 1.0)


def total_effects(graph: Graph) -> Float64[Tensor, "logit node"]:
    """What each node adds to each logit's value, directly and through all features downstream.

    Ablating a feature changes the value by minus this, as long as attention, scales and active features stay.
    """
    edges = graph.edges.detach().cpu().double()
    activations = graph.activations.detach().cpu().double()
    current = edges[graph.logit_start :]
    found = current
    for _ in range(graph.n_nodes):
        current = (current[:, : graph.n_features] / activations) @ edges[: graph.n_features]
        if not bool(current.any()):
            return found
        found = found + current
    raise DataError("the graph has a cycle, and effects do not end; were its edges changed?")
