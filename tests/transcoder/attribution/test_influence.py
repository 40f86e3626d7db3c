"""Influence, pruning, scores and total effects against matrix inverses and numbers worked out by hand."""

from itertools import pairwise

import pytest
import torch

from mdlm_interp.errors import ConfigError, DataError
from transcoder.attribution import Graph, prune, scores
from transcoder.attribution.building import attribute
from transcoder.attribution.graph import CONSTANTS
from transcoder.attribution.influence import (
    influence,
    logit_weights,
    normalised,
    partial_influence,
    total_effects,
)


def tiny(edges, probabilities=(1.0,)):
    """Two positions, one layer, features in it as many as the edges leave; the logits are at position 1."""
    n_logits = len(probabilities)
    n_features = len(edges) - 4 - n_logits
    return Graph(
        input_ids=torch.tensor([3, 5]),
        mask_id=5,
        sigma=0.1,
        n_layers=1,
        features=torch.tensor([[0, 1, number] for number in range(n_features)]),
        activations=torch.full((n_features,), 2.0, dtype=torch.float64),
        logits=torch.tensor([[1, token] for token in range(n_logits)]),
        probabilities=torch.tensor(probabilities, dtype=torch.float64),
        values=torch.zeros(n_logits, dtype=torch.float64),
        edges=edges,
        constants=torch.zeros(len(edges), len(CONSTANTS), dtype=torch.float64),
        centre="mean",
    )


@pytest.fixture
def by_hand():
    """Nodes: features 0 and 1, errors 2 and 3, embeddings 4 and 5, logit 6."""
    edges = torch.zeros(7, 7, dtype=torch.float64)
    edges[0, 4], edges[0, 5] = 3.0, -1.0
    edges[1, 5] = 2.0
    edges[6, 0], edges[6, 1], edges[6, 3], edges[6, 5] = 5.0, -2.0, 2.0, 1.0
    return tiny(edges)


def test_influence_is_the_product_of_shares_along_paths_worked_out_by_hand(by_hand):
    # The logit's shares: 0.5, 0.2, error 0.2, embedding 0.1; feature 0 is three quarters of embedding 4.
    expected = [0.5, 0.2, 0.0, 0.2, 0.5 * 0.75, 0.1 + 0.5 * 0.25 + 0.2, 0.0]
    assert influence(by_hand).tolist() == pytest.approx(expected, abs=1e-15)


def test_scores_worked_out_by_hand(by_hand):
    found = scores(by_hand)
    assert found.replacement == pytest.approx(0.8 / 1.0)
    # Output influence: logit 1, features 0.7, and what has no input counts as explained: 0.2 + 0.375 + 0.425.
    assert found.completeness == pytest.approx((0.8 * 1 + 0.7 + 1.0) / 2.7)


def test_pruning_by_hand(by_hand):
    # Influence from the largest: 0.5, 0.425, 0.375, 0.2 and 0.2 of 1.7; half of it needs the first two.
    kept = prune(by_hand, 0.5, 1.0)
    assert kept.nodes.tolist() == [True, False, False, False, True, True, True]
    assert sorted(map(tuple, kept.edges.nonzero().tolist())) == [(0, 4), (0, 5), (6, 0), (6, 5)]
    assert kept.cumulative.tolist() == pytest.approx(
        [0.5 / 1.7, 1.5 / 1.7, 1, 1, 1.3 / 1.7, 0.925 / 1.7, 1], abs=1e-12
    )


def test_a_feature_without_an_edge_in_or_out_goes_with_its_edges(by_hand):
    edges = by_hand.edges.clone()
    edges[0] = 0.0  # nothing leads to feature 0 any more
    kept = prune(tiny(edges), 1.0, 1.0)
    assert kept.nodes.tolist() == [False, True, False, True, True, True, True]
    assert not bool(kept.edges[:, 0].any())
    edges[6, 1] = 0.0  # and feature 1 leads nowhere
    kept = prune(tiny(edges), 1.0, 1.0)
    assert kept.nodes[:2].tolist() == [False, False]
    assert not bool(kept.edges[1].any())


