"""crosslayer-coding's other forms, which we read but do not write: tied decoders, normalised rows, many biases."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from transcoder.interchange import import_clt

L, D, F = 3, 4, 5


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def place(tmp_path):
    """Writes a config and the tensors that belong to it."""

    def make(tensors, **settings):
        encoders = {f"encoder_module.encoders.{i}.weight": normal(i, F, D) for i in range(L)}
        encoders |= {f"encoder_module.encoders.{i}.bias_param": normal(10 + i, F) for i in range(L)}
        save_file({**encoders, **tensors}, tmp_path / "model.safetensors")
        sizes = {"num_layers": L, "d_model": D, "num_features": F, "activation_fn": "relu"}
        (tmp_path / "cfg.json").write_text(json.dumps({**sizes, **settings}))
        return tmp_path, {name: tensor.double() for name, tensor in {**encoders, **tensors}.items()}

    return make


def features(tensors, x):
    return [
        (
            x[i] @ tensors[f"encoder_module.encoders.{i}.weight"].T
            + tensors[f"encoder_module.encoders.{i}.bias_param"]
        ).relu()
        for i in range(L)
    ]


def untied():
    pairs = [(s, t) for s in range(L) for t in range(s, L)]
    name = "decoder_module.decoders"
    found = {f"{name}.{s}->{t}.weight": normal(100 + 10 * s + t, D, F) for s, t in pairs}
    return found | {f"{name}.{s}->{t}.bias_param": normal(200 + 10 * s + t, D) for s, t in pairs}


def decoded(tensors, acts, t):
    """The sum over sources, each with its own bias."""
    name = "decoder_module.decoders"
    parts = [
        acts[s] @ tensors[f"{name}.{s}->{t}.weight"].T + tensors[f"{name}.{s}->{t}.bias_param"]
        for s in range(t + 1)
    ]
    return torch.stack(parts).sum(0)


def test_the_biases_of_all_pairs_are_added_once_each(place, native):
    path, tensors = place(untied())
    x = normal(5, L, 9, D).double()
    acts = features(tensors, x)
    expected = torch.stack([decoded(tensors, acts, t) for t in range(L)])
    torch.testing.assert_close(native(import_clt(path).clt, x)[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tying", ["per_source", "per_target"])
def test_tied_decoders_with_scales_and_skips(tying, place, native):
    name = "decoder_module"
    tied = {f"{name}.decoders.{i}.weight": normal(20 + i, D, F) for i in range(L)}
    tied |= {f"{name}.decoders.{i}.bias_param": normal(30 + i, D) for i in range(L)}
    tied |= {f"{name}.feature_scale.{i}": normal(40 + i, F) for i in range(L)}
    tied |= {f"{name}.skip_weights.{i}": normal(50 + i, D, D) for i in range(L)}
    path, tensors = place(tied, decoder_tying=tying, skip_connection=True, enable_feature_scale=True)
    x = normal(5, L, 9, D).double()
    acts, expected = features(tensors, x), []
    for t in range(L):
        scaled = [acts[s] * tensors[f"{name}.feature_scale.{t}"] for s in range(t + 1)]
        if tying == "per_target":  # added up first, decoded once
            weight, bias = (tensors[f"{name}.decoders.{t}.{part}"] for part in ("weight", "bias_param"))
            y = torch.stack(scaled).sum(0) @ weight.T + bias
        else:
            y = torch.zeros(9, D, dtype=torch.float64)
            for s, a in enumerate(scaled):
                y += a @ tensors[f"{name}.decoders.{s}.weight"].T + tensors[f"{name}.decoders.{s}.bias_param"]
        expected.append(y + x[t] @ tensors[f"{name}.skip_weights.{t}"].T)
    torch.testing.assert_close(native(import_clt(path).clt, x)[1], torch.stack(expected), rtol=0, atol=1e-5)


def test_a_skip_to_a_later_layer_is_refused(place):
    skips = {
        f"decoder_module.skip_weights.{s}->{t}": torch.zeros(D, D) for s in range(L) for t in range(s, L)
    }
    skips["decoder_module.skip_weights.0->2"][1, 1] = 0.5
    path, _ = place(untied() | skips, skip_connection=True)
    with pytest.raises(Exception, match=r"skip_weights.0->2 in .* maps layer 0's input to layer 2"):
        import_clt(path)


@pytest.mark.parametrize("method", ["mean_std", "sqrt_d_model"])
def test_normalisation_is_folded_in(method, place, native):
    """Raw rows in and raw reconstruction out, where its store normalised both."""
    skips = {
        f"decoder_module.skip_weights.{s}->{t}": torch.zeros(D, D) for s in range(L) for t in range(s, L)
    }
    for t in range(L):
        skips[f"decoder_module.skip_weights.{t}->{t}"] = normal(60 + t, D, D)
    path, tensors = place(untied() | skips, normalization_method=method, skip_connection=True)
    stats = {}
    for layer in range(L):
        sides = {}
        for seed, side in ((70, "inputs"), (80, "targets")):
            mean, std = normal(seed + layer, D), normal(seed + 5 + layer, D).exp()
            sides[side] = {"mean": mean.tolist(), "std": std.tolist()}
        stats[str(layer)] = sides
    (path / "norm_stats.json").write_text(json.dumps(stats))

    def moments(side, kind):
        return torch.tensor([stats[str(layer)][side][kind] for layer in range(L)], dtype=torch.float64)[
            :, None
        ]

    x = normal(5, L, 9, D).double()
    if method == "mean_std":
        inside = (x - moments("inputs", "mean")) / (moments("inputs", "std") + 1e-6)
    else:
        inside = x * math.sqrt(D)
    acts = features(tensors, inside)
    y = torch.stack(
        [
            decoded(tensors, acts, t) + inside[t] @ tensors[f"decoder_module.skip_weights.{t}->{t}"].T
            for t in range(L)
        ]
    )
    if method == "mean_std":
        y = y * (moments("targets", "std") + 1e-6) + moments("targets", "mean")
    else:
        y = y / math.sqrt(D)
    found = import_clt(path)
    assert f"({method}) is folded into the weights" in found.notes[0]
    mine = native(found.clt, x)
    torch.testing.assert_close(mine[0], torch.stack(acts), rtol=0, atol=1e-5)
    torch.testing.assert_close(mine[1], y, rtol=0, atol=2e-5)
    if method == "mean_std":
        stats["1"]["inputs"]["std"][2] = -1.0
        (path / "norm_stats.json").write_text(json.dumps(stats))
        with pytest.raises(Exception, match=r"1.inputs.std in .* must be 4 finite numbers"):
            import_clt(path)
