"""Model directories: what is saved comes back bitwise, in one file or several, in any floating point type."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mdlm_interp import checkpoints
from mdlm_interp.errors import CheckpointError, OutputExistsError, WriteError
from mdlm_interp.model import HookedMDLM


def shard(directory: Path, parts: int = 3) -> None:
    """Rewrite a model directory as transformers would above its shard size."""
    state = load_file(directory / "model.safetensors")
    weight_map: dict[str, str] = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        piece = {key: state[key] for key in sorted(state)[part::parts]}
        save_file(piece, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(piece, name)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "model.safetensors").unlink()


@pytest.fixture
def saved(model, tmp_path):
    """A directory with a saved `model`."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same_weights(a: HookedMDLM, b: HookedMDLM) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_saved_model_loads_bitwise_and_in_eval_mode(model, saved, ids, sigma, sharded):
    """Exact: weights and logits."""
    if sharded:
        shard(saved)
    loaded = HookedMDLM.from_pretrained(saved)
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert torch.equal(loaded(ids, sigma), model(ids, sigma))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_path_given_as_text_is_the_same(model, saved):
    assert same_weights(HookedMDLM.from_pretrained(str(saved)), model)


def test_saving_twice_writes_the_same_bytes(model, saved, tmp_path):
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_what_is_written_is_published_names_in_float32_and_nothing_else(model, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    state = load_file(saved / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "mdlm"
    assert config["cond_dim"] == model.config.cond_dim


def test_keys_that_transformers_adds_to_the_config_are_ignored(model, saved):
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {}, "transformers_version": "4.38.2", "_name_or_path": "kuleshov-group/mdlm-owt"}
    for name in ("dropout", "return_dict", "model_length"):
        del config[name]
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert same_weights(HookedMDLM.from_pretrained(saved), model)


def test_weights_beyond_float16_are_refused_there_and_load_as_bfloat16(model, saved):
    with torch.no_grad():
        model.backbone.blocks[0].attn_qkv.weight[3, 2] = -70_000.0
    weights = model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, saved / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"attn_qkv.weight in .* reaches 70000 and float16 ends at 65504"
    ):
        HookedMDLM.from_pretrained(saved, dtype=torch.float16)
    HookedMDLM.from_pretrained(saved, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_load_in_another_type_as_rounded_once(model, saved, ids, sigma, dtype):
    """Exact for the weights. The forward is bounded by the type's own rounding, 2**-8 for bfloat16, over some
    twenty operations in a row: a tenth of the largest logit."""
    loaded = HookedMDLM.from_pretrained(saved, dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        if not name.endswith("inv_freq"):
            assert tensor.dtype == dtype, name
            assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name
    logits, expected = loaded(ids, sigma), model(ids, sigma)
    assert logits.dtype == dtype
    assert (logits - expected).abs().max() <= 0.1 * expected.abs().max()


def loaded_in(dtype):
    return lambda saved: HookedMDLM.from_pretrained(saved, dtype=dtype)


@pytest.mark.parametrize(
    "make",
    [
        loaded_in(torch.bfloat16),
        loaded_in(torch.float16),
        lambda saved: HookedMDLM.from_pretrained(saved).half(),
        lambda saved: HookedMDLM.from_pretrained(saved).to(torch.bfloat16),
        lambda saved: HookedMDLM.from_pretrained(saved).to("cpu", torch.float16),
        lambda saved: HookedMDLM.from_pretrained(saved).bfloat16().float(),
    ],
    ids=["loaded bf16", "loaded fp16", "half()", "to(bf16)", "to(cpu, fp16)", "there and back"],
)
def test_rotary_frequencies_stay_float32_in_half_precision(model, saved, make):
    """Exact: a bfloat16 copy would misplace far tokens by whole positions."""
    found = make(saved).backbone.rotary_emb.inv_freq
    assert found.dtype == torch.float32
    assert torch.equal(found, model.backbone.rotary_emb.inv_freq)


def test_rotary_frequencies_follow_the_model_to_float64(saved):
    for model in (
        HookedMDLM.from_pretrained(saved, dtype=torch.float64),
        HookedMDLM.from_pretrained(saved).double(),
    ):
        assert model.backbone.rotary_emb.inv_freq.dtype == torch.float64


def test_a_half_precision_model_saves_its_rounded_weights_in_float32(model, tmp_path):
    rounded = model.bfloat16()
    rounded.save_pretrained(tmp_path)
    loaded = HookedMDLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a.float(), b) for a, b in zip(rounded.parameters(), loaded.parameters(), strict=True)
    )


@pytest.mark.parametrize("kept", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_an_existing_model_is_never_overwritten(make_model, saved, kept):
    """Exact: every byte of the directory is what it was. A sharded model, or a lone config, counts too."""
    if kept == "model.safetensors.index.json":
        shard(saved)
    if kept == "config.json":
        (saved / "model.safetensors").unlink()
        (saved / "config.json").write_text('{"model_type": "another"}', encoding="utf-8")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OutputExistsError) as caught:
        make_model(seed=1).save_pretrained(saved)
    assert str(caught.value) == f"{saved / kept} exists; save to another directory or remove it first"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_interrupted_save_leaves_no_model_and_can_be_repeated(model, tmp_path, monkeypatch):
    def cut_off(state, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", cut_off)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        HookedMDLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert same_weights(HookedMDLM.from_pretrained(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_that_the_disk_refuses_is_one_line_and_can_be_repeated(model, tmp_path, monkeypatch):
    def full(state, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full)
        with pytest.raises(WriteError) as caught:
            model.save_pretrained(tmp_path / "model")
    assert str(caught.value) == (
        f"{tmp_path / 'model' / 'model.safetensors'} cannot be written: No space left on device; "
        "free some space or choose another directory, then run this again"
    )
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    model.save_pretrained(tmp_path / "model")
    assert same_weights(HookedMDLM.from_pretrained(tmp_path / "model"), model)


class Payload:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize("alone", [True, False])
def test_no_pickle_is_ever_read(model, saved, tmp_path, alone):
    proof = tmp_path / "proof"
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(proof)))
    if alone:
        (saved / "model.safetensors").unlink()
        with pytest.raises(CheckpointError) as caught:
            HookedMDLM.from_pretrained(saved)
        assert str(caught.value) == (
            f"{saved} holds pytorch_model.bin, a pickle that can run code when read, "
            "and no model.safetensors; convert it to safetensors where you trust it"
        )
    else:
        assert same_weights(HookedMDLM.from_pretrained(saved), model)
    assert not proof.exists()


def test_one_hash_stands_for_a_models_weights_and_changes_with_them(make_model, saved, tmp_path):
    single = checkpoints.weights_sha256(saved)
    assert single == checkpoints.sha256_of(saved / "model.safetensors")
    shard(saved)
    sharded = checkpoints.weights_sha256(saved)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    assert len({single, sharded, checkpoints.weights_sha256(tmp_path / "other")}) == 3
