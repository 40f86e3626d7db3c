"""CLT, PLT and band are one module with another mask; the skip is a linear map; all against float64 loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mdlm_interp.errors import ConfigError, DataError
from transcoder import CrossLayerTranscoder, ReplacementModel, TranscoderConfig
from transcoder.checkpoint import load_clt, save_clt
from transcoder.data import store_normalisation
from transcoder.effects import attribute_features
from transcoder.feature_edits import FeatureEdit

SHAPE = TranscoderConfig(n_layers=3, d_model=32, n_features=24, k=4)

KINDS: dict[str, dict[str, Any]] = {
    "clt": {"connectivity": "clt"},
    "plt": {"connectivity": "plt"},
    "band": {"connectivity": "band", "band": 2},
    "relu": {"activation": "relu", "k": None},
    "jumprelu": {"activation": "jumprelu", "k": None},
    "skip": {"skip": True, "connectivity": "band", "band": 2},
}
WRITES: dict[str, list[tuple[int, ...]]] = {
    "clt": [(0, 1, 2), (1, 2), (2,)],
    "plt": [(0,), (1,), (2,)],
    "band": [(0, 1), (1, 2), (2,)],
}


@pytest.fixture
def make(store):
    """Builds a transcoder of one kind with every parameter drawn."""
    norms = [store_normalisation(store, hooks) for hooks in (SHAPE.input_hooks, SHAPE.output_hooks)]

    def build(kind):
        clt = CrossLayerTranscoder(replace(SHAPE, **KINDS[kind]), *norms, seed=4)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in clt.named_parameters():
                if name[:1] == "b" or name == "W_skip":
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                elif name == "log_threshold":
                    parameter.copy_(-1 + 0.5 * torch.randn(parameter.shape, generator=generator))
        return clt.requires_grad_(False)

    return build


def numbers(tensor):
    return tensor.detach().double().numpy()


def reference(clt, kind, x):
    """Activations and reconstruction in float64, one source, target and row at a time, from the kind's definition."""
    w_dec = [numbers(weight) for weight in clt.W_dec]
    x_in = (numbers(x) - numbers(clt.in_mean)[:, None]) * numbers(clt.in_scale)[:, None, None]
    acts = np.zeros((3, x.shape[1], 24))
    y = np.repeat(numbers(clt.b_dec)[:, None], x.shape[1], 1)
    for source, row in np.ndindex(3, x.shape[1]):
        h = numbers(clt.W_enc)[source] @ x_in[source, row] + numbers(clt.b_enc)[source]
        if kind == "relu":
            kept = h > 0
        elif kind == "jumprelu":
            kept = h > np.exp(numbers(clt.log_threshold)[source])
        else:
            kept = np.isin(np.arange(24), np.argsort(-h, kind="stable")[:4]) & (h > 0)
        acts[source, row] = np.where(kept, h, 0)
        for later, target in enumerate(WRITES.get(kind, WRITES["band" if kind == "skip" else "clt"])[source]):
            y[target, row] += acts[source, row] @ w_dec[source][:, later]
        if kind == "skip":
            y[source, row] += numbers(clt.W_skip)[source] @ x_in[source, row]
    y = y / numbers(clt.out_scale)[:, None, None] + numbers(clt.out_mean)[:, None]
    return torch.from_numpy(acts), torch.from_numpy(y)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_float64_reference(make, kind, rows):
    clt = make(kind)
    acts, y = reference(clt, kind, rows[0])
    # Bounded by float32 rounding of sums over d_model = 32 and at most 72 features; values are of size 1 to 10.
    assert float((clt.encode(rows[0]).double() - acts).abs().max()) < 2e-5
    assert float((clt(rows[0]).double() - y).abs().max()) < 5e-5
    assert int((acts > 0).sum()) > 300


@pytest.mark.parametrize("kind", WRITES)
def test_a_layers_features_write_where_the_mask_says_and_nowhere_else(make, kind, rows):
    clt = make(kind)
    assert [weight.shape[1] for weight in clt.W_dec] == [len(targets) for targets in WRITES[kind]]
    acts = clt.encode(rows[0])
    for source in range(3):
        changed = acts.clone()
        changed[source] *= 2
        before, after = clt.decode(acts), clt.decode(changed)
        moved = tuple(target for target in range(3) if not torch.equal(before[target], after[target]))
        assert moved == WRITES[kind][source]


