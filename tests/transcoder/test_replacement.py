"""Splicing, ablating and editing against hooks written by hand."""

import pytest
import torch

from mdlm_interp.errors import DataError
from transcoder import ReplacementModel
from transcoder.feature_edits import FeatureEdit

OUTPUTS = "blocks.*.hook_mlp_out"


@pytest.fixture
def replacement(model, trained):
    return ReplacementModel(model, trained.requires_grad_(False))


def bits(tensor):
    return tensor.detach().view(torch.int32)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [0], [1, 2], []])
def test_with_error_terms_the_logits_are_the_models_own_bit_for_bit(replacement, model, ids, sigma, layers):
    spliced = replacement(ids, sigma, layers=layers, error_terms=True)
    assert torch.equal(bits(spliced), bits(model(ids, sigma)))


@torch.no_grad()
def test_without_error_terms_they_are_not(replacement, model, ids, sigma):
    assert float((replacement(ids, sigma) - model(ids, sigma)).abs().max()) > 0.01


@torch.no_grad()
def test_error_terms_are_what_the_reconstruction_misses(replacement, model, trained, ids, sigma):
    x, y = replacement.activations(ids, sigma)
    expected = y - trained(x.flatten(1, 2)).reshape(y.shape)
    found = replacement.error_terms(ids, sigma).values
    assert found.shape == (3, 2, 24, 32)
    # Bounded by float32 rounding: the outputs are of size 1 to 30.
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[2], [0, 1], None])
def test_replaced_layers_give_the_reconstruction_from_this_same_pass(
    replacement, model, trained, ids, sigma, layers
):
    with replacement.spliced(layers):
        _, cache = model.run_with_cache(ids, timesteps=sigma)
    x = torch.stack([cache["mlp.hook_in", layer].flatten(0, 1) for layer in range(3)])
    y_hat = trained(x)
    for layer in layers or range(3):
        torch.testing.assert_close(
            cache["hook_mlp_out", layer].flatten(0, 1), y_hat[layer], rtol=0, atol=1e-4
        )
    for layer in set(range(3)) - set(layers or range(3)):
        gate = cache["adaln.hook_gate_mlp", layer]
        assert torch.equal(cache["hook_mlp_out", layer], gate * cache["mlp.hook_out", layer])


@torch.no_grad()
def test_a_pass_that_stops_half_way_leaves_nothing_for_the_next(replacement, model, ids, sigma):
    with replacement.spliced():
        expected = model(ids, sigma)
        model(ids.flip(1), sigma, stop_at_block=1)
        assert torch.equal(model(ids, sigma), expected)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
def test_zero_ablation_is_a_hook_that_writes_zero(replacement, model, ids, sigma, layers):
    chosen = range(3) if layers is None else layers
    by_hand = {
        f"blocks.{layer}.hook_mlp_out": lambda tensor, hook: torch.zeros_like(tensor) for layer in chosen
    }
    with model.hooks(by_hand):
        expected = model(ids, sigma)
    with replacement.ablated("zero", layers):
        assert torch.equal(model(ids, sigma), expected)
    assert not torch.equal(model(ids, sigma), expected)


@torch.no_grad()
def test_mean_ablation_is_a_hook_that_writes_the_stores_mean(replacement, model, store, ids, sigma):
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    means = {name: store.read(slice(None), [name])[name].double().mean(0).float() for name in names}
    with model.hooks(
        {name: lambda tensor, hook: means[hook.name].expand_as(tensor).clone() for name in names}
    ):
        expected = model(ids, sigma)
    with replacement.ablated("mean"):
        # The store's statistics and this mean round differently before the cast.
        torch.testing.assert_close(model(ids, sigma), expected, rtol=0, atol=1e-4)


@pytest.fixture
def active(replacement, ids, sigma):
    """A feature of layer 1 active at position 5 of the first sequence, and all activations."""
    acts = replacement.feature_acts(ids, sigma)
    return int(acts[1, 0, 5].argmax()), acts


