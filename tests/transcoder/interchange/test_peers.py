"""The tools themselves load our files and compute what we compute; and we read what they write.

Opt-in, because they need versions of their own: a Python that has sae-lens, circuit-tracer and decode-clt installed
(the latter two without their dependencies) is named by MDLM_INTERP_PEERS_PYTHON.
"""

import os
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from transcoder.config import TranscoderConfig
from transcoder.interchange import export_clt, import_clt

PYTHON = os.environ.get("MDLM_INTERP_PEERS_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="MDLM_INTERP_PEERS_PYTHON names no Python with the other tools"
    ),
]

COMMON = """
import sys, torch
from safetensors.torch import load_file, save_file
out, place = sys.argv[1], sys.argv[2]
x = load_file(f"{place}/x.safetensors")["x"].double()
again = f"{place}/again"
torch.set_grad_enabled(False)
"""

CROSS_LAYER = """
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
clt = load_clt(out, "mlp.hook_in", "hook_mlp_out", device=torch.device("cpu"), dtype=torch.float32,
               lazy_decoder=False).double()
acts, y = clt.encode(x), clt(x)
clt.float().to_safetensors(again)
"""

PER_LAYER = """
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
paths = {layer: f"{out}/layer_{layer}.safetensors" for layer in range(len(x))}
plt = load_transcoder_set(paths, out, "mlp.hook_in", "hook_mlp_out", device=torch.device("cpu"),
                          dtype=torch.float32, lazy_encoder=False, lazy_decoder=False).double()
acts = plt.encode(x)
y = torch.stack([plt[layer](x[layer]) for layer in range(len(x))])
"""

SAELENS = """
from sae_lens import SAE
acts, y = [], []
for layer in range(len(x)):
    sae = SAE.load_from_disk(f"{out}/layer_{layer}").double()
    sae.dtype = torch.float64
    acts.append(sae.encode(x[layer])); y.append(sae(x[layer]))
    sae.float().save_model(f"{again}/layer_{layer}")
acts, y = torch.stack(acts), torch.stack(y)
"""

JUDGED = """
clt = clt.double()
for part in (clt, clt.encoder_module, clt.decoder_module, clt.theta_manager):
    part.dtype = torch.float64
by_layer = {layer: x[layer] for layer in range(len(x))}
found, written = clt.get_feature_activations(by_layer), clt(by_layer)
acts = torch.stack([found[layer] for layer in by_layer]).double()
y = torch.stack([written[layer] for layer in by_layer]).double()
"""
"""What crosslayer-coding computes, in float64."""

CROSSLAYER_CODING = (
    """
from clt.config import CLTConfig
from clt.models.clt import CrossLayerTranscoder
clt = CrossLayerTranscoder(CLTConfig.from_json(f"{out}/cfg.json"), process_group=None, device=torch.device("cpu"))
clt.load_state_dict(load_file(f"{out}/model.safetensors"))
import os; os.makedirs(again)
state = {name: value.contiguous() for name, value in clt.state_dict().items()}
save_file(state, f"{again}/clt_checkpoint_9.safetensors")
clt.config.to_json(f"{again}/cfg.json")
"""
    + JUDGED
)

CASES: dict[str, Any] = {
    "circuit-tracer clt": ("circuit-tracer", CROSS_LAYER, {}, ["relu", "jumprelu"]),
    "circuit-tracer band": ("circuit-tracer", CROSS_LAYER, {"connectivity": "band", "band": 2}, ["jumprelu"]),
    "circuit-tracer plt": ("circuit-tracer", PER_LAYER, {"connectivity": "plt"}, ["relu", "jumprelu"]),
    "circuit-tracer skip": ("circuit-tracer", PER_LAYER, {"connectivity": "plt", "skip": True}, ["jumprelu"]),
    "saelens": ("saelens", SAELENS, {"connectivity": "plt"}, ["relu", "jumprelu"]),
    "saelens skip": ("saelens", SAELENS, {"connectivity": "plt", "skip": True}, ["relu", "jumprelu"]),
    "crosslayer-coding": ("crosslayer-coding", CROSSLAYER_CODING, {}, ["relu", "jumprelu"]),
    "crosslayer-coding band": (
        "crosslayer-coding",
        CROSSLAYER_CODING,
        {"connectivity": "band", "band": 2, "skip": True},
        ["jumprelu"],
    ),
}


@pytest.mark.parametrize(
    ("case", "activation"), [(case, name) for case, (*_, names) in CASES.items() for name in names]
)
def test_the_tool_itself_computes_the_same(case, activation, draw, inputs, native, tmp_path):
    """Bounded: by the certificate; the tool is run in float64 on the float32 files."""
    to: Any
    to, code, changes, _ = CASES[case]
    config = replace(
        TranscoderConfig(n_layers=3, d_model=16, n_features=40, activation=activation), **changes
    )
    clt = draw(config, 7)
    x = inputs(clt, 7)
    done = export_clt(clt, tmp_path / "out", to, rows=x)
    assert done.certificate.undecided == 0
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = COMMON + code + 'save_file({"acts": acts, "y": y}, f"{place}/found.safetensors")\n'
    command = [str(PYTHON), "-c", script, str(tmp_path / "out"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    acts, y = native(clt, x)
    assert bool((acts > 0).any())
    # Behind the bound of the weights, what float32 thresholds and buffers of the tool may round again.
    assert float((found["acts"] - acts).abs().max()) <= done.certificate.features.bound + 1e-11
    assert float((found["y"] - y).abs().max()) <= done.certificate.reconstruction.bound + 1e-11
    again = tmp_path / "again"
    if not again.exists():
        return
    if to == "circuit-tracer":  # it writes no config.yaml
        (again / "config.yaml").write_text((tmp_path / "out" / "config.yaml").read_text())
    first, second = import_clt(tmp_path / "out").clt, import_clt(again).clt
    assert first.config == second.config
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


TIED = """
from clt.config import CLTConfig
from clt.models.clt import CrossLayerTranscoder
tying, activation = sys.argv[3:]
torch.manual_seed(0)
config = CLTConfig(num_features=20, num_layers=3, d_model=16, activation_fn=activation, decoder_tying=tying,
                   enable_feature_scale=tying != "none", skip_connection=True)
clt = CrossLayerTranscoder(config, process_group=None, device=torch.device("cpu"))
for name, parameter in clt.named_parameters():
    # An untied skip is for every pair there, and for the layer itself here.
    sources = name.rpartition(".")[2].split("->")
    parameter.normal_(0, 0 if "skip" in name and len(set(sources)) == 2 else 0.5)
import os; os.makedirs(again)
save_file({name: value.contiguous() for name, value in clt.state_dict().items()}, f"{again}/model.safetensors")
config.to_json(f"{again}/cfg.json")
"""


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
def test_what_crosslayer_coding_itself_made_is_imported(tying, activation, native, tmp_path):
    """Bounded: a product of two float32 is rounded once where a feature has a scale."""
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1))
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = COMMON + TIED + JUDGED + 'save_file({"acts": acts, "y": y}, f"{place}/found.safetensors")\n'
    command = [str(PYTHON), "-c", script, "", str(tmp_path), tying, activation]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    acts, y = native(import_clt(tmp_path / "again").clt, x)
    assert bool((acts > 0).any())
    torch.testing.assert_close(acts, found["acts"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, found["y"], rtol=1e-6, atol=1e-5)
