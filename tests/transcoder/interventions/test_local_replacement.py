"""Frozen parts and the local replacement model: identity with error terms, natively and under the oracle."""

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import DataError
from oracle import Oracle
from transcoder import ReplacementModel
from transcoder.interventions import (
    FROZEN,
    Ablate,
    LocalReplacement,
    Patch,
    Scale,
    Set,
    Spliced,
    Steer,
    frozen,
    interventions,
)
from transcoder.interventions.frozen import PATTERNS, SCALES

CHOICES = [{"patterns": a, "scales": b} for a in (True, False) for b in (True, False)]


def bits(tensor):
    return tensor.detach().view(torch.int32)


@pytest.fixture
def exact(model, trained):
    """Model and transcoder under the oracle's arithmetic."""
    return ReplacementModel(Oracle(model).model, trained.requires_grad_(False))


@torch.no_grad()
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layers", [None, [1]])
def test_with_error_terms_it_is_the_oracles_model_bit_for_bit(exact, model, ids, sigma, choice, layers):
    local = LocalReplacement(exact, ids, sigma, layers=layers, **choice)
    assert torch.equal(bits(local()), bits(Oracle(model).logits(ids, sigma)))


@torch.no_grad()
def test_interventions_under_the_oracle_are_hooks_of_the_oracle(exact, model, ids, sigma):
    oracle, x, noise = Oracle(model), ids[:1, :8], sigma[:1]

    def hand(tensor, hook):
        tensor[:, 3, 1] = 0

    with oracle.hooks({"blocks.1.attn.hook_z": hand, "blocks.2.hook_mlp_out": lambda t, h: 0 * t}):
        expected = oracle.logits(x, noise)
    edits = [Ablate(head=(1, 1), positions=3), Ablate(hook="blocks.2.hook_mlp_out")]
    compared = interventions(exact, edits).compare(x, noise)
    assert torch.equal(bits(compared.logits_after), bits(expected))
    assert torch.equal(bits(compared.logits_before), bits(oracle.logits(x, noise)))