@torch.no_grad()
def test_ablating_inactive_features_changes_no_bit(replacement, model, active, ids, sigma):
    _, acts = active
    silent = [(layer, int((acts[layer, :, 5].amax(0) == 0).nonzero()[0, 0])) for layer in range(3)]
    with replacement.edited([FeatureEdit(layer, feature, (5,)) for layer, feature in silent]):
        edited = model(ids, sigma)
    assert torch.equal(bits(edited), bits(model(ids, sigma)))


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_an_edit_adds_its_difference_to_this_layer_and_all_later_ones(
    replacement, model, trained, active, ids, sigma, scale
):
    feature, acts = active

    def add(tensor, hook):
        layer = int(hook.name.split(".")[1])
        if layer >= 1:
            row = trained.W_dec[1][feature, layer - 1] / trained.out_scale[layer]
            tensor[:, [5, 9]] += (scale - 1) * acts[1, :, [5, 9], feature, None] * row

    with model.hooks({OUTPUTS: add}):
        expected = model(ids, sigma)
    with replacement.edited([FeatureEdit(1, feature, (5, 9), scale)]):
        found = model(ids, sigma)
    # Activations here and there come from products of different shapes.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((found - model(ids, sigma)).abs().max()) > 1e-3


@torch.no_grad()
def test_edits_of_one_feature_chain_and_a_scale_of_one_changes_nothing(
    replacement, model, active, ids, sigma
):
    feature, _ = active
    twice = [FeatureEdit(1, feature, (5,)), FeatureEdit(1, feature, None)]
    with replacement.edited(twice):
        both = model(ids, sigma)
    with replacement.edited([FeatureEdit(1, feature)]):
        assert torch.equal(both, model(ids, sigma))
    with replacement.edited([FeatureEdit(1, feature, None, 1.0)]):
        assert torch.equal(bits(model(ids, sigma)), bits(model(ids.clone(), sigma)))


@torch.no_grad()
def test_edits_of_two_layers_use_the_activations_of_the_edited_pass(
    replacement, model, trained, active, ids, sigma
):
    feature, acts = active
    later = int(acts[2, 0, 5].argmax())
    with replacement.edited([FeatureEdit(1, feature, None, 5.0)]):
        _, cache = model.run_with_cache(ids, ["blocks.2.mlp.hook_in"], timesteps=sigma)
    changed = trained.encode_layer(cache["mlp.hook_in", 2], 2)[..., later]
    assert not torch.allclose(changed, acts[2, ..., later], atol=1e-3)
    with replacement.edited([FeatureEdit(1, feature, None, 5.0), FeatureEdit(2, later)]):
        _, both = model.run_with_cache(ids, ["blocks.2.hook_mlp_out"], timesteps=sigma)
    with replacement.edited([FeatureEdit(1, feature, None, 5.0)]):
        _, first = model.run_with_cache(ids, ["blocks.2.hook_mlp_out"], timesteps=sigma)
    difference = first["hook_mlp_out", 2] - both["hook_mlp_out", 2]
    expected = changed[..., None] * trained.decoder_rows(2, later)[0]
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-4)


def test_no_hook_is_left_behind(replacement, model, ids, sigma, listening):
    with (
        pytest.raises(RuntimeError, match="stop"),
        replacement.spliced(),
        replacement.edited([FeatureEdit(0, 1)]),
    ):
        raise RuntimeError("stop")
    assert listening(model) == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (FeatureEdit(3, 0), r"layer must be in \[0, 3\), got 3"),
        (FeatureEdit(0, 64), r"feature must be in \[0, 64\), got 64"),
        (FeatureEdit(0, 0, (24,)), r"positions must be in \[0, 24\), got 24"),
    ],
)
def test_an_edit_of_nothing_is_refused(replacement, model, ids, sigma, edit, message):
    with pytest.raises(DataError, match=message), replacement.edited([edit]):
        model(ids, sigma)
