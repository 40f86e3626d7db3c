"""Damaged and foreign model directories: each error says what is wrong and what to do.

Behavioural: nothing is loaded, and the message is compared in full or in the part that matters.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdlm_interp.errors import CheckpointError
from mdlm_interp.model import HookedMDLM

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def message(source: object, **options: object) -> str:
    """What loading says when it refuses."""
    with pytest.raises(CheckpointError) as caught:
        HookedMDLM.from_pretrained(source, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def edit_config(directory: Path, **changes: object) -> None:
    """Set fields of config.json; None removes one."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8")) | changes
    (directory / CONFIG).write_text(
        json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8"
    )


def edit_weights(directory: Path, change) -> None:
    state = load_file(directory / WEIGHTS)
    change(state)
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "~/model", "a/b/c", "/nowhere/model"])
def test_a_source_that_is_nothing_says_what_a_source_is(source):
    assert message(source) == (
        f"{source!r} is no model directory; a source is a directory with config.json and model.safetensors, "
        "a repository id such as 'kuleshov-group/mdlm-owt', or 'bundled'"
    )


def test_a_file_is_no_source(saved):
    assert "is no model directory" in message(saved / WEIGHTS)


def test_a_directory_without_config_says_so(tmp_path):
    assert message(tmp_path) == f"{tmp_path} has no config.json; is it a model directory?"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not valid JSON (Expecting property name"),
        (b"", "is not valid JSON (Expecting value"),
        (b"\xff\xfe{}", "is not valid JSON ('utf-8' codec can't decode"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(saved, content, expected):
    (saved / CONFIG).write_bytes(content)
    assert message(saved).startswith(f"{saved / CONFIG} {expected}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "describes a 'gpt2' model, expected model_type 'mdlm'"),
        ({"hidden_dim": None}, "lacks 'hidden_dim', which fixes a weight's shape; did you mean"),
        ({"n_blocks": None, "n_block": 2}, "which fixes a weight's shape; did you mean 'n_block'?"),
        ({"n_heads": None}, "lacks 'n_heads', which fixes a weight's shape"),
        ({"n_blocks": "2"}, "n_blocks must be int, got '2'"),
        ({"n_blocks": 2.0}, "n_blocks must be int, got 2.0"),
        ({"n_blocks": True}, "n_blocks must be int, got True"),
        ({"time_conditioning": 1}, "time_conditioning must be bool, got 1"),
        ({"dropout": "0.1"}, "dropout must be float, got '0.1'"),
        ({"n_heads": 5}, "hidden_dim must be n_heads times an even head width"),
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"dropout": 1}, "dropout must be in [0, 1), got 1.0"),
        ({"vocab_size": 1}, "vocab_size must leave room for the mask token: at least 2, got 1"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_right_names_the_field(saved, changes, expected):
    edit_config(saved, **changes)
    found = message(saved)
    assert found.startswith(str(saved / CONFIG))
    assert expected in found


def test_the_cond_dim_129_trap_is_explained(saved):
    edit_config(saved, cond_dim=129)
    assert message(saved).endswith(
        "config.json implies (144, 129); cond_dim 129 is upstream's class default and a typo, "
        "published weights need 128"
    )


def test_a_missing_tensor_is_named_with_how_many_are_missing(saved):
    edit_weights(saved, lambda state: state.pop("backbone.blocks.1.attn_out.weight"))
    assert message(saved) == (
        f"{saved} lacks 1 of 31 tensors, first 'backbone.blocks.1.attn_out.weight'; "
        "is n_blocks in config.json right, and are all shards there?"
    )


def test_too_many_blocks_in_the_config_miss_tensors(saved):
    edit_config(saved, n_blocks=3)
    assert "lacks 10 of 41 tensors, first 'backbone.blocks.2.norm1.weight'" in message(saved)


def test_a_tensor_that_the_model_does_not_have_is_named_with_the_nearest(saved):
    name = "backbone.blocks.1.attn_out.weight"
    edit_weights(saved, lambda state: state.update({name + "s": state.pop(name)}))
    assert message(saved) == (
        f"{saved / WEIGHTS} holds '{name}s', which a model with 2 blocks does not have; "
        f"did you mean '{name}'?"
    )


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved):
    name = "backbone.blocks.0.mlp.0.bias"
    edit_weights(saved, lambda state: state.update({name: state[name][:-1].clone()}))
    assert message(saved) == f"{name} in {saved / WEIGHTS} has shape (95,), config.json implies (96,)"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(saved, value):
    name = "backbone.output_layer.linear.weight"
    edit_weights(saved, lambda state: state[name][3].fill_(value))
    assert message(saved) == (
        f"{name} in {saved / WEIGHTS} has values that are not finite; "
        "the file is damaged or training diverged"
    )


def test_integer_weights_are_refused(saved):
    name = "backbone.blocks.0.norm1.weight"
    edit_weights(saved, lambda state: state.update({name: state[name].long()}))
    assert message(saved) == f"{name} in {saved / WEIGHTS} is torch.int64, expected floating point numbers"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])
    found = message(saved)
    assert found.startswith(f"{saved / WEIGHTS} is truncated or no safetensors file (")
    assert found.endswith("); download it again")


