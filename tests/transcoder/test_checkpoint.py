"""A saved transcoder comes back bit for bit, and one that does not fit is refused with its reason."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import CheckpointError, DataError, OutputExistsError
from transcoder import CrossLayerTranscoder
from transcoder.checkpoint import load_clt, save_clt
from transcoder.identity import check_model
from transcoder.replacement import ReplacementModel


@pytest.fixture
def saved(clt, tmp_path):
    save_clt(clt, tmp_path / "saved")
    return tmp_path / "saved"


def edit_weights(directory, edit):
    tensors = load_file(directory / "clt.safetensors")
    edit(tensors)
    save_file(tensors, directory / "clt.safetensors")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_saving_and_loading_changes_no_bit(clt, saved, rows):
    loaded = load_clt(saved)
    assert loaded.config == clt.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in clt.state_dict().items())
    assert torch.equal(loaded(rows[0]), clt(rows[0]))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_trained_transcoder_records_its_run_store_and_model(trained, store, model_directory):
    provenance = trained.provenance
    assert provenance["store"]["fingerprint"] == store.fingerprint()
    assert provenance["store"]["provenance"]["weights_sha256"] == store.provenance["weights_sha256"]
    assert provenance["run"]["train"]["seed"] == 6
    assert provenance["versions"]["torch"] == str(torch.__version__)


def test_a_transcoder_is_never_overwritten(clt, saved):
    with pytest.raises(
        OutputExistsError, match=r"config.json exists; save to another directory or remove it first"
    ):
        save_clt(clt, saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("W_dec.1"),
            "lacks 1 of 10 tensors, first 'W_dec.1'; is n_layers in config.json right",
        ),
        (
            lambda t: t.update({"W_decc.1": torch.zeros(2)}),
            r"holds 'W_decc.1', which the transcoder of config.json does not have; did you mean 'W_dec.1'\?",
        ),
        (
            lambda t: t.update({"W_enc": torch.zeros(3, 25, 32)}),
            r"W_enc in .* has shape \(3, 25, 32\), config.json implies \(3, 24, 32\); trained with another",
        ),
        (lambda t: t.update({"b_enc": t["b_enc"].half()}), "b_enc in .* is float16, expected float32"),
        (
            lambda t: t["b_dec"].fill_(torch.nan),
            "b_dec in .* has values that are not finite; the file is damaged",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, edit, message):
    edit_weights(saved, edit)
    with pytest.raises(CheckpointError, match=message):
        load_clt(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sae"}, "has format 'sae', expected 'mdlm-interp clt'"),
        ({"version": 2}, "has version 2, this package reads 1; update the package"),
        ({"transcoder": {"n_layers": 3}}, r"missing n_features \(int\), d_model \(int\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_clt(saved)


@pytest.mark.parametrize("name", ["config.json", "clt.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}; is it a transcoder's directory"):
        load_clt(saved)


@pytest.mark.parametrize("name", ["config.json", "clt.safetensors"])
def test_a_truncated_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{name} is (not valid JSON|truncated or no safetensors file)"):
        load_clt(saved)


@pytest.mark.parametrize("name", ["clt.safetensors", "training_sequences.safetensors"])
def test_one_flipped_bit_is_found(clt, tmp_path, name):
    clt.training_sequences = np.arange(20)
    save_clt(clt, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{name} is damaged or another's: its SHA-256 is not the one in"
    ):
        load_clt(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"has no {name}|{name} is damaged"):
        load_clt(tmp_path)


def test_a_save_that_fails_half_way_leaves_no_transcoder_and_nothing_in_the_way(clt, tmp_path):
    clt.provenance = {"not": float("nan")}  # JSON has no nan
    with pytest.raises(ValueError, match="Out of range float values"):
        save_clt(clt, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_clt(tmp_path)
    clt.provenance = {}
    clt.save_pretrained(tmp_path)
    load_clt(tmp_path)


# Whose model it is


@pytest.fixture
def other_model_directory(model_directory, tmp_path):
    """The same model but for one weight, moved by 1 %."""
    model = HookedMDLM.from_pretrained(model_directory)
    with torch.no_grad():
        dict(model.named_parameters())["backbone.blocks.0.mlp.2.weight"].mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    shutil.copy(model_directory / "tokenizer.json", tmp_path / "other")
    return tmp_path / "other"


def test_its_own_model_is_accepted_by_source_and_in_memory(trained_directory, model_directory, model):
    load_clt(trained_directory, model_directory)
    load_clt(trained_directory, model)
    double = HookedMDLM.from_pretrained(model_directory, dtype=torch.float64)
    ReplacementModel(double, CrossLayerTranscoder.from_pretrained(trained_directory, model=model).double())


def test_a_transcoder_of_another_type_than_the_model_is_refused(trained, model):
    with pytest.raises(DataError, match=r"is torch.float64 on cpu, the model torch.float32 on cpu; move one"):
        ReplacementModel(model, trained.double())


def test_another_models_source_is_refused_by_its_hash(trained_directory, other_model_directory, store):
    with pytest.raises(
        CheckpointError, match=r"trained on another model: the weights of .* have sha256"
    ) as caught:
        load_clt(trained_directory, other_model_directory)
    assert store.provenance["weights_sha256"] in str(caught.value)


def test_another_model_in_memory_is_refused_by_what_it_computes(trained_directory, other_model_directory):
    other = HookedMDLM.from_pretrained(other_model_directory)
    message = (
        r"trained on another model: blocks.0.hook_mlp_out is \S+ where its training data has \S+ \(weights"
    )
    with pytest.raises(CheckpointError, match=message):
        load_clt(trained_directory, other)
    with pytest.raises(CheckpointError, match=message):
        ReplacementModel(other, load_clt(trained_directory))


def test_a_model_of_another_shape_is_refused(trained, model):
    config = replace(model.config, n_blocks=2)
    message = "is for 3 layers of width 32, the model has 2 of width 32; it was trained on another model"
    with pytest.raises(CheckpointError, match=message):
        check_model(trained, HookedMDLM(config).eval())


def test_a_model_that_drops_activations_is_refused(trained, model_directory):
    with pytest.raises(DataError, match=r"drops activations at random; call model\.eval"):
        check_model(trained, HookedMDLM.from_pretrained(model_directory).train())