def test_total_effects_by_hand(by_hand):
    # Embedding 5: 1 directly, -1 / 2 of feature 0's 5, 2 / 2 of feature 1's -2.
    expected = [5.0, -2.0, 0.0, 2.0, 7.5, 1 - 2.5 - 2.0, 0.0]
    assert total_effects(by_hand)[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_influence_and_total_effects_are_the_series_that_the_inverses_sum(graph):
    eye = torch.eye(graph.n_nodes, dtype=torch.float64)
    weights = logit_weights(graph)
    expected = weights @ (torch.linalg.inv(eye - normalised(graph.edges)) - eye)
    torch.testing.assert_close(influence(graph), expected, rtol=0, atol=1e-10)
    passed_on = graph.edges.clone()
    passed_on[: graph.n_features] /= graph.activations[:, None]
    expected = graph.edges[graph.logit_start :] @ torch.linalg.inv(eye - passed_on)
    torch.testing.assert_close(total_effects(graph), expected, rtol=0, atol=1e-8)


def test_scores_are_their_definition_by_inverses(graph):
    eye = torch.eye(graph.n_nodes, dtype=torch.float64)
    matrix, weights = normalised(graph.edges), logit_weights(graph)
    of_nodes = weights @ (torch.linalg.inv(eye - matrix) - eye)
    errors = torch.zeros(graph.n_nodes, dtype=torch.bool)
    errors[graph.n_features : graph.embedding_start] = True
    tokens = of_nodes[graph.embedding_start : graph.logit_start].sum()
    found = scores(graph)
    assert found.replacement == pytest.approx(float(tokens / (tokens + of_nodes[errors].sum())), abs=1e-10)
    explained = 1 - matrix[:, errors].sum(1)
    average = ((of_nodes + weights) * explained).sum() / (of_nodes + weights).sum()
    assert found.completeness == pytest.approx(float(average), abs=1e-10)
    assert 0 < found.replacement < 1


def test_what_begins_in_embeddings_and_errors_is_all_of_it(graph):
    leaves = influence(graph)[graph.n_features : graph.logit_start].sum()
    assert float(leaves) == pytest.approx(float(graph.probabilities.sum()), rel=1e-12)


def test_more_of_the_influence_keeps_more(graph):
    kept = [prune(graph, share, 0.98) for share in (0.3, 0.6, 0.9)]
    counts = [int(one.nodes.sum()) for one in kept]
    assert counts == sorted(set(counts))
    for smaller, larger in pairwise(kept):
        assert not bool((smaller.nodes & ~larger.nodes).any())
    everything = prune(graph, 1.0, 1.0)
    has_path = influence(graph) > 0
    assert torch.equal(everything.nodes[: graph.n_features], has_path[: graph.n_features])


def test_kept_edges_join_kept_nodes_and_every_kept_feature_has_both_ends(graph):
    kept = prune(graph, 0.7, 0.9)
    targets, sources = kept.edges.nonzero().unbind(1)
    assert bool(kept.nodes[targets].all())
    assert bool(kept.nodes[sources].all())
    assert bool((graph.edges[kept.edges] != 0).all())
    features = kept.nodes[: graph.n_features].nonzero()[:, 0]
    assert set(features.tolist()) <= set(targets.tolist()) & set(sources.tolist())
    assert bool(kept.nodes[graph.embedding_start :].all())


def test_influence_through_all_features_is_the_influence(graph):
    rows = graph.edges[: graph.n_features, : graph.logit_start]
    logit_rows = graph.edges[graph.logit_start :, : graph.logit_start]
    found = partial_influence(logit_rows, graph.probabilities, rows, torch.arange(graph.n_features))
    torch.testing.assert_close(found, influence(graph)[: graph.logit_start], rtol=0, atol=1e-12)
    shuffled = torch.randperm(graph.n_features)
    again = partial_influence(logit_rows, graph.probabilities, rows[shuffled], shuffled)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-12)
    few = partial_influence(logit_rows, graph.probabilities, rows[:10], torch.arange(10))
    assert float(few.sum()) < float(found.sum())


def test_the_features_that_are_kept_are_the_influential_ones(exact, state, noise, graph):
    some = attribute(exact, state, noise, max_features=40, batch_size=5)
    of_all = influence(graph)
    kept = [graph.feature_node(*row) for row in some.features.tolist()]
    best = of_all[: graph.n_features].sort(descending=True).values[:40].sum()
    # Ranked while half the rows are unknown: not exactly the best forty.
    assert float(of_all[kept].sum()) > 0.9 * float(best)
    assert float(of_all[:40].sum()) < 0.9 * float(best)  # the neighbour: the first forty


def test_what_cannot_be_pruned_is_refused(by_hand):
    with pytest.raises(ConfigError, match=r"node_share must be in \[0, 1\], got 1.5"):
        prune(by_hand, 1.5)
    with pytest.raises(ConfigError, match=r"edge_share must be in \[0, 1\], got -1.0"):
        prune(by_hand, 0.5, -1.0)
    edges = by_hand.edges.clone()
    edges[1, 0], edges[0, 1] = 1.0, 1.0
    for what in (prune, total_effects):
        with pytest.raises(DataError, match="the graph has a cycle"):
            what(tiny(edges))
    with pytest.raises(DataError, match="no chosen token has any probability"):
        prune(tiny(by_hand.edges, (0.0,)))
