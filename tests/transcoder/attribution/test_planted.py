"""Graphs of a model whose circuit was written by hand."""

import pytest
import torch

from tests.transcoder.attribution import planted
from transcoder import ReplacementModel
from transcoder.attribution import Targets, ablate, attribute, prune, scores

NODES = {"f0": planted.F0, "f1": planted.F1, "g0": planted.G0, "g1": planted.G1, "h": planted.H}
TOKENS = {"A": 0, "B": 2, "mask": planted.POSITION}


@pytest.fixture(scope="module")
def model():
    return planted.planted_model()


@pytest.fixture(params=["plt", "clt"])
def connectivity(request):
    return request.param


@pytest.fixture
def replacement(model, connectivity):
    return ReplacementModel(model, planted.transcoder_of(connectivity))


@pytest.fixture
def graph(replacement):
    targets = Targets(tokens={planted.POSITION: [planted.C, planted.D]}, centre="mean")
    return attribute(replacement, torch.tensor([planted.STATE]), targets=targets)


def node_of(graph, name):
    if name in TOKENS:
        return graph.embedding_node(TOKENS[name])
    layer, feature = NODES[name]
    return graph.feature_node(layer, planted.POSITION, feature)


@torch.no_grad()
def test_the_transcoder_misses_nothing(replacement):
    errors = replacement.error_terms(torch.tensor([planted.STATE])).values
    assert float(errors.abs().max()) < 1e-14


def test_the_nodes_are_the_planted_features_at_the_mask(graph, connectivity):
    names = [name for name in NODES if (name, connectivity) != ("g0", "clt")]
    expected = sorted((NODES[name][0], planted.POSITION, NODES[name][1]) for name in names)
    assert [tuple(row) for row in graph.features.tolist()] == expected
    for name in ("f0", "f1", "g1"):
        assert float(graph.activations[node_of(graph, name)]) == pytest.approx(
            planted.activation(name), rel=1e-12
        )


def test_the_edges_are_the_planted_ones_with_their_weights_and_no_other(graph, connectivity):
    expected = torch.zeros_like(graph.edges)
    for (source, target), weight in planted.true_edges(connectivity).items():
        expected[node_of(graph, target), node_of(graph, source)] = weight
    # The final scale, what is written, and the token's weight against the mean of the five that are not the mask.
    final = planted.norm_scales()[-1] * planted.WRITES
    for source, direct in (("h", planted.C), ("g1", planted.D)):
        node = node_of(graph, source)
        for number, (_, token) in enumerate(graph.logits.tolist()):
            weight = (1.0 if token == direct else 0.0) - 1 / planted.MASK
            expected[graph.logit_start + number, node] = weight * final * float(graph.activations[node])
    torch.testing.assert_close(graph.edges, expected, rtol=1e-12, atol=1e-12)


def test_a_cross_layer_transcoder_shows_two_hops_as_one(model):
    state = torch.tensor([planted.STATE])
    paths = {}
    for connectivity in ("plt", "clt"):
        graph = attribute(ReplacementModel(model, planted.transcoder_of(connectivity)), state)
        paths[connectivity] = float(graph.edges[node_of(graph, "h"), node_of(graph, "f0")])
    assert paths["plt"] == 0.0
    assert paths["clt"] == pytest.approx(planted.true_edges("clt")["f0", "h"], rel=1e-12)


def test_everything_is_explained(graph):
    found = scores(graph)
    assert found.replacement == pytest.approx(1.0, abs=1e-12)
    assert found.completeness == pytest.approx(1.0, abs=1e-12)


def test_pruning_keeps_the_circuit(graph, connectivity):
    kept = prune(graph, 1.0, 1.0)
    named = {node_of(graph, name) for name in (*TOKENS, *NODES) if (name, connectivity) != ("g0", "clt")}
    logits = set(range(graph.logit_start, graph.n_nodes))
    fillers = {graph.embedding_node(position) for position in (1, 4)}
    assert set(kept.nodes.nonzero()[:, 0].tolist()) == named | logits | fillers
    assert {(s, t) for t, s in kept.edges.nonzero().tolist()} == {
        (s, t) for t, s in (graph.edges.abs() > 1e-12).nonzero().tolist()
    }


def test_total_effects_are_what_ablation_does_with_attention_and_norms_held(replacement, graph, connectivity):
    found = ablate(replacement, graph, mode="local")
    # Without g0, h has a negative input and falls silent: no effect that is linear in it.
    linear = [
        column
        for column, node in enumerate(found.nodes.tolist())
        if connectivity == "clt" or node != node_of(graph, "g0")
    ]
    torch.testing.assert_close(found.measured[:, linear], found.total[:, linear], rtol=0, atol=1e-12)
    assert float((found.direct - found.total)[:, linear].abs().max()) > 0.1


@pytest.mark.parametrize("mode", ["spliced", "model"])
@pytest.mark.parametrize(("centre", "same_sign"), [("log_odds", 1.0), ("mean", 0.8)])
def test_predicted_effects_have_the_sign_and_order_of_real_ablations(replacement, mode, centre, same_sign):
    targets = Targets(tokens={planted.POSITION: [planted.C, planted.D]}, centre=centre)
    graph = attribute(replacement, torch.tensor([planted.STATE]), targets=targets)
    ablations = ablate(replacement, graph, mode=mode)
    found = ablations.agreement("total")
    # An ablation changes the last norm's scale, and so all logits alike: a small effect on C or D against the mean
    # of tokens that are nowhere near may change its sign by it, one on the odds of C against D does not.
    assert found.same_sign >= same_sign
    assert found.correlation > 0.9
    direct = ablations.agreement("direct")
    assert direct.correlation < found.correlation  # the neighbour that leaves out the features downstream


def test_in_the_model_itself_a_relayed_feature_is_taken_away_twice(model):
    """f0's writing to layer 1 stands for what the MLP there makes of f0; ablated in the model, both go."""
    replacement = ReplacementModel(model, planted.transcoder_of("clt"))
    targets = Targets(tokens={planted.POSITION: [planted.C]}, centre="mean")
    graph = attribute(replacement, torch.tensor([planted.STATE]), targets=targets)
    f0 = [node_of(graph, "f0")]
    once, twice = (ablate(replacement, graph, f0, mode=mode).measured.item() for mode in ("spliced", "model"))
    assert twice < 1.2 * once < 0
