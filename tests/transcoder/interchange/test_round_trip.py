"""Other tools compute from our files what we compute, and what comes back is what went out."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mdlm_interp.errors import CheckpointError, DataError
from transcoder.config import TranscoderConfig
from transcoder.interchange import export_clt, import_clt
from transcoder.interchange.certificate import certify
from transcoder.interchange.form import Form
from transcoder.interchange.limits import Format

FORMATS = ["circuit-tracer", "saelens", "crosslayer-coding"]

ODD: dict[str, Any] = {"n_layers": 4, "d_model": 3, "n_features": 5, "activation": "jumprelu"}
"""For the cases that every run looks at."""


@st.composite
def shapes(draw):
    """Every connectivity and activation, with and without a skip, of small and odd shapes; not configs yet, because
    beartype's checks draw random numbers, which hypothesis does not allow here."""
    n_layers, n_features = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    connectivity = draw(st.sampled_from(["clt", "plt", "band"] if n_layers > 1 else ["clt", "plt"]))
    activation = draw(st.sampled_from(["relu", "jumprelu", "topk"]))
    return {
        "n_layers": n_layers,
        "d_model": draw(st.integers(1, 6)),
        "n_features": n_features,
        "connectivity": connectivity,
        "band": draw(st.integers(1, n_layers - 1)) if connectivity == "band" else None,
        "activation": activation,
        "k": draw(st.integers(1, n_features)) if activation == "topk" else None,
        "ste": draw(st.sampled_from(["gdm", "anthropic", "crosslayer-coding"])),
        "skip": draw(st.booleans()),
    }


def holds(config, to):
    """Whether the format can: written out here, not asked of the package."""
    own_layer_only = config.reach == 1
    if to == "saelens":
        return own_layer_only and config.activation != "topk"
    if to == "crosslayer-coding":
        return config.activation != "topk"
    return (own_layer_only and config.connectivity != "clt") or (
        config.activation != "topk" and not config.skip
    )


@pytest.mark.parametrize("to", FORMATS)
@settings(max_examples=30)
@given(shape=shapes(), seed=st.integers(0, 999))
@example(shape={**ODD, "connectivity": "band", "band": 2}, seed=1)
@example(shape={**ODD, "connectivity": "band", "band": 2, "skip": True}, seed=1)
@example(shape={**ODD, "connectivity": "plt", "skip": True}, seed=1)
@example(shape={**ODD, "connectivity": "plt", "activation": "topk", "k": 3}, seed=1)
@example(shape={**ODD, "activation": "relu"}, seed=1)
def test_the_other_tool_computes_the_same_and_the_way_back_too(to, shape, seed, peers, draw, inputs, native):
    """Bounded: by the certificate's bound, which itself is of the size of float32's rounding."""
    config = TranscoderConfig(**shape)
    clt = draw(config, seed)
    x = inputs(clt, seed)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "exported"
        if not holds(config, to):
            with pytest.raises(DataError, match=r"export|train|calibrate"):
                export_clt(clt, out, to)
            assert not out.exists()
            return
        done = export_clt(clt, out, to, rows=x)
        acts, y = native(clt, x)
        peer_acts, peer_y = peers[to](out, x.double())
        if config.activation == "topk":  # it keeps negative values, as the note of the export says
            assert any("negative" in note for note in done.notes)
            negative = peer_acts < 0
            assert bool((acts[negative] == 0).all())
            peer_y, peer_acts = y if bool(negative.any()) else peer_y, peer_acts.relu()
        certificate = done.certificate
        # native() adds float64 rounding of another order of operations.
        size = 1.0 + float(x.abs().max())
        assert float((peer_acts - acts).abs().max()) <= certificate.features.bound + 1e-12 * size
        assert float((peer_y - y).abs().max()) <= certificate.reconstruction.bound + 1e-11 * size
        if certificate.undecided == 0:
            # Bounds are not vacuous: a few hundred float32 roundings of the numbers involved.
            assert certificate.features.bound <= 1e-4 * size
        back = import_clt(out).clt
        back_acts, back_y = native(back, x)
        assert float((back_acts - acts).abs().max()) <= certificate.features.bound + 1e-12 * size
        assert float((back_y - y).abs().max()) <= certificate.reconstruction.bound + 1e-11 * size
        assert back.config.reach == config.reach
        same = ("n_layers", "d_model", "n_features", "activation", "k", "skip", "input_hook", "output_hook")
        assert all(getattr(back.config, name) == getattr(config, name) for name in same)
        if config.activation == "jumprelu":  # whether a value equal to its threshold passes is the tool's
            assert back.config.ste == ("crosslayer-coding" if to == "crosslayer-coding" else "gdm")


