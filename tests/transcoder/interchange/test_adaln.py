"""The constant adaLN folded in: other hook points, the same features and the same effect on the residual."""

import json
from dataclasses import replace

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import CheckpointError, DataError
from transcoder.config import TranscoderConfig
from transcoder.interchange import export_clt, import_clt
from transcoder.interchange.adaln import Fold, constant_modulation

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def constant_model(model):
    """The tiny model without time conditioning: its adaLN is the same for every input."""
    found = HookedMDLM(replace(model.config, time_conditioning=False))
    found.load_state_dict(model.state_dict(), strict=False)
    return found.eval()


def at(model, hook, dtype=torch.float64):
    """Activations [layer pos d] of a hook point of every block, computed in float64."""
    exact = HookedMDLM(model.config).to(dtype)
    exact.load_state_dict(model.state_dict())
    names = [hook.replace("{layer}", str(layer)) for layer in range(model.config.n_blocks)]
    with torch.no_grad():
        _, cache = exact.eval().run_with_cache(IDS, names, timesteps=torch.tensor([1.3]))
    return torch.stack([cache[name][0] for name in names])


CASES = [
    ("circuit-tracer", {}),
    ("circuit-tracer", {"connectivity": "plt", "skip": True}),
    ("saelens", {"connectivity": "plt", "skip": True}),
    ("crosslayer-coding", {"skip": True}),
    ("crosslayer-coding", {"connectivity": "band", "band": 2}),
]


@pytest.mark.parametrize("fold", ["none", "input", "output", "both"])
@pytest.mark.parametrize(("to", "changes"), CASES)
def test_at_the_other_hook_points_of_the_model_features_and_effect_are_the_same(
    fold, to, changes, constant_model, draw, native, peers, tmp_path
):
    """Bounded: by the certificate at the other hook points, times the gate where the output is before it."""
    shape = TranscoderConfig(n_layers=3, d_model=32, n_features=24, activation="jumprelu", **changes)
    clt = draw(shape, 11)
    done = export_clt(clt, tmp_path / "out", to, model=constant_model, fold=fold)
    reads = "ln2.hook_normalized" if fold in ("input", "both") else "mlp.hook_in"
    writes = "mlp.hook_out" if fold in ("output", "both") else "hook_mlp_out"
    assert done.form.config.input_hook == f"blocks.{{layer}}.{reads}"
    assert done.form.config.output_hook == f"blocks.{{layer}}.{writes}"
    acts, y = native(clt, at(constant_model, clt.config.input_hook))
    peer_acts, peer_y = peers[to](tmp_path / "out", at(constant_model, done.form.config.input_hook))
    gate = at(constant_model, "blocks.{layer}.adaln.hook_gate_mlp")
    if writes == "mlp.hook_out":
        peer_y = gate * peer_y
    assert bool((acts > 0).any())
    assert float((acts - peer_acts).abs().max()) <= 2e-6 * float(acts.max())
    assert float((y - peer_y).abs().max()) <= 2e-6 * float(y.abs().max())
    back = import_clt(tmp_path / "out").clt.config
    assert (back.input_hook, back.output_hook) == (done.form.config.input_hook, done.form.config.output_hook)


def test_the_folded_output_is_the_mlps_before_its_gate(constant_model):
    """What the fold rests on, in the model: hook_mlp_out = gate * mlp.hook_out, and likewise at the input."""
    modulation = constant_modulation(constant_model)
    inside, outside = (
        at(constant_model, f"blocks.{{layer}}.{name}") for name in ("mlp.hook_in", "ln2.hook_normalized")
    )
    expected = outside * (1 + modulation.scale[:, None]) + modulation.shift[:, None]
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-12)
    before, after = (
        at(constant_model, f"blocks.{{layer}}.{name}") for name in ("mlp.hook_out", "hook_mlp_out")
    )
    torch.testing.assert_close(after, modulation.gate[:, None] * before, rtol=0, atol=1e-12)
    assert float(modulation.gate.abs().min()) > 0


@pytest.fixture
def clt_of_32(draw):
    return draw(TranscoderConfig(n_layers=3, d_model=32, n_features=24, activation="relu"), 1)


def test_time_conditioning_refuses_the_fold(clt_of_32, model, tmp_path):
    with pytest.raises(
        DataError, match=r"adaLN can be folded in only where it is constant.*time_conditioning"
    ):
        export_clt(clt_of_32, tmp_path / "out", "circuit-tracer", model=model, fold="both")
    assert not (tmp_path / "out").exists()
    export_clt(clt_of_32, tmp_path / "out", "circuit-tracer", model=model)


def test_a_zero_gate_refuses_the_output_but_not_the_input(clt_of_32, constant_model, tmp_path):
    d = 32
    with torch.no_grad():
        projection = constant_model.backbone.blocks[1].adaLN_modulation
        projection.weight[5 * d + 3] = 0.0
        projection.bias[5 * d + 3] = 0.0
    with pytest.raises(DataError, match=r"1 of 96 adaLN gates are zero.*fold input or none"):
        export_clt(clt_of_32, tmp_path / "out", "circuit-tracer", model=constant_model, fold="output")
    export_clt(clt_of_32, tmp_path / "out", "circuit-tracer", model=constant_model, fold="input")


def test_a_dimension_that_adaln_switches_off_is_folded_too(clt_of_32, constant_model, tmp_path):
    d = 32
    with torch.no_grad():
        projection = constant_model.backbone.blocks[1].adaLN_modulation
        projection.weight[4 * d + 3] = 0.0
        projection.bias[4 * d + 3] = -1.0  # scale, so that 1 + scale is zero
    done = export_clt(clt_of_32, tmp_path / "out", "circuit-tracer", model=constant_model, fold="input")
    assert bool((done.form.weights.W_enc[1, :, 3] == 0).all())


def test_other_hook_points_and_a_missing_model_are_refused(clt_of_32, constant_model, draw, tmp_path):
    with pytest.raises(DataError, match="fold input needs the model"):
        export_clt(clt_of_32, tmp_path / "out", "circuit-tracer", fold="input")
    config = replace(clt_of_32.config, input_hook="blocks.{layer}.hook_resid_mid")
    with pytest.raises(
        DataError, match=r"only blocks.{layer}.mlp.hook_in .* input is blocks.{layer}.hook_resid_mid"
    ):
        export_clt(draw(config, 1), tmp_path / "out", "circuit-tracer", model=constant_model, fold="input")


def test_the_probe_of_the_output_goes_only_where_the_output_is_the_same(clt_of_32, constant_model, tmp_path):
    """A probe holds activations of the output hook point, so it says nothing about another one."""
    clt_of_32.provenance = {"probe": "of hook_mlp_out", "run": {"seed": 1}}
    cases: list[tuple[Fold, set[str]]] = [("input", {"probe", "run"}), ("output", {"run"})]
    for fold, names in cases:
        export_clt(clt_of_32, tmp_path / fold, "circuit-tracer", model=constant_model, fold=fold)
        record = json.loads((tmp_path / fold / "interchange.json").read_text())
        assert set(record["provenance"]) == names
        assert set(import_clt(tmp_path / fold).clt.provenance) == {*names, "imported"}


def test_another_model_is_refused(trained, tmp_path, constant_model):
    relu = trained.__class__(replace(trained.config, activation="relu", k=None))
    relu.load_state_dict(trained.state_dict())
    relu.provenance = trained.provenance
    with pytest.raises(CheckpointError, match="trained on another model"):
        export_clt(relu, tmp_path / "out", "circuit-tracer", model=constant_model)
    assert not (tmp_path / "out").exists()