def test_a_file_that_is_no_safetensors_is_refused(saved):
    (saved / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 100)
    assert "is truncated or no safetensors file" in message(saved)


@pytest.mark.parametrize("name", ["model.bin", "last.ckpt", "a.pt", "b.pth"])
def test_a_directory_with_only_a_pickle_says_what_to_do(saved, name):
    (saved / WEIGHTS).rename(saved / name)
    assert message(saved).startswith(f"{saved} holds {name}, a pickle that can run code when read")


def test_a_directory_without_weights_says_so(saved):
    (saved / WEIGHTS).unlink()
    assert message(saved) == f"{saved} has no {WEIGHTS} (nor {INDEX}); is it a model directory?"


def write_index(directory: Path, index: object) -> None:
    (directory / WEIGHTS).rename(directory / "shard.safetensors")
    (directory / INDEX).write_text(index if isinstance(index, str) else json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    "index", ["{", [], {"metadata": {}}, {"weight_map": ["shard.safetensors"]}, {"weight_map": None}]
)
def test_an_index_that_is_none_is_refused(saved, index):
    write_index(saved, index)
    assert message(saved) == f"{saved / INDEX} is no index of shards; download the checkpoint again"


def test_a_missing_shard_is_named(saved):
    write_index(saved, {"weight_map": {"a": "shard.safetensors", "b": "second.safetensors"}})
    assert (
        message(saved) == f"{saved} lacks the shard second.safetensors, named in {INDEX}; download it again"
    )


@pytest.mark.parametrize("shard", ["../shard.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", ""])
def test_an_index_that_points_out_of_its_directory_is_refused(saved, shard):
    (saved.parent / "shard.safetensors").write_bytes((saved / WEIGHTS).read_bytes())
    write_index(saved, {"weight_map": {"a": shard}})
    assert message(saved) == f"{saved / INDEX} names {shard!r}, which is no file of that directory"


def test_a_tensor_in_two_shards_is_refused(saved):
    write_index(saved, {"weight_map": {"a": "shard.safetensors", "b": "copy.safetensors"}})
    (saved / "copy.safetensors").write_bytes((saved / "shard.safetensors").read_bytes())
    assert message(saved).endswith("and in another shard; download the checkpoint again")


def test_a_type_that_is_not_floating_point_is_refused(saved):
    assert message(saved, dtype=torch.int8) == "dtype must be a floating point type, got torch.int8"


def test_a_revision_of_something_local_is_refused(saved):
    assert message(saved, revision="main") == (
        f"revision 'main' was given, but {saved} is a local directory; drop it"
    )
    assert message("bundled", revision="main") == (
        "revision 'main' was given, but the bundled model has only one; drop it"
    )