@torch.no_grad()
@pytest.mark.parametrize("choice", CHOICES)
def test_with_error_terms_it_is_the_model_bit_for_bit_natively(replacement, model, ids, sigma, choice):
    local = LocalReplacement(replacement, ids, sigma, **choice)
    watched = PATTERNS if choice["patterns"] else ["hook_embed"]
    own, _ = model.run_with_cache(ids, watched, timesteps=sigma)
    assert torch.equal(bits(local()), bits(own))
    assert torch.equal(bits(local.logits), bits(own))
    # The fused kernel, which listening to patterns turns off, rounds otherwise.
    torch.testing.assert_close(local(), model(ids, sigma), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_on_the_bundled_model_at_any_masked_state(beside, bundled, state, t):
    n_masks = round(t * state.shape[1])
    x = state.clone()
    x[0, torch.randperm(state.shape[1], generator=torch.Generator().manual_seed(1))[:n_masks]] = (
        bundled.config.mask_id
    )
    own, _ = bundled.run_with_cache(x, PATTERNS)
    assert torch.equal(bits(LocalReplacement(beside, x)()), bits(own))


@torch.no_grad()
def test_without_error_terms_it_is_not_the_model(replacement, ids, sigma):
    local = LocalReplacement(replacement, ids, sigma, error_terms=False)
    assert float((local() - local.logits).abs().max()) > 0.01


@torch.no_grad()
def test_without_error_terms_and_nothing_frozen_it_is_the_replacement_model(replacement, ids, sigma):
    local = LocalReplacement(replacement, ids, sigma, error_terms=False, patterns=False, scales=False)
    assert torch.equal(local(), replacement(ids, sigma))
    assert torch.equal(interventions(Spliced(replacement), [])(ids, sigma), replacement(ids, sigma))
    some = interventions(Spliced(replacement, layers=[2]), [])(ids, sigma)
    assert torch.equal(some, replacement(ids, sigma, layers=[2]))


@pytest.fixture(scope="module")
def doubles(model_directory):
    return HookedMDLM.from_pretrained(model_directory, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("held", [{}, {"patterns": False}, {"scales": False}])
def test_with_all_frozen_the_model_is_linear_in_what_is_added(doubles, ids, sigma, held):
    names = [*FROZEN, "blocks.*.hook_mlp_out"]
    _, run = doubles.run_with_cache(ids, names, timesteps=sigma.double())
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def logits(amount):
        edits = [
            Patch(run, hook="blocks.*.hook_mlp_out"),
            Steer(amount * vector, hook="hook_embed", positions=[2, 7]),
        ]
        with frozen(doubles, run, **held):
            return interventions(doubles, edits)(ids, sigma.double())

    base = logits(0.0)
    curvature = (logits(2.0) - base) - 2 * (logits(1.0) - base)
    size = float((logits(1.0) - base).abs().max())
    assert size > 0.1
    if held:  # the neighbour that fails
        assert float(curvature.abs().max()) > 1e-3 * size
    else:
        assert float(curvature.abs().max()) < 1e-11 * size


@torch.no_grad()
def test_frozen_parts_are_those_of_the_run_in_another_state(model, ids, sigma):
    _, run = model.run_with_cache(ids, FROZEN, timesteps=sigma)
    with frozen(model, run):
        _, found = model.run_with_cache(ids.flip(1), FROZEN, timesteps=sigma)
    _, free = model.run_with_cache(ids.flip(1), FROZEN, timesteps=sigma)
    assert list(found) == list(run)
    for name in run:
        assert torch.equal(found[name], run[name])
        assert not torch.equal(free[name], run[name])


def test_a_frozen_scale_has_no_gradient_and_the_same_value(doubles, ids, sigma):
    name = "blocks.1.hook_resid_pre"
    # The same bits as below, so that nothing but the gradient says whether the scale was replaced.
    _, run = doubles.run_with_cache(ids, SCALES, timesteps=sigma.double())

    def slope(context):
        added = torch.zeros(2, 24, 32, dtype=torch.float64, requires_grad=True)
        with context, doubles.hooks({name: lambda t, h: t + added}):
            logits = doubles(ids, sigma.double())
        return torch.autograd.grad(logits[0, 3, 5], added)[0], logits

    held, logits = slope(frozen(doubles, run, patterns=False))
    free, own = slope(doubles.hooks({"hook_embed": lambda t, h: None}))
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-10)
    assert float((held - free).abs().max()) > 1e-3


@torch.no_grad()
def test_edits_in_a_local_model_reach_later_features_only_through_what_is_free(
    replacement, active, ids, sigma
):
    local = LocalReplacement(replacement, ids, sigma)
    compared = interventions(local, [Scale(4.0, feature=(1, active))]).compare(ids, sigma)
    assert torch.equal(compared.logits_before, local.logits)
    # Frozen, spliced and edited by hand, in the order in which contexts are entered.
    from transcoder.feature_edits import FeatureEdit

    with (
        frozen(replacement.model, local.run),
        replacement.spliced(None, local.errors),
        replacement.edited([FeatureEdit(1, active, None, 4.0)]),
    ):
        expected = replacement.model(ids, sigma)
    assert torch.equal(compared.logits_after, expected)
    assert not torch.equal(compared.logits_after, compared.logits_before)


@torch.no_grad()
def test_the_splice_reads_what_edits_leave_and_a_set_output_stands(replacement, ids, sigma):
    free = Spliced(replacement)
    steer = Steer(0.5, hook="blocks.1.mlp.hook_in")
    with replacement.model.hooks({"blocks.1.mlp.hook_in": lambda t, h: t + 0.5}), replacement.spliced():
        expected = replacement.model(ids, sigma)
    assert torch.equal(interventions(free, [steer])(ids, sigma), expected)
    with interventions(free, [Set(0.5, hook="blocks.2.hook_mlp_out")]):
        _, cache = replacement.model.run_with_cache(ids, ["blocks.2.hook_mlp_out"], timesteps=sigma)
    assert bool((cache["hook_mlp_out", 2] == 0.5).all())


@torch.no_grad()
def test_one_state_serves_a_batch_of_it_and_no_other(replacement, ids, sigma):
    local = LocalReplacement(replacement, ids[:1], sigma[:1])
    edits = [Ablate(feature=(0, feature), positions=5) for feature in range(3)]
    batch = interventions(local, edits)(ids[:1].expand(4, -1), sigma[:1].expand(4))
    one = interventions(local, edits)(ids[:1], sigma[:1])
    torch.testing.assert_close(batch, one.expand_as(batch), rtol=0, atol=1e-4)
    for x in (ids, ids[:1].flip(1), ids[:1, :20]):
        with pytest.raises(DataError, match="of one masked state, got other tokens"):
            interventions(local, [])(x, sigma[: len(x)])


@torch.no_grad()
def test_a_run_that_does_not_fit_is_refused(model, ids, sigma):
    _, part = model.run_with_cache(ids, PATTERNS, timesteps=sigma)
    with (
        pytest.raises(DataError, match=r"kept no 'blocks.0.ln1.hook_scale'; keep it with"),
        frozen(model, part),
    ):
        model(ids, sigma)
    with (
        pytest.raises(
            DataError, match=r"frozen blocks.0.attn.hook_pattern has shape \[2, 2, 24, 24\], this pass"
        ),
        frozen(model, part, scales=False),
    ):
        model(ids[:, :20], sigma)