@pytest.fixture
def config():
    return TranscoderConfig(n_layers=3, d_model=8, n_features=12, activation="jumprelu")


@pytest.mark.parametrize("to", FORMATS)
def test_what_came_back_goes_out_as_the_same_bytes(to, config, draw, tmp_path):
    """Exact: nothing is rounded twice. Thresholds, which come back by their logarithm, within an ulp or two."""
    clt = draw(replace(config, connectivity="plt"), 3)
    export_clt(clt, tmp_path / "a", to)
    export_clt(import_clt(tmp_path / "a").clt, tmp_path / "b", to)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) > 0
    for file in files:
        first, second = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            if "threshold" in name and to != "crosslayer-coding":
                torch.testing.assert_close(second[name], tensor, rtol=5e-7, atol=0)
            else:
                assert torch.equal(second[name], tensor), name


def test_decoders_stored_as_zeros_are_counted(config, draw, tmp_path):
    band = replace(config, n_layers=4, connectivity="band", band=2)
    formats: list[Format] = ["circuit-tracer", "crosslayer-coding"]
    for to in formats:
        told = export_clt(draw(band, 1), tmp_path / to, to).notes
        assert any("of 10, 3 are stored as zeros" in note for note in told)
        assert not any(
            "zeros" in note for note in export_clt(draw(config, 1), tmp_path / f"{to}-clt", to).notes
        )


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_says_what_it_is(to, config, draw, tmp_path):
    clt = draw(replace(config, connectivity="plt"), 3)
    done = export_clt(clt, tmp_path / "out", to, model_name="kuleshov-group/mdlm-owt")
    record = json.loads((tmp_path / "out" / "interchange.json").read_text())
    assert record["certificate"] == done.certificate.mapping()
    assert record["transcoder"]["n_features"] == 12
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{done.certificate.features.error:.2g}" in text
    assert f"bound {done.certificate.reconstruction.bound:.2g}" in text
    assert "blocks.{layer}.mlp.hook_in" in text
    everything = "".join(
        path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".yaml")
    )
    assert "kuleshov-group/mdlm-owt" in everything


def test_the_measured_error_is_that_of_one_rounding(config, draw, tmp_path):
    """Behavioural: float32 shows, and no more than it."""
    certificate = export_clt(draw(config, 5), tmp_path / "out", "circuit-tracer").certificate
    assert 0 < certificate.reconstruction.error < 1e-5 * certificate.reconstruction.rms
    assert 0.01 < certificate.reconstruction.share <= 1.0
    assert 0.01 < certificate.features.share <= 1.0


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"])
def test_a_half_precision_tensor_has_no_certificate(part, config, draw, inputs):
    """The neighbour that fails: one tensor at a time through bfloat16."""
    clt = draw(replace(config, skip=True), 5)
    exact = Form.of(clt)
    x = inputs(clt, 1).double()
    value = getattr(exact.weights, part)
    halved: Any = [w.bfloat16().double() for w in value] if part == "W_dec" else value.bfloat16().double()
    if part == "threshold":  # a value between a threshold and its rounded one, which switches
        h = float(exact.pre_acts(x)[0, :, 0].max())
        value[0, 0] = h - 1e-3
        halved = value.clone()
        halved[0, 0] = h + 1e-3
    changed: dict[str, Any] = {part: halved}
    found = Form(clt.config, replace(exact.weights, **changed))
    certify(exact, Form.of(exact.transcoder()), x, "")
    with pytest.raises(CheckpointError, match=r"of layer \d differ by .* rounding allows .* do not hold"):
        certify(exact, found, x, "")


def test_values_at_their_threshold_are_undecided_and_may_switch(config, draw, inputs):
    """Bounded: by the value itself, which is what the one that switches is off by."""
    exact = Form.of(draw(config, 2))
    x = inputs(draw(config, 2), 2).double()
    threshold = exact.weights.threshold
    assert threshold is not None
    h = exact.pre_acts(x)[1]
    row, feature = (h == h.max()).nonzero()[0].tolist()
    threshold[1, feature] = h.max()
    lower = threshold.clone()
    lower[1, feature] *= 1 - 1e-9
    certificate = certify(exact, Form(exact.config, replace(exact.weights, threshold=lower)), x, "")
    assert certificate.undecided >= 1
    assert certificate.features.error == pytest.approx(float(h.max()))
    lower[1, feature] *= 0.99
    x[1, row] *= 1 - 1e-4
    too_low = Form(exact.config, replace(exact.weights, threshold=lower))
    with pytest.raises(CheckpointError, match="feature activations of layer 1 differ"):
        certify(exact, too_low, x, "")


