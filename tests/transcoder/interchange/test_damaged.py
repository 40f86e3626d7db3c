"""Damaged and foreign files: one line that says which, where and what to do, and nothing imported."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mdlm_interp.errors import CheckpointError, ConfigError, MdlmError
from transcoder.checkpoint import save_clt
from transcoder.config import TranscoderConfig
from transcoder.interchange import export_clt, import_clt

TENSORS = {
    "circuit-tracer": ("W_enc_1.safetensors", "b_enc_1"),
    "saelens": ("layer_1/sae_weights.safetensors", "b_enc"),
    "crosslayer-coding": ("model.safetensors", "encoder_module.encoders.1.bias_param"),
}


@pytest.fixture
def exported(draw, tmp_path):
    """Makes files of each format as another tool would: without a record of what they were written as."""

    def make(to, **changes):
        connectivity = "plt" if to == "saelens" else "clt"
        shape = {"connectivity": connectivity, "activation": "jumprelu", **changes}
        config = TranscoderConfig(n_layers=3, d_model=4, n_features=5, **shape)
        export_clt(draw(config, 1), tmp_path / "out", to)
        (tmp_path / "out" / "interchange.json").unlink()
        return tmp_path / "out"

    return make


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def edit_json(file, **changes):
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in settings.items() if value != "gone"}))


def refused(path, text):
    with pytest.raises(CheckpointError, match=text) as caught:
        import_clt(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", TENSORS)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors, name: tensors.pop(name), "has no '{name}'"),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:-1]}),
            r"{name} in .* has shape \(4,\), expected",
        ),
        (lambda tensors, name: tensors[name].fill_(torch.nan), "{name} in .* not finite"),
        (lambda tensors, name: tensors[name][0].fill_(torch.inf), "{name} in .* not finite"),
        (
            lambda tensors, name: tensors.update({name: tensors[name].int()}),
            "{name} in .* is int32, expected floating",
        ),
        (
            lambda tensors, name: tensors.update(post_enc=torch.zeros(1)),
            "also holds 1 tensors that this reader does not know, first 'post_enc'",
        ),
    ],
)
def test_a_damaged_tensor_is_named(to, change, text, exported):
    path = exported(to)
    file, name = TENSORS[to]
    edit(path / file, lambda tensors: change(tensors, name))
    refused(path, text.format(name=name))


@pytest.mark.parametrize("to", TENSORS)
def test_a_truncated_file_is_named(to, exported):
    path = exported(to)
    file = path / TENSORS[to][0]
    file.write_bytes(file.read_bytes()[:-5])
    refused(path, "is truncated or no safetensors file")


@pytest.mark.parametrize("to", TENSORS)
def test_a_missing_file_is_named(to, exported):
    path = exported(to)
    (path / TENSORS[to][0]).unlink()
    refused(path, r"no W_enc_1.safetensors|no sae_weights.safetensors|no model.safetensors or")


def test_circuit_tracer_configs_that_cannot_be(exported):
    path = exported("circuit-tracer") / "config.yaml"
    good = yaml.safe_load(path.read_text())
    for change, text in (
        ({"model_kind": "sae"}, "model_kind in .* is 'sae', known"),
        ({"feature_input_hook": None}, "feature_input_hook in .* must be str, got None"),
    ):
        path.write_text(yaml.safe_dump({**good, **change}))
        refused(path.parent, text)
    path.write_text("- a list")
    refused(path.parent, "must hold settings by name, got list")
    path.write_text("a: [1, 2")
    refused(path.parent, "cannot be read")
    path.write_text("!!python/object/apply:os.system ['true']")
    refused(path.parent, "cannot be read")


def test_circuit_tracer_negative_thresholds_and_gaps_are_refused(exported):
    path = exported("circuit-tracer")
    edit(path / "W_enc_2.safetensors", lambda tensors: tensors["threshold_2"][0].fill_(-0.5))
    refused(path, r"a threshold in .* is -0.5; below zero")
    (path / "W_enc_1.safetensors").unlink()
    refused(path, r"has 2 files W_enc_\*.safetensors but no W_enc_1.safetensors")


def test_circuit_tracer_thresholds_of_some_layers_only_are_refused(exported):
    path = exported("circuit-tracer")
    edit(path / "W_enc_2.safetensors", lambda tensors: tensors.pop("threshold_2"))
    refused(path, "has no 'threshold_2'")


def test_circuit_tracer_per_layer_topk(exported, tmp_path):
    path = exported("circuit-tracer", connectivity="plt", activation="topk", k=2)
    found = import_clt(path)
    assert (found.clt.config.activation, found.clt.config.k) == ("topk", 2)
    assert "keeps negative values among its 2 largest" in found.notes[0]
    assert import_clt(path, input_hook="blocks.{layer}.x").clt.config.input_hook == "blocks.{layer}.x"
    config = path / "config.yaml"
    good = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**good, "k": 6}))
    refused(path, "k in .* must be from 1 to 5, got 6")
    config.write_text(yaml.safe_dump({**good, "transcoders": ["hf://a/b/c.safetensors"]}))
    refused(path, "names 'hf://a/b/c.safetensors'; download")
    config.write_text(yaml.safe_dump({**good, "transcoders": 3}))
    refused(path, "transcoders in .* must be a list of files")


def test_circuit_tracers_skip_is_transposed(exported, draw, native):
    """Read from the files of later versions: x W_skip there, x W_skip^T here."""
    path = exported("circuit-tracer")
    plain = import_clt(path).clt
    skips = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        edit(
            path / f"W_enc_{layer}.safetensors",
            lambda tensors, layer=layer: tensors.update({f"W_skip_{layer}": skips[layer]}),
        )
    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    with_skip, without = native(import_clt(path).clt, x)[1], native(plain, x)[1]
    torch.testing.assert_close(with_skip - without, x.double() @ skips.double(), rtol=0, atol=1e-12)


def test_saelens_settings_that_cannot_be(exported):
    path = exported("saelens")
    file = path / "layer_1" / "cfg.json"
    good = json.loads(file.read_text())
    hooks = good["metadata"]
    for change, text in (
        ({"architecture": "topk"}, "all layers must be alike"),
        ({"d_sae": 6}, r"d_in, d_sae, d_out \(4, 6, 4\), layer 0 is"),
        ({"d_in": "4"}, "d_in in .* must be int, got '4'"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations in .* is 'layer_norm', and only 'none'",
        ),
        ({"metadata": {**hooks, "hook_name": "blocks.5.mlp.hook_in"}}, "one folder for each layer from 0"),
        ({"metadata": {**hooks, "hook_name": "embed"}}, "does not say which layer"),
        ({"metadata": {**hooks, "hook_name_out": "blocks.1.hook_attn_out"}}, "differ by its number only"),
    ):
        edit_json(file, **change)
        refused(path, text)
        file.write_text(json.dumps(good))
    refused(path / "layer_1", "is one layer of SAELens; give the directory")
    for layer in range(3):
        edit_json(path / f"layer_{layer}" / "cfg.json", architecture="topk")
    refused(path, "architecture in .* is 'topk', which is no transcoder")


def test_crosslayer_coding_settings_that_cannot_be(exported):
    path = exported("crosslayer-coding")
    file = path / "cfg.json"
    good = file.read_text()
    for change, text in (
        ({"activation_fn": "batchtopk"}, "depends on the whole batch; convert it to jumprelu"),
        ({"enable_feature_offset": True}, "enable_feature_offset in .* which no transcoder here has"),
        ({"decoder_tying": "all"}, "decoder_tying in .* is 'all', known"),
        ({"num_layers": 0}, "must be at least 1"),
        ({"num_layers": 4}, "has no 'encoder_module.encoders.3.weight'"),
        ({"d_model": 5}, r"has shape \(5, 4\), expected \(5, 5\)"),
        ({"num_features": True}, "num_features in .* must be int, got True"),
        ({"normalization_method": "mean_std"}, "norm_stats.json is not there; copy it"),
        ({"normalization_method": "unit"}, "normalization_method in .* is 'unit', known"),
        ({"tl_input_template": "blocks.0.hook"}, "must have {} for the layer"),
    ):
        edit_json(file, **change)
        refused(path, text)
        file.write_text(good)
    edit_json(file, tl_input_template="gone")
    assert "has no tl_input_template; taken is blocks.{layer}.mlp.hook_in" in import_clt(path).notes[0]
    named = import_clt(path, input_hook="blocks.{layer}.hook_resid_mid")
    assert named.clt.config.input_hook == "blocks.{layer}.hook_resid_mid"
    assert not any("tl_input_template" in note for note in named.notes)


def test_crosslayer_coding_checkpoints_have_to_be_named_where_there_are_several(exported):
    path = exported("crosslayer-coding")
    one = path / "clt_checkpoint_100.safetensors"
    (path / "model.safetensors").rename(one)
    assert import_clt(path).clt.config.n_layers == 3
    (path / "clt_checkpoint_200.safetensors").write_bytes(one.read_bytes())
    refused(path, "has 2 checkpoints; name one")
    assert import_clt(one).clt.config.n_layers == 3


def test_pickles_are_never_opened(exported, tmp_path):
    path = exported("crosslayer-coding")
    (path / "model.safetensors").unlink()
    (path / "clt_checkpoint_latest.pt").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(path, "clt_checkpoint_latest.pt may run code when it is opened")
    refused(path / "clt_checkpoint_latest.pt", "may run code when it is opened")


def test_directories_of_no_known_format(draw, tmp_path):
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "is it the right directory")
    config = TranscoderConfig(n_layers=1, d_model=2, n_features=2, activation="relu")
    save_clt(draw(config, 1), tmp_path / "own")
    refused(tmp_path / "own", "is a transcoder of this package already")
    export_clt(draw(config, 1), tmp_path / "out", "circuit-tracer")
    with pytest.raises(ConfigError, match=r"input_hook must be a hook point with {layer}"):
        import_clt(tmp_path / "out", input_hook="blocks.0.mlp.hook_in")


def test_nothing_is_overwritten_and_nothing_half_written_stays(draw, tmp_path, full_disk):
    config = TranscoderConfig(n_layers=2, d_model=16, n_features=64, activation="relu")
    clt = draw(config, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(MdlmError, match="exists and is not empty"):
        export_clt(clt, tmp_path / "out", "circuit-tracer")
    with full_disk(6000), pytest.raises(MdlmError, match="cannot be written"):
        export_clt(clt, tmp_path / "new", "circuit-tracer")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_values_beyond_float32_are_refused(draw, tmp_path):
    clt = draw(TranscoderConfig(n_layers=1, d_model=2, n_features=2, activation="relu"), 1)
    with torch.no_grad():
        clt.out_scale.fill_(1e-30)
        clt.W_dec[0].fill_(1e10)
    with pytest.raises(CheckpointError, match=r"W_dec_0 has values beyond float32, the largest 1e.40"):
        export_clt(clt, tmp_path / "out", "circuit-tracer")
    assert not (tmp_path / "out").exists()


def test_a_feature_count_that_differs_between_layers_is_refused(exported):
    path = exported("circuit-tracer")

    def shrink(tensors):
        for name in ("W_enc_1", "b_enc_1", "threshold_1"):
            tensors[name] = tensors[name][:3]

    edit(path / "W_enc_1.safetensors", shrink)
    refused(path, r"W_enc_1 in .* has shape \(3, 4\), expected \(5, 4\); is it of another")


def test_empty_tensors_and_metadata_that_is_none_are_refused(exported):
    path = exported("circuit-tracer")
    empty = {"W_enc_0": torch.zeros(0, 4), "b_enc_0": torch.zeros(0), "threshold_0": torch.zeros(0)}
    edit(path / "W_enc_0.safetensors", lambda tensors: tensors.update(empty))
    refused(path, r"W_enc_0 in .* is empty, of shape \(0, 4\)")


def test_saelens_without_metadata_takes_the_hook_points_that_the_user_names_or_refuses(exported):
    path = exported("saelens")
    for layer in range(3):
        edit_json(path / f"layer_{layer}" / "cfg.json", metadata=None)
    refused(path, "differ by its number only, got None, None, None; name them with")
    names = {"input_hook": "blocks.{layer}.mlp.hook_in", "output_hook": "blocks.{layer}.mlp.hook_out"}
    config = import_clt(path, input_hook=names["input_hook"], output_hook=names["output_hook"]).clt.config
    assert (config.input_hook, config.output_hook) == tuple(names.values())


def test_circuit_tracer_files_in_a_folder_of_their_own(exported):
    path = exported("circuit-tracer", connectivity="plt")
    config = path / "config.yaml"
    (path / "weights").mkdir()
    for layer in range(3):
        (path / f"layer_{layer}.safetensors").rename(path / "weights" / f"layer_{layer}.safetensors")
    names = [f"weights/layer_{layer}.safetensors" for layer in range(3)]
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "transcoders": names}))
    assert import_clt(path).clt.config.n_layers == 3


def test_all_thresholds_zero_is_a_relu(exported):
    path = exported("circuit-tracer")
    for layer in range(3):
        edit(path / f"W_enc_{layer}.safetensors", lambda tensors, i=layer: tensors[f"threshold_{i}"].zero_())
    assert import_clt(path).clt.config == replace(import_clt(path).clt.config, activation="relu")
