"""What a capture records is the model's own activations on text that seed and number alone decide."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from capture import CaptureConfig, run_capture
from capture.forward import Forward, last_block_needed
from capture.native import on_threads
from capture.places import Directory
from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, sequence_times
from mdlm_interp.documents import TokenBlock, read_documents, token_blocks
from mdlm_interp.errors import StoreError
from mdlm_interp.model import all_hook_names

PER_HEAD = ("blocks.1.attn.hook_q", "blocks.*.attn.hook_z", "blocks.0.ln1.hook_scale", "hook_logits")


def recomputed(config: CaptureConfig) -> tuple[list[TokenBlock], Tensor, Tensor, Tensor]:
    """The blocks, x0, xt and t of a capture, all sequences at once and without its code."""
    tokenizer = load_tokenizer(config.model)
    documents = read_documents(config.files)
    blocks = list(islice(token_blocks(documents, tokenizer, config.length or 0, wrap=config.wrap), 21))
    x0 = torch.stack([torch.from_numpy(block.ids) for block in blocks])
    t = sequence_times(config.seed, range(21))
    move = LogLinearSchedule().move_chance(t)
    return blocks, x0, corrupt(x0, move, tokenizer.mask_id, seed=config.seed, indices=range(21)), t


def test_coordinates_equal_a_direct_recomputation(config, small_shards):
    store = run_capture(config)
    blocks, x0, xt, t = recomputed(config)
    assert len(store) == 504
    assert store.n_sequences == 21
    coords = store.coords(slice(None))
    assert torch.equal(coords["seq"], torch.arange(504) // 24)
    assert torch.equal(coords["pos"], torch.arange(504) % 24)
    assert torch.equal(coords["x0"], x0.flatten())
    assert torch.equal(coords["xt"], xt.flatten())
    assert torch.equal(coords["is_masked"], (xt == load_tokenizer(config.model).mask_id).flatten())
    assert torch.equal(coords["doc"], torch.from_numpy(np.concatenate([block.documents for block in blocks])))
    assert torch.equal(coords["t"], t.repeat_interleave(24))
    assert all(torch.equal(*pair) for pair in zip(store.tokens(), (x0, xt), strict=True))
    assert torch.equal(store.times(), t)
    assert 0.3 < coords["is_masked"].double().mean() < 0.7


def test_sequence_columns_hold_the_plan(config):
    store = run_capture(config)
    blocks, _, _, t = recomputed(config)
    seqs = {
        name: np.asarray(zarr.open_array(store.path / "seqs" / name, mode="r")[...])
        for name in ("sigma", "seed", "source", "offset")
    }
    assert np.array_equal(seqs["sigma"], LogLinearSchedule().sigma(t).numpy())
    assert np.array_equal(seqs["seed"], np.full(21, 5, np.uint64))
    assert seqs["source"].tolist() == [block.source for block in blocks]
    assert seqs["offset"].tolist() == [block.offset for block in blocks]


@pytest.mark.parametrize(
    "hooks", [("blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"), PER_HEAD, ("hook_embed",)]
)
def test_activations_are_bitwise_those_of_run_with_cache_on_the_same_batch(config, small_shards, hooks):
    store = run_capture(replace(config, hooks=hooks))
    model = HookedMDLM.from_pretrained(config.model)
    _, _, xt, _ = recomputed(config)
    for first in (0, 16):
        batch = xt[first : first + 16]
        with torch.inference_mode(), on_threads(store.provenance["threads"]):
            _, cache = model.run_with_cache(batch, hooks)
        found = store.read(slice(first * 24, first * 24 + batch.numel()))
        assert list(found) == list(cache) == list(store.hooks)
        for name, values in found.items():
            assert torch.equal(values, cache[name].flatten(0, 1)), name
            assert store.row_shape(name) == tuple(values.shape[1:])


def test_per_head_rows_keep_their_head_axis(config):
    store = run_capture(replace(config, hooks=PER_HEAD))
    shapes = {name: tuple(values.shape) for name, values in store.read([3, 1]).items()}
    assert shapes["blocks.1.attn.hook_q"] == (2, 2, 16)
    assert shapes["blocks.0.ln1.hook_scale"] == (2, 1)
    assert shapes["hook_logits"] == (2, 301)


def test_batch_size_changes_tokens_times_and_masks_not_at_all_and_activations_by_rounding(capture):
    stores = [capture(batch_size=size) for size in (1, 3, 16)]
    reference, others = stores[0], stores[1:]
    for other in others:
        for name, values in reference.coords(slice(None)).items():
            assert torch.equal(values, other.coords(slice(None))[name]), name
        for name, values in reference.read(slice(None)).items():
            # float32 sums in another order: values are around 1 and 1e-5 is tens of roundings.
            torch.testing.assert_close(other.read(slice(None))[name], values, rtol=0, atol=1e-5)


def test_the_same_run_has_the_same_fingerprint_and_another_seed_another(capture):
    first, again, other = capture(), capture(), capture(seed=6)
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()


def test_the_fingerprint_does_not_depend_on_shards(capture, monkeypatch):
    one_shard = capture()
    monkeypatch.setattr("capture.schema.CHUNK_ROWS", 16)
    monkeypatch.setattr("capture.schema.SHARD_ROWS", 64)
    eight = capture()
    assert (len(one_shard.manifest.shards), len(eight.manifest.shards)) == (1, 8)
    assert one_shard.fingerprint() == eight.fingerprint()


@pytest.mark.parametrize(("time", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 0.98, 1.0)])
def test_fixed_time_masks_that_share(config, time, low, high):
    store = run_capture(replace(config, times="fixed", time=(time,)))
    assert torch.equal(store.times(), torch.full((21,), time, dtype=torch.float64))
    assert low <= float(store.coords(slice(None))["is_masked"].double().mean()) <= high


def test_unwrapped_blocks_hold_text_only(config):
    tokenizer = load_tokenizer(config.model)
    wrapped, plain = (
        run_capture(replace(config, wrap=wrap, out=f"{config.out}-{wrap}")) for wrap in (True, False)
    )
    assert (wrapped.tokens()[0][:, [0, -1]] == tokenizer.eos_id).all()
    assert not (plain.tokens()[0][:, [0, -1]] == tokenizer.eos_id).all()
    assert (wrapped.coords(slice(0, 24))["doc"][[0, -1]] == -1).all()


def test_length_defaults_to_the_context_and_max_sequences_to_all_the_text(config):
    store = run_capture(replace(config, length=None, max_sequences=None))
    tokenizer = load_tokenizer(config.model)
    assert store.length == 32
    assert store.n_sequences == sum(1 for _ in token_blocks(read_documents(config.files), tokenizer, 32))
    assert store.config["length"] == 32
    assert store.config["tokenizer"] == config.model


def test_a_time_conditioned_model_gets_sigma(config, tmp_path, model_directory):
    base = HookedMDLM.from_pretrained(model_directory)
    model = HookedMDLM(replace(base.config, time_conditioning=True))
    model.load_state_dict(base.state_dict())
    model.save_pretrained(tmp_path / "timed")
    load_tokenizer(model_directory).save(tmp_path / "timed")
    store = run_capture(replace(config, model=str(tmp_path / "timed"), max_sequences=4))
    _, xt, t = (values[:4] for values in recomputed(config)[1:])
    with torch.inference_mode():
        _, cache = model.eval().run_with_cache(xt, store.hooks, timesteps=LogLinearSchedule().sigma(t))
    for name, values in store.read(slice(None)).items():
        assert torch.equal(values, cache[name].flatten(0, 1))


def test_provenance_names_every_input_by_hash(config, model_directory):
    record = run_capture(config).provenance
    assert record["weights_sha256"] == sha256_of(model_directory / "model.safetensors")
    assert record["tokenizer_sha256"] == load_tokenizer(model_directory).sha256
    assert record["sources"] == [
        {"file": str(file), "sha256": sha256_of(file), "bytes": file.stat().st_size} for file in config.files
    ]
    assert record["seed"] == 5
    assert record["batch_shape"] == [16, 24]
    assert record["arithmetic"] == "native"
    assert record["schedule"] == {"name": "log-linear", "eps": 1e-3, "min_time": 1e-3}
    # Two forward passes share them.
    assert record["threads"] == max(1, torch.get_num_threads() // 2)
    assert record["versions"]["torch"] == torch.__version__
    assert {"mdlm_interp", "numpy", "zarr"} <= set(record["versions"])


@pytest.mark.parametrize(
    ("hooks", "stop"),
    [
        (["hook_embed"], 0),
        (["hook_embed", "blocks.0.hook_mlp_out"], 1),
        (["blocks.10.hook_resid_post", "blocks.2.mlp.hook_in"], 11),
        (["blocks.1.mlp.hook_in", "hook_final_in"], None),
        (["ln_final.hook_scale"], None),
    ],
)
def test_the_pass_goes_no_further_than_the_last_hook(hooks, stop):
    assert last_block_needed(hooks) == stop


def test_every_hook_point_has_the_row_shape_that_the_schema_says_or_is_refused(model_directory):
    from capture.schema import row_axes, row_shape

    model = HookedMDLM.from_pretrained(model_directory)
    _, cache = model.run_with_cache(torch.zeros(3, 5, dtype=torch.int64))
    assert list(cache) == all_hook_names(2)
    for name, value in cache.items():
        if row_axes(name) is None:
            assert value.shape[:2] != (3, 5), name
        else:
            assert tuple(value.shape) == (3, 5, *row_shape(name, model.config)), name


def test_an_output_below_missing_directories_is_made(config, tmp_path):
    out = tmp_path / "a" / "b" / "run.zarr"
    assert run_capture(replace(config, out=str(out))).path == out


def no_pass(*_: object, **__: object) -> None:
    raise AssertionError("a forward pass was run")


def test_nothing_is_forecast_for_a_store_that_is_complete(config, monkeypatch, capsys):
    assert run_capture(config, progress=True).complete
    assert capsys.readouterr().err.startswith(f"{config.out}: about 504 rows of 21 sequences, ")
    monkeypatch.setattr(Forward, "__call__", no_pass)
    assert run_capture(config, progress=True).complete
    assert capsys.readouterr().err == ""


def test_a_disk_without_room_is_refused_before_a_pass_is_run_or_a_file_made(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Forward, "__call__", no_pass)
    monkeypatch.setattr(Directory, "free_bytes", lambda self: 1000)
    out = tmp_path / "below" / "run.zarr"
    with pytest.raises(StoreError, match=r"its disk has 1\.0 kB free"):
        run_capture(replace(config, out=str(out)), progress=True)
    assert list(tmp_path.iterdir()) == []