def test_a_topk_may_switch_only_between_values_that_rounding_makes_equal(draw):
    """Bounded: the first two features differ by less than float32 shows, the third by far more."""
    clt = draw(TranscoderConfig(n_layers=1, d_model=1, n_features=3, activation="topk", k=1), 0)
    exact = Form.of(clt)
    exact.weights.b_enc.zero_()
    exact.weights.W_enc[0, :, 0] = torch.tensor([1.0, 1.0 + 1e-9, 0.9], dtype=torch.float64)
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    certificate = certify(exact, Form.of(exact.transcoder()), x, "")
    assert (certificate.undecided, certificate.activations) == (2, 3)
    assert certificate.features.error == pytest.approx(1.0)
    W_enc = exact.weights.W_enc.clone()
    W_enc[0, 2] = 1.1
    with pytest.raises(CheckpointError, match="feature activations of layer 0 differ"):
        certify(exact, Form(exact.config, replace(exact.weights, W_enc=W_enc)), x, "")


def test_equal_to_the_threshold_counts_the_same_in_float32(draw, tmp_path):
    """Exact: an inclusive threshold is written to strict readers as the float32 just below."""
    config = TranscoderConfig(
        n_layers=1, d_model=1, n_features=1, activation="jumprelu", ste="crosslayer-coding"
    )
    clt = draw(config, 0)
    with torch.no_grad():
        clt.W_enc.fill_(1.0)
        clt.b_enc.zero_()
        clt.in_mean.zero_()
        clt.in_scale.fill_(1.0)
    export_clt(clt, tmp_path / "out", "circuit-tracer")
    form = Form.of(clt)
    assert form.weights.threshold is not None
    at_threshold = form.weights.threshold[:, None]
    assert torch.equal(form.activate(at_threshold), at_threshold)
    strict = Form(replace(config, ste="gdm"), form.weights)
    assert torch.equal(strict.activate(at_threshold), torch.zeros_like(at_threshold))
    written = load_file(tmp_path / "out" / "W_enc_0.safetensors")["threshold_0"]
    theta = clt.log_threshold[0].double().exp().float()
    assert torch.equal(torch.nextafter(written, torch.tensor(1e9)), theta)


def test_training_text_and_origin_come_back(trained, tmp_path):
    """So an import is evaluated on held-out text, and refused with another model, like the original."""
    clt = trained
    assert clt.config.activation == "topk"
    relu = clt.__class__(replace(clt.config, activation="relu", k=None))
    relu.load_state_dict(clt.state_dict())
    relu.provenance, relu.training_sequences = clt.provenance, clt.training_sequences
    export_clt(relu, tmp_path / "out", "circuit-tracer")
    back = import_clt(tmp_path / "out")
    assert (back.clt.training_sequences == clt.training_sequences).all()
    assert back.clt.provenance["store"] == clt.provenance["store"]
    assert back.clt.provenance["probe"] == clt.provenance["probe"]
    assert back.notes == []
    elsewhere = import_clt(tmp_path / "out", output_hook="blocks.{layer}.mlp.hook_out")
    assert "probe" not in elsewhere.clt.provenance
    for name in ("interchange.json", "training_sequences.safetensors"):
        (tmp_path / "out" / name).unlink()
    alone = import_clt(tmp_path / "out")
    assert alone.clt.training_sequences is None
    assert "which text it was trained on is not known" in alone.notes[0]


def test_a_directory_that_was_moved_still_reads(config, draw, tmp_path):
    """circuit-tracer's per-layer config names its files by absolute path."""
    clt = draw(replace(config, connectivity="plt"), 1)
    export_clt(clt, tmp_path / "a", "circuit-tracer")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert import_clt(tmp_path / "b").clt.config.connectivity == "plt"


def test_bfloat16_files_are_read_exactly(config, draw, tmp_path):
    """The published transcoders for circuit-tracer are in bfloat16."""
    export_clt(draw(config, 1), tmp_path / "out", "circuit-tracer")
    (tmp_path / "out" / "interchange.json").unlink()  # these will be other files
    for file in (tmp_path / "out").glob("W_*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    expected = load_file(tmp_path / "out" / "W_enc_1.safetensors")["W_enc_1"].float()
    assert torch.equal(import_clt(tmp_path / "out").clt.W_enc[1].detach(), expected)
