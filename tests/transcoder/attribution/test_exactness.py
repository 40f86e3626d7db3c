"""Edges against pre-activations, logits and real interventions: the linear part of the network, to float64 rounding."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mdlm_interp.errors import ConfigError, DataError
from tests.transcoder.attribution.conftest import N_LAYERS, transcoder
from transcoder import ReplacementModel
from transcoder.attribution import Targets, ablate, attribute
from transcoder.attribution.graph import CONSTANTS
from transcoder.attribution.linear_pass import FROZEN
from transcoder.feature_edits import FeatureEdit

KINDS: dict[str, dict[str, Any]] = {
    "clt": {},
    "plt": {"connectivity": "plt"},
    "band": {"connectivity": "band", "band": 2},
    "relu": {"activation": "relu", "k": None},
    "jumprelu": {"activation": "jumprelu", "k": None},
    "skip": {"skip": True},
    "plt with skip": {"connectivity": "plt", "skip": True},
    "resid_mid": {"input_hook": "blocks.{layer}.hook_resid_mid"},
    "before the gate": {
        "input_hook": "blocks.{layer}.ln2.hook_normalized",
        "output_hook": "blocks.{layer}.mlp.hook_out",
    },
}
# Sums of a few thousand float64 terms of size 1 to 100, against values of size 0.01 to 100.
RELATIVE = 1e-9


@pytest.fixture(params=KINDS)
def replacement(request, exact_model):
    return ReplacementModel(exact_model, transcoder(**KINDS[request.param]), check=False)


@torch.no_grad()
def pre_activations(replacement, graph, state, noise):
    """Of a graph's features, from a plain pass."""
    _, cache = replacement.model.run_with_cache(state, timesteps=noise)
    hooks = replacement.clt.config.input_hooks
    of_layers = [replacement.clt.pre_acts(cache[hooks[layer]][0], layer) for layer in range(N_LAYERS)]
    return torch.stack(
        [of_layers[layer][position, feature] for layer, position, feature in graph.features.tolist()]
    )


def test_edges_and_constants_add_up_to_each_pre_activation_and_logit(replacement, state, noise):
    graph = attribute(replacement, state, noise)
    expected = pre_activations(replacement, graph, state, noise)
    assert graph.n_features > 100
    totals = graph.edges.sum(1) + graph.constants.sum(1)
    torch.testing.assert_close(totals[: graph.n_features], expected, rtol=RELATIVE, atol=0)
    torch.testing.assert_close(totals[graph.logit_start :], graph.values, rtol=RELATIVE, atol=1e-12)
    assert float(graph.residuals.abs().max()) < 1e-10
    for constant in ("encoder", "adaln", "decoder"):
        assert bool(graph.constants[: graph.n_features, CONSTANTS.index(constant)].any()), constant


def test_the_check_of_sums_sees_one_wrong_source(replacement, state, noise):
    graph = attribute(replacement, state, noise)
    largest = graph.edges[: graph.n_features].abs().amax(0).argmax()
    totals = graph.edges.sum(1) - graph.edges[:, largest] + graph.constants.sum(1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            totals[: graph.n_features],
            pre_activations(replacement, graph, state, noise),
            rtol=RELATIVE,
            atol=0,
        )


