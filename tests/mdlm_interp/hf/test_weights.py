"""Weights of the transformers class: fresh, saved, read back, and in every dtype."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.hf import export, export_hf, register

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForMaskedLM

from mdlm_interp.hf.configuration_mdlm import MDLMConfig as HFConfig
from mdlm_interp.hf.modeling_mdlm import MDLM
from tests.mdlm_interp.hf.samples import INV_FREQ, ROOT, golden, golden_model, hooked, weights


def test_register_makes_the_auto_classes_load_and_build_without_remote_code(tmp_path):
    export_hf(hooked("mdlm_tiny_a"), tmp_path / "model")
    register()
    register()
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert type(config) is HFConfig
    assert type(AutoModelForMaskedLM.from_config(config)) is MDLM
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert type(model) is MDLM
    assert not model.training
    tensors, _ = golden("mdlm_tiny_a")
    state = model.state_dict()
    assert list(state) == list(hooked("mdlm_tiny_a").state_dict())
    for name, tensor in weights(tensors).items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("return_dict", [False, True])
def test_a_model_saved_by_transformers_is_read_back_bit_for_bit(tmp_path, return_dict):
    register()
    model, tensors = golden_model("mdlm_tiny_b", torch.float32)
    model.config.return_dict = return_dict
    model.save_pretrained(tmp_path / "saved")
    read = HookedMDLM.from_pretrained(tmp_path / "saved")
    expected = weights(tensors)
    assert read.state_dict().keys() == expected.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for field in ("vocab_size", "model_length", "cond_dim", "dropout", "time_conditioning", "return_dict"):
        assert getattr(read.config, field) == getattr(model.config, field), field
    # It carries its code, so it also loads where this package is missing.
    for name in export.CODE:
        source = ROOT / "mdlm_interp" / "hf" / name
        assert (tmp_path / "saved" / name).read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert stored["auto_map"] == export.AUTO_MAP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_rotary_frequencies_in_float32(tmp_path, dtype):
    register()
    reference = hooked("mdlm_tiny_b")
    exact = reference.state_dict()[INV_FREQ]
    assert not torch.equal(exact.to(dtype).float(), exact)
    export_hf(reference, tmp_path / "model")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=dtype)
    loaded.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name != INV_FREQ} == {dtype}
    cast = golden_model("mdlm_tiny_b", dtype)[0]
    for found in (loaded.state_dict()[INV_FREQ], stored[INV_FREQ], cast.state_dict()[INV_FREQ]):
        assert torch.equal(found, exact)
    assert torch.equal(cast.float().state_dict()[INV_FREQ], exact)
    tensors, _ = golden("mdlm_tiny_b")
    with torch.no_grad():
        logits = loaded(tensors["in.input_ids"], tensors["in.timesteps"])
    assert logits.dtype == dtype
    # Rounding of half precision; positions from a half precision table would be off by whole units.
    assert (logits - tensors["out.logits_fp64"]).abs().max() <= 0.25


def test_float64_load_computes_the_rotary_table_in_float64(tmp_path):
    register()
    export_hf(hooked("mdlm_tiny_b"), tmp_path / "model")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    tensors, _ = golden("mdlm_tiny_b")
    with torch.no_grad():
        logits = model(tensors["in.input_ids"], tensors["in.timesteps"])
    assert (logits - tensors["out.logits_fp64"]).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_without_rotary_frequencies_gets_them_computed(tmp_path, dtype):
    register()
    reference = hooked("mdlm_tiny_a")
    export_hf(reference, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    expected = state.pop(INV_FREQ)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=dtype).state_dict()
    assert loaded[INV_FREQ].dtype == torch.float32
    # The power function may round differently on another machine than on the one that wrote the file.
    assert torch.allclose(loaded[INV_FREQ], expected, rtol=3e-7, atol=0)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def test_fresh_weights_follow_upstreams_initialisation():
    config = HFConfig(vocab_size=211, hidden_dim=64, cond_dim=32, n_blocks=2, n_heads=2)
    model = MDLM(config).eval()
    assert not model(torch.arange(7)[None]).any()
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "output_layer.linear" in name:
            assert not parameter.any(), name
        elif ".norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            owner = model.get_parameter(name.replace("bias", "weight"))
            bound = owner.shape[-1] ** -0.5
            assert parameter.abs().max() <= bound, name
            if (
                parameter.numel() >= 1000
            ):  # uniform, not the normal with std 0.02 that transformers defaults to
                assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_cond_dim_defaults_to_the_published_128():
    assert HFConfig().cond_dim == 128
    assert {name: getattr(HFConfig(), name) for name in vars(MDLMConfig())} == vars(MDLMConfig())
