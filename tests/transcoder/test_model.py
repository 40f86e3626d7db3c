"""The transcoder against an independent float64 reference written with loops."""

import numpy as np
import pytest
import torch

from mdlm_interp.errors import ConfigError, DataError
from transcoder import CrossLayerTranscoder, TranscoderConfig
from transcoder.data import store_normalisation
from transcoder.normalisation import normalisation_from_moments


def reference(clt, x):
    """Feature activations and reconstruction in float64: one token, feature and target at a time."""
    w_enc, b_enc = clt.W_enc.detach().double().numpy(), clt.b_enc.detach().double().numpy()
    w_dec, b_dec = [w.detach().double().numpy() for w in clt.W_dec], clt.b_dec.detach().double().numpy()
    in_mean, in_scale = clt.in_mean.double().numpy(), clt.in_scale.double().numpy()
    out_mean, out_scale = clt.out_mean.double().numpy(), clt.out_scale.double().numpy()
    x = x.double().numpy()
    n_layers, n_rows, _ = x.shape
    acts = np.zeros((n_layers, n_rows, clt.config.n_features))
    y = np.zeros_like(x)
    for row in range(n_rows):
        for source in range(n_layers):
            h = w_enc[source] @ ((x[source, row] - in_mean[source]) * in_scale[source]) + b_enc[source]
            for feature in np.argsort(-h, kind="stable")[: clt.config.k]:
                acts[source, row, feature] = max(0.0, h[feature])
        for target in range(n_layers):
            total = b_dec[target].copy()
            for source in range(target + 1):
                for active in np.flatnonzero(acts[source, row]):
                    total += acts[source, row, active] * w_dec[source][active, target - source]
            y[target, row] = total / out_scale[target] + out_mean[target]
    return torch.from_numpy(acts), torch.from_numpy(y)


def test_forward_equals_the_float64_reference(clt, rows):
    clt.requires_grad_(False)
    acts, y = reference(clt, rows[0])
    # Bounded by float32 rounding of sums over d_model = 32; the values are of size 1 to 10.
    assert float((clt.encode(rows[0]).double() - acts).abs().max()) < 2e-5
    assert float((clt(rows[0]).double() - y).abs().max()) < 2e-5
    assert float(y.std()) > 0.05


def test_the_reference_would_notice_a_decoder_that_writes_backwards(clt, rows):
    """The neighbour that fails: the same weights with the order of targets turned around."""
    clt.requires_grad_(False)
    for weight in clt.W_dec:
        weight.copy_(weight.flip(1))
    flipped = clt(rows[0]).double()
    for weight in clt.W_dec:
        weight.copy_(weight.flip(1))
    assert float((flipped - reference(clt, rows[0])[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("source", range(3))
def test_a_layer_writes_to_itself_and_to_later_layers_only(clt, rows, source):
    acts = clt.encode(rows[0])
    changed = acts.clone()
    changed[source] *= 2
    before, after = clt.decode(acts), clt.decode(changed)
    for target in range(3):
        assert torch.equal(before[target], after[target]) == (target < source)


def test_decoders_are_source_major(clt):
    assert [tuple(weight.shape) for weight in clt.W_dec] == [(24, 3, 32), (24, 2, 32), (24, 1, 32)]
    assert [name for name in clt.state_dict() if "dec" in name] == ["b_dec", "W_dec.0", "W_dec.1", "W_dec.2"]


def test_layer_by_layer_is_all_at_once(clt, rows):
    acts = clt.encode(rows[0])
    y = clt(rows[0])
    for layer in range(3):
        torch.testing.assert_close(clt.encode_layer(rows[0][layer], layer), acts[layer], rtol=0, atol=1e-5)
        torch.testing.assert_close(clt.decode_to(layer, list(acts)), y[layer], rtol=0, atol=1e-5)


def test_a_row_of_the_decoder_is_what_one_unit_of_a_feature_adds(clt, rows):
    acts = clt.encode(rows[0]).double()
    clt.double()
    more = acts.clone()
    more[1, :, 7] += 1
    difference = (clt.decode(more) - clt.decode(acts))[1:]
    expected = clt.decoder_rows(1, 7)[:, None].expand_as(difference)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-12)


def test_folded_weights_take_and_give_raw_activations(clt, rows):
    x, folded = rows[0].double(), clt.folded()
    pre_acts = torch.einsum("lfd,lrd->lrf", folded.W_enc, x) + folded.b_enc[:, None]
    acts = torch.where(clt.encode(rows[0]) > 0, pre_acts, 0.0)
    y = folded.b_dec[:, None].repeat(1, x.shape[1], 1)
    for source, weight in enumerate(folded.W_dec):
        y[source:] += torch.einsum("rf,ftd->trd", acts[source], weight)
    exact_acts, exact_y = reference(clt, rows[0])
    # Folding is done in float64; what is left is the rounding of a few float64 sums.
    torch.testing.assert_close(acts, exact_acts, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, exact_y, rtol=0, atol=1e-12)


def test_normalised_activations_of_the_store_have_mean_zero_and_mean_square_one(store):
    for name in ("blocks.1.mlp.hook_in", "blocks.2.hook_mlp_out"):
        norm = store_normalisation(store, [name])
        x = (store.read(slice(None), [name])[name].double() - norm.mean) * norm.scale
        assert float(x.mean(0).abs().max()) < 1e-12
        assert float(x.square().mean()) == pytest.approx(1.0, abs=1e-12)


def test_an_activation_that_does_not_vary_is_an_error():
    constant = (torch.full((4,), 0.5, dtype=torch.float64), 0.25)
    with pytest.raises(
        DataError, match=r"blocks.0.hook_mlp_out has variance 0 over the store.*gates still zero"
    ):
        normalisation_from_moments([constant], ["blocks.0.hook_mlp_out"])


def test_initial_weights_are_a_function_of_the_seed_within_the_documented_bounds(clt):
    config = clt.config
    clt.requires_grad_(False)
    again, other = CrossLayerTranscoder(config, seed=4), CrossLayerTranscoder(config, seed=5)
    for name, parameter in clt.named_parameters():
        if name.startswith("W_"):
            assert torch.equal(parameter, dict(again.named_parameters())[name])
            assert not torch.equal(parameter, dict(other.named_parameters())[name])
            bound = {"W_enc": 32**-0.5}.get(name, (3 * 32) ** -0.5)
            assert 0.98 * bound < float(parameter.abs().max()) <= bound
    assert not again.b_enc.any()
    assert not again.b_dec.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 25}, "k must be at most n_features, got k 25 and n_features 24"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        (
            {"input_hook": "blocks.0.mlp.hook_in"},
            r"input_hook must be a hook point with \{layer\} for the block's number, got blocks.0.mlp.hook_in; leave",
        ),
    ],
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TranscoderConfig(**({"n_layers": 3, "d_model": 32, "n_features": 24, "k": 4} | changes))