@torch.no_grad()
def test_nodes_are_the_active_features_with_their_activations(replacement, state, noise):
    graph = attribute(replacement, state, noise)
    acts = replacement.feature_acts(state, noise)[:, 0]
    assert torch.equal(graph.features, (acts > 0).nonzero())
    torch.testing.assert_close(graph.activations, acts[acts > 0], rtol=RELATIVE, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("centre", ["mean", "log_odds"])
def test_logit_values_are_logits_against_the_mean_or_the_others(exact, state, noise, centre):
    graph = attribute(exact, state, noise, targets=Targets(centre=centre))
    logits = exact.model(state, noise)[0]
    for (position, token), value in zip(graph.logits.tolist(), graph.values.tolist(), strict=True):
        allowed = logits[position, :-1]
        if centre == "mean":
            expected = allowed[token] - allowed.mean()
        else:
            p = allowed.softmax(0)
            others = torch.arange(len(p)) != token
            expected = allowed[token] - (p[others] / p[others].sum() * allowed[others]).sum()
        assert value == pytest.approx(float(expected), rel=1e-9)


def test_log_odds_weights_are_the_derivative_of_the_log_odds(exact, state, noise):
    token, step = 11, 1e-5
    graph = attribute(exact, state, noise, targets=Targets(tokens={5: [token]}))
    direction = torch.randn(
        exact.model.config.vocab_size, generator=torch.Generator().manual_seed(1)
    ).double()

    def log_odds(logits):
        p = logits[:-1].softmax(0)[token]
        return (p / (1 - p)).log()

    from transcoder.attribution.targets import choose

    with torch.no_grad():
        logits = exact.model(state, noise)[0]
    chosen = choose(Targets(tokens={5: [token]}), logits, state[0], exact.model.config.mask_id)
    moved = [log_odds(logits[5] + sign * step * direction) for sign in (1, -1)]
    assert float(chosen.weights[0] @ direction) == pytest.approx(
        float((moved[0] - moved[1]) / (2 * step)), rel=1e-7
    )
    assert float(graph.probabilities[0]) == pytest.approx(float(logits[5, :-1].softmax(0)[token]), rel=1e-12)


@contextmanager
def held(replacement, state, noise):
    """Patterns, scales and MLP outputs as they are on a state."""
    outputs = list(replacement.clt.config.output_hooks)
    _, cache = replacement.model.run_with_cache(state, [*FROZEN, *outputs], timesteps=noise)
    with replacement.model.hooks(dict.fromkeys([*FROZEN, *outputs], lambda tensor, hook: cache[hook.name])):
        yield


@torch.no_grad()
def changes(replacement, graph, state, noise, edit):
    """How an intervention changes the pre-activations, where everything on the way is held."""
    with held(replacement, state, noise):
        before = pre_activations(replacement, graph, state, noise)
        with edit:
            return pre_activations(replacement, graph, state, noise) - before


# A skip answers to what it reads, and a held MLP output does not.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "skip" not in kind])
def test_edges_are_what_taking_a_source_away_does(exact_model, state, noise, kind):
    replacement = ReplacementModel(exact_model, transcoder(**KINDS[kind]), check=False)
    graph = attribute(replacement, state, noise)
    errors = replacement.error_terms(state, noise).values[:, 0]

    def minus(position, vector):
        def edit(tensor, hook):
            tensor[0, position] -= vector

        return edit

    embedding = exact_model.backbone.vocab_embed.embedding[state[0, 3]]
    edits = {graph.embedding_node(3): exact_model.hooks({"hook_embed": minus(3, embedding)})}
    for layer, position in ((0, 5), (1, 2)):
        name = replacement.clt.config.output_hooks[layer]
        hooks = exact_model.hooks({name: minus(position, errors[layer, position])})
        edits[graph.error_node(layer, position)] = hooks
    of_layers = {layer: int((graph.features[:, 0] == layer).nonzero()[9, 0]) for layer in range(N_LAYERS - 1)}
    for node in of_layers.values():
        layer, position, feature = graph.features[node].tolist()
        edits[node] = replacement.edited([FeatureEdit(layer, feature, (position,))])
    for node, edit in edits.items():
        found = changes(replacement, graph, state, noise, edit)
        assert float(found.abs().max()) > 1e-3, graph.name(node)
        # Differences of numbers up to 100.
        torch.testing.assert_close(-found, graph.edges[: graph.n_features, node], rtol=0, atol=1e-11)


def test_direct_effects_on_logits_are_those_of_real_ablations(exact, state, noise, graph):
    found = ablate(exact, graph, limit=60, mode="direct")
    torch.testing.assert_close(found.measured, found.direct, rtol=0, atol=1e-11)
    assert float(found.direct.abs().max()) > 0.1
    assert found.agreement("direct").correlation > 1 - 1e-12


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_changes_rounding_only(exact, state, noise, graph, batch_size):
    found = attribute(exact, state, noise, batch_size=batch_size)
    torch.testing.assert_close(found.edges, graph.edges, rtol=0, atol=1e-11)
    assert torch.equal(found.features, graph.features)


def test_fewer_features_keep_their_edges_and_what_is_left_out_is_a_constant(exact, state, noise, graph):
    some = attribute(exact, state, noise, max_features=40, batch_size=5)
    assert some.n_features == 40
    numbers = [graph.feature_node(*row) for row in some.features.tolist()]
    assert numbers == sorted(numbers)
    nodes = torch.tensor([*numbers, *range(graph.n_features, graph.n_nodes)])
    torch.testing.assert_close(some.edges, graph.edges[nodes][:, nodes], rtol=0, atol=1e-11)
    assert float(some.residuals.abs().max()) < 1e-10
    assert bool(some.constants[:, CONSTANTS.index("left_out")].any())
    assert not bool(graph.constants[:, CONSTANTS.index("left_out")].any())


def test_any_masked_position_has_its_logits_and_no_other(exact, state, noise, graph):
    assert sorted(set(graph.logits[:, 0].tolist())) == [0, 5, 9]
    one = attribute(exact, state, noise, targets=Targets(positions=[0], mass=0.5, max_tokens=3))
    assert set(one.logits[:, 0].tolist()) == {0}
    kept = graph.logits[:, 0] == 0
    assert one.logits.tolist() == graph.logits[kept][: len(one.logits)].tolist()
    # The first position's embedding and errors count like any other's.
    assert float(graph.edges[:, graph.embedding_node(0)].abs().max()) > 0.1
    assert float(graph.edges[:, graph.error_node(0, 0)].abs().max()) > 0.1


def test_tokens_are_the_likeliest_up_to_the_mass(exact, state, noise):
    graph = attribute(exact, state, noise, targets=Targets(positions=[5], mass=0.3, max_tokens=50))
    p = exact.model(state, noise)[0, 5, :-1].softmax(0)
    ranked = p.argsort(descending=True)
    count = int((p[ranked].cumsum(0) < 0.3).sum()) + 1
    assert graph.logits[:, 1].tolist() == ranked[:count].tolist()
    assert graph.probabilities.tolist() == pytest.approx(p[ranked[:count]].tolist(), rel=1e-12)


def test_nothing_is_left_on_the_model(exact, state, noise, listening):
    attribute(exact, state, noise, max_features=3)
    assert listening(exact.model) == 0
    assert all(parameter.grad is None for parameter in exact.model.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"positions": [12]}, r"position must be in \[0, 12\), got 12"),
        ({"positions": [1]}, r"position 1 holds token \d+, and the model predicts masked positions only"),
        ({"positions": []}, "nothing to explain"),
        ({"tokens": {5: [-1]}}, r"token must be in \[0, \d+\), which leaves out the mask, got -1"),
        ({"tokens": {5: [3, 3]}}, "named twice"),
    ],
)
def test_a_target_that_is_none_is_refused(exact, state, noise, targets, message):
    with pytest.raises(DataError, match=message):
        attribute(exact, state, noise, targets=Targets(**targets))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mass": 0.0}, r"mass must be in \(0, 1\], got 0.0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"positions": [1], "tokens": {1: [2]}}, "give one of them"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Targets(**settings)


def test_what_cannot_be_attributed_is_refused(exact, exact_model, state, noise):
    with pytest.raises(DataError, match=r"one sequence, got 2; give input_ids\[i : i \+ 1\]"):
        attribute(exact, state.repeat(2, 1), noise.repeat(2))
    odd = transcoder(output_hook="blocks.{layer}.hook_resid_post")
    with pytest.raises(DataError, match=r"writes .* got blocks\.\{layer\}\.hook_resid_post"):
        attribute(ReplacementModel(exact_model, odd, check=False), state, noise)
    with pytest.raises(ConfigError, match="max_features must be at least 1, got 0"):
        attribute(exact, state, noise, max_features=0)
