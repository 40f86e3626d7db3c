"""What a graph predicts, against ablations in the model, on a trained transcoder."""

import numpy as np
import pytest
import torch

from mdlm_interp.errors import DataError
from transcoder.attribution import Targets, ablate, attribute
from transcoder.attribution.ablations import Ablations, state_of
from transcoder.feature_edits import FeatureEdit


def test_predictions_agree_with_ablations_in_the_model(exact, graph):
    found = ablate(exact, graph, limit=60)
    fit = found.agreement("total")
    assert fit.count == 60 * len(graph.logits)
    assert fit.correlation > 0.8
    assert fit.same_sign > 0.75
    shuffled = Ablations(found.mode, found.nodes, found.direct, found.total.roll(1, 1), found.measured)
    assert shuffled.agreement("total").correlation < 0.5  # the neighbour that fails


def test_less_held_is_less_like_the_graph(exact, graph):
    fits = [ablate(exact, graph, limit=40, mode=mode).agreement("total") for mode in ("local", "spliced")]
    assert fits[0].correlation > fits[1].correlation > 0.8


@torch.no_grad()
def test_measured_changes_are_ablations_by_hand(exact, state, noise):
    token = 11
    graph = attribute(exact, state, noise, targets=Targets(tokens={5: [token]}, centre="mean"))
    found = ablate(exact, graph, [4, 30])

    def value(edits):
        with exact.edited(edits):
            logits = exact.model(state, noise)[0, 5, :-1]
        return float(logits[token] - logits.mean())

    for node, change in zip((4, 30), found.measured[0].tolist(), strict=True):
        layer, position, feature = graph.features[node].tolist()
        expected = value([FeatureEdit(layer, feature, (position,))]) - value([])
        assert change == pytest.approx(expected, abs=1e-12)
    assert found.direct[0].tolist() == (-graph.edges[graph.logit_start, [4, 30]]).tolist()


def test_agreement_is_pearsons_and_the_share_of_equal_signs():
    x, y = torch.tensor([[1.0, -2.0, 0.0, 3.0]]).double(), torch.tensor([[2.0, 1.0, 5.0, 4.0]]).double()
    found = Ablations("model", torch.arange(4), x, x, y).agreement()
    assert found.correlation == pytest.approx(np.corrcoef(x[0], y[0])[0, 1])
    assert found.same_sign == pytest.approx(2 / 3)
    flat = Ablations("model", torch.arange(4), x, torch.zeros_like(x), y).agreement()
    assert np.isnan(flat.correlation)
    assert np.isnan(flat.same_sign)


def test_no_hook_is_left_behind(exact, graph, listening):
    for mode in ("direct", "local", "spliced", "model"):
        ablate(exact, graph, [0], mode=mode)
    assert listening(exact.model) == 0


def test_what_cannot_be_ablated_is_refused(exact, graph):
    with pytest.raises(DataError, match="only features can be ablated, got error of layer 0 at 0"):
        ablate(exact, graph, [graph.error_node(0, 0)])
    with pytest.raises(DataError, match=r"node must be in \[0, \d+\), got -1"):
        ablate(exact, graph, [-1])
    silent = next(n for n in range(64) if [2, 0, n] not in graph.features.tolist())
    with pytest.raises(DataError, match=f"feature {silent} of layer 2 is no node at position 0"):
        graph.feature_node(2, 0, silent)


def test_a_graph_of_another_model_is_refused(exact, graph):
    from dataclasses import replace

    other = replace(graph, mask_id=graph.mask_id + 1)
    with pytest.raises(DataError, match="give the model that the graph was made with"):
        state_of(other, exact)