@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_is_all_at_once(make, kind, rows):
    clt = make(kind)
    acts, y = clt.encode(rows[0]), clt(rows[0])
    for layer in range(3):
        torch.testing.assert_close(clt.encode_layer(rows[0][layer], layer), acts[layer], rtol=0, atol=1e-5)
        found = clt.decode_to(layer, list(acts), rows[0][layer])
        torch.testing.assert_close(found, y[layer], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_take_and_give_raw_activations(make, kind, rows):
    clt = make(kind)
    x, folded = rows[0].double(), clt.folded()
    expected_acts, expected_y = reference(clt, kind, rows[0])
    pre_acts = torch.einsum("lfd,lrd->lrf", folded.W_enc, x) + folded.b_enc[:, None]
    acts = torch.where(expected_acts > 0, pre_acts, 0.0)
    y = folded.b_dec[:, None].repeat(1, x.shape[1], 1)
    for source, weight in enumerate(folded.W_dec):
        y[source : source + weight.shape[1]] += torch.einsum("rf,ftd->trd", acts[source], weight)
    if folded.W_skip is not None:
        y += torch.einsum("loi,lri->lro", folded.W_skip, x)
    torch.testing.assert_close(acts, expected_acts, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-12)
    if kind == "jumprelu":
        assert torch.equal(folded.threshold, clt.log_threshold.double().exp())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_and_loaded_without_changing_a_bit(make, kind, rows, tmp_path):
    clt = make(kind)
    save_clt(clt, tmp_path)
    loaded = load_clt(tmp_path)
    assert loaded.config == clt.config
    assert torch.equal(loaded(rows[0]), clt(rows[0]))


@pytest.mark.parametrize("kind", ["plt", "band", "jumprelu", "skip"])
def test_every_kind_splices_into_the_model_and_error_terms_give_it_back(make, kind, model, ids, sigma):
    replacement = ReplacementModel(model, make(kind), check=False)
    with torch.no_grad():
        original = model(ids, sigma)
        # A replaced layer's input is that of the spliced model, so each layer is compared with decode_to there.
        x, y = replacement.activations(ids, sigma)
        errors = replacement.error_terms(ids, sigma)
        y_hat = replacement.clt(x.flatten(1, 2)).reshape(y.shape)
        torch.testing.assert_close(torch.stack(errors.y_hat), y_hat, rtol=0, atol=5e-5)
        assert torch.equal(replacement(ids, sigma, error_terms=True), original)
        assert not torch.equal(replacement(ids, sigma), original)


@pytest.mark.parametrize("kind", ["plt", "band", "skip"])
def test_an_edit_moves_only_the_outputs_that_the_feature_writes_to(make, kind, model, ids, sigma):
    clt = make(kind)
    replacement = ReplacementModel(model, clt, check=False)
    acts = replacement.feature_acts(ids, sigma)
    feature = int(acts[0].flatten(0, 1).sum(0).argmax())
    names = clt.config.output_hooks
    _, before = model.run_with_cache(ids, [names[0]], timesteps=sigma)
    with replacement.edited([FeatureEdit(0, feature)]):
        _, after = model.run_with_cache(ids, [names[0]], timesteps=sigma)
    expected = before[names[0]] - acts[0][..., feature, None] * clt.decoder_rows(0, feature)[0]
    torch.testing.assert_close(after[names[0]], expected, rtol=0, atol=1e-5)
    found = attribute_features(replacement, ids[:1], 3, 7, sigma[:1], limit=5)
    assert len(found) == 5


def test_a_skip_needs_the_inputs(make, rows):
    clt = make("skip")
    with pytest.raises(
        DataError, match=r"has a skip from input to output; hand the inputs to decode\(\) too"
    ):
        clt.decode(clt.encode(rows[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connectivity": "band"}, "connectivity band needs band, a number of layers; set both or neither"),
        ({"band": 2}, "connectivity clt takes no band, got 2; set both or neither"),
        ({"connectivity": "band", "band": 0}, "band must be at least 1, got 0; leave it out for none"),
        (
            {"connectivity": "band", "band": 3},
            "band must be below the number of layers, got band 3 for 3; lower it, or set connectivity clt, which "
            "writes to all later layers",
        ),
        ({"activation": "relu"}, "activation relu has no k, got 4; set both alike"),
        ({"k": None}, "activation topk needs k, a number of features; set both alike"),
        ({"ste_width": 0.0}, "ste_width must be above 0 and finite, got 0.0; leave it out for 1.0"),
    ],
)
def test_a_shape_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(SHAPE, **changes)
