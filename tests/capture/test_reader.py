"""A store reads back what was written, in any order, and says so when it cannot."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from capture import ActivationStore, CaptureConfig, open_store, run_capture
from mdlm_interp.errors import StoreError

HOOK = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def original(
    model_directory: Path, texts: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """504 rows in eight shards; what `config` with `small_shards` captures."""
    out = tmp_path_factory.mktemp("store") / "run.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capture.schema.CHUNK_ROWS", 16)
        patch.setattr("capture.schema.SHARD_ROWS", 64)
        return run_capture(
            CaptureConfig(
                model=str(model_directory), files=texts, out=out, length=24, max_sequences=21, seed=5
            )
        )


@pytest.fixture
def store(original: ActivationStore, tmp_path: Path) -> ActivationStore:
    """A copy that the test may damage."""
    return open_store(shutil.copytree(original.path, tmp_path / "run.zarr"))


def plain(store: ActivationStore, name: str) -> NDArray[Any]:
    """An array as zarr-python alone reads it."""
    return np.asarray(zarr.open_array(store.path / name, mode="r")[...])


def shard(store: ActivationStore, number: int, name: str = f"acts/{HOOK}") -> Path:
    return store.path / name / "c" / str(number) / ("0" if name.startswith("acts") else "")


def flip(file: Path, byte: int) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def test_plain_zarr_sees_the_same_numbers(store):
    for name, values in store.read(slice(None)).items():
        array = zarr.open_array(store.path / "acts" / name, mode="r")
        assert (array.shape, array.chunks, array.shards) == ((504, 32), (16, 32), (64, 32))
        assert array.metadata.to_dict()["dimension_names"] == ("row", "d")
        assert array.dtype == np.float32
        assert np.array_equal(plain(store, f"acts/{name}"), values.numpy())
    coords = store.coords(slice(None))
    for name in ("seq", "pos", "x0", "xt", "is_masked", "doc"):
        assert np.array_equal(plain(store, f"rows/{name}"), coords[name].numpy())
    assert np.array_equal(plain(store, "seqs/t"), store.times().numpy())
    for hook in store.hooks:
        assert np.array_equal(plain(store, f"stats/{hook}/count"), store.statistics(hook).count.numpy())
    attributes = zarr.open_group(store.path, mode="r").attrs
    assert attributes["format"] == "mdlm-interp activations"
    assert attributes["schema_version"] == 1
    assert attributes["hooks"] == list(store.hooks)


def test_a_run_of_default_size_has_chunks_of_256_rows_in_one_shard(config):
    array = zarr.open_array(run_capture(config).path / "acts" / HOOK, mode="r")
    assert (array.chunks, array.shards) == ((256, 32), (512, 32))


def test_statistics_equal_numpy_in_float64(store):
    coords = {name: values.numpy() for name, values in store.coords(slice(None)).items()}
    for hook in store.hooks:
        found = store.statistics(hook)
        acts = store.read(slice(None), hook)[hook].numpy().astype(np.float64)
        for masked in (0, 1):
            for t_bin in range(10):
                low, high = t_bin / 10, (t_bin + 1) / 10
                rows = (coords["is_masked"] == masked) & (coords["t"] >= low) & (coords["t"] < high)
                assert found.count[masked, t_bin] == rows.sum()
                if not rows.any():
                    assert found.mean[masked, t_bin].isnan().all()
                    continue
                mean, mean_square = acts[rows].mean(axis=0), (acts[rows] ** 2).mean()
                # Relative to the row's scale: a mean near zero is a difference of larger numbers.
                error = np.abs(found.mean[masked, t_bin].numpy() - mean).max()
                assert error <= 1e-12 * np.sqrt(mean_square)
                assert abs(float(found.mean_square[masked, t_bin]) - mean_square) <= 1e-12 * mean_square
        count, mean, mean_square = found.pooled()
        assert count == len(store)
        np.testing.assert_allclose(mean.numpy(), acts.mean(axis=0), rtol=0, atol=1e-12 * np.sqrt(mean_square))
        np.testing.assert_allclose(mean_square, (acts**2).mean(), rtol=1e-12)


def test_statistics_of_per_head_hooks_keep_the_head_axis(config):
    hook = "blocks.0.attn.hook_z"
    store = run_capture(replace(config, hooks=(hook,)))
    assert store.statistics(hook).mean.shape == (2, 10, 2, 16)


def test_statistics_of_an_incomplete_store_are_those_of_its_committed_rows(store):
    complete = store.statistics(HOOK)
    edit_manifest(store, complete=False)
    again = open_store(store.path).statistics(HOOK)
    assert torch.equal(again.count, complete.count)
    assert torch.equal(again.mean.nan_to_num(7), complete.mean.nan_to_num(7))
    assert torch.equal(again.mean_square.nan_to_num(7), complete.mean_square.nan_to_num(7))


@pytest.mark.parametrize(
    "rows",
    [
        [0],
        [503, 0, 64, 63, 0],
        [5, 6, 7],
        [7, 6, 5, 5],
        range(500, 2, -3),
        (63, 64),
        np.array([400, 1, 400], np.int32),
        np.arange(10, 200, dtype=np.uint16),
        torch.tensor([9, 8, 100]),
        [],
    ],
)
def test_rows_come_in_the_order_asked_for_with_repeats(store, rows):
    index = torch.as_tensor(np.asarray(rows).astype(np.int64))
    whole = store.read(slice(None))
    for name, values in store.read(rows).items():
        assert values.dtype == torch.float32
        assert torch.equal(values, whole[name][index])
    coords = store.coords(slice(None))
    for name, values in store.coords(rows).items():
        assert torch.equal(values, coords[name][index])


@pytest.mark.parametrize("long_run", [1, 8, 10**6])
def test_runs_of_rows_read_as_single_rows_do(store, monkeypatch, long_run):
    monkeypatch.setattr("capture.reader.LONG_RUN", long_run)
    rows = [*range(10, 40), *range(63, 66), 67, *range(100, 180), 503]
    whole = store.read(slice(None), HOOK)[HOOK]
    assert torch.equal(store.read(rows, HOOK)[HOOK], whole[rows])
    assert torch.equal(store.read(rows[::-1], HOOK)[HOOK], whole[rows[::-1]])


@pytest.mark.parametrize(
    "rows", [slice(60, 70), slice(0, 0), slice(503, 504), slice(None, 16), slice(64, None)]
)
def test_slices_read_as_python_slices_do(store, rows):
    whole = store.read(slice(None), HOOK)[HOOK]
    assert torch.equal(store.read(rows, HOOK)[HOOK], whole[rows])


def test_what_is_read_is_the_callers_own(store):
    before = store.read(slice(0, 4), HOOK)[HOOK].clone()
    store.read(slice(0, 4), HOOK)[HOOK].zero_()
    store.times().zero_()
    assert torch.equal(store.read(slice(0, 4), HOOK)[HOOK], before)
    assert (store.times() > 0).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 504], r"rows must lie in [0, 504), got 504"),
        ([3, -1], r"rows must lie in [0, 504), got -1"),
        (slice(500, 505), r"a slice from 500 to 505 must lie in [0, 504), got 505"),
        (slice(-4, None), r"a slice from -4 to 504 must lie in [0, 504), got -4"),
        (slice(0, 9, 2), "a slice of rows must have step 1, got 2; pass range(...) instead"),
        (torch.tensor([0.5]), "rows must be a list of whole numbers, got float32 [1]"),
        (torch.tensor([[1]]), "rows must be a list of whole numbers, got int64 [1, 1]"),
        (torch.tensor([True]), "got bool [1]; of a mask, pass mask.nonzero()"),
    ],
)
def test_rows_that_are_not_there_are_refused_with_the_range(store, rows, message):
    for read in (store.read, store.coords):
        with pytest.raises(StoreError) as caught:
            read(rows)
        assert message in str(caught.value)


def test_an_unknown_hook_is_refused_with_the_nearest(store):
    message = "holds no hook 'blocks.1.hook_mlp_ot'; did you mean 'blocks.1.hook_mlp_out'?"
    for read in (lambda name: store.read([0], name), store.statistics, store.row_shape):
        with pytest.raises(StoreError) as caught:
            read("blocks.1.hook_mlp_ot")
        assert message in str(caught.value)


@pytest.mark.parametrize("byte", [0, 40 * 4, -1, -40], ids=["data", "data later", "index checksum", "index"])
def test_one_flipped_bit_is_an_error_that_names_the_file(store, byte):
    file = shard(store, 2)
    flip(file, byte)
    damaged = open_store(store.path)
    for rows in (slice(0, 200), [500, 128]):
        with pytest.raises(StoreError) as caught:
            damaged.read(rows)
        assert f"{file} is damaged" in str(caught.value)
        assert "restore it from a copy or capture again" in str(caught.value)
    with pytest.raises(StoreError, match="is damaged"):
        damaged.fingerprint()
    assert torch.equal(damaged.read(slice(0, 128), HOOK)[HOOK], store.read(slice(0, 128), HOOK)[HOOK])


@pytest.mark.parametrize("name", ["rows/xt", "seqs/t"])
def test_a_flipped_bit_in_the_coordinates_is_noticed(store, name):
    file = shard(store, 0, name)
    flip(file, 3)
    with pytest.raises(StoreError, match="is damaged"):
        open_store(store.path).coords([1])


def test_a_truncated_shard_is_noticed(store):
    file = shard(store, 0)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match="is damaged"):
        open_store(store.path).read([1])


def test_a_missing_shard_is_noticed_though_zarr_would_read_fill(store):
    shard(store, 3).unlink()
    damaged = open_store(store.path)
    for rows in (slice(190, 200), [1, 200, 500]):
        with pytest.raises(StoreError, match=r"c/3/0 is missing; restore it from a copy or capture again"):
            damaged.read(rows, HOOK)


def test_values_equal_to_the_fill_are_stored_all_the_same(config):
    store = run_capture(replace(config, seed=0, times="fixed", time=0.0))
    assert not store.coords(slice(None))["is_masked"].any()
    assert (plain(store, "seqs/seed") == 0).all()
    assert store.fingerprint() == open_store(store.path).fingerprint()


def edit_manifest(store: ActivationStore, **changes: object) -> None:
    path = store.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_only_committed_rows_are_read(store):
    edit_manifest(store, complete=False, committed_rows=120)
    partial = open_store(store.path)
    assert (len(partial), partial.n_sequences, partial.complete) == (120, 5, False)
    assert partial.times().shape == (5,)
    assert partial.tokens()[1].shape == (5, 24)
    assert partial.read(slice(None), HOOK)[HOOK].shape == (120, 32)
    assert partial.fingerprint() != store.fingerprint()
    with pytest.raises(StoreError, match=r"got 120; the store is incomplete, 120 of 504 rows are committed"):
        partial.read([120])


def test_an_incomplete_last_sequence_counts_nowhere(store):
    edit_manifest(store, complete=False, committed_rows=480)
    assert open_store(store.path).statistics(HOOK).count.sum() == 480


@pytest.mark.parametrize("n_sequences", [21, 20])
def test_the_fingerprint_is_a_plain_hash_of_names_shapes_and_bytes(store, n_sequences):
    edit_manifest(store, complete=n_sequences == 21, committed_rows=24 * n_sequences)
    digest = hashlib.sha256()
    rows = ["seq", "pos", "x0", "xt", "is_masked", "doc"]
    names = [f"acts/{name}" for name in store.hooks] + [f"rows/{name}" for name in rows]
    for name in [*names, *(f"seqs/{name}" for name in ("t", "sigma", "seed", "source", "offset"))]:
        values = plain(store, name)[: n_sequences if name.startswith("seqs") else 24 * n_sequences]
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode() + values.tobytes())
    assert open_store(store.path).fingerprint() == digest.hexdigest()


def test_a_store_without_committed_rows_opens_and_is_empty(store):
    edit_manifest(store, complete=False, committed_rows=0, shards=[])
    empty = open_store(store.path)
    assert len(empty) == 0
    assert empty.read(slice(None), HOOK)[HOOK].shape == (0, 32)
    assert empty.tokens()[0].shape == (0, 24)
    assert empty.statistics(HOOK).count.sum() == 0


def test_manifest_says_which_rows_each_shard_holds(store):
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("schema_version", "complete", "committed_rows")} == {
        "schema_version": 1,
        "complete": True,
        "committed_rows": 504,
    }
    assert (manifest["n_sequences"], manifest["length"]) == (21, 24)
    assert [entry["rows"] for entry in manifest["shards"]] == [
        [i, min(i + 64, 504)] for i in range(0, 504, 64)
    ]
    assert sum(entry["n_sequences"] for entry in manifest["shards"]) == 21
    assert len({entry["sha256"] for entry in manifest["shards"]}) == 8
    assert not list(store.path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json: it is no activation store, or its capture died before the first row"),
        ("{", "manifest.json is damaged (Expecting property name"),
        ("[]", "manifest.json is damaged (no JSON object)"),
        ('{"schema_version": 1}', "manifest.json is damaged (KeyError: 'shards')"),
        ('{"schema_version": 2}', "has schema_version 2, this package reads up to 1; update mdlm-interp"),
        ('{"schema_version": "1"}', "has schema_version '1', expected a whole number from 1; is it damaged?"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(store, content, message):
    path = store.path / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(StoreError) as caught:
        open_store(store.path)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["zarr.json", f"acts/{HOOK}/zarr.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_damaged_metadata_is_refused_with_its_file(store, name, content):
    path = store.path / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(StoreError) as caught:
        open_store(store.path).read([0])
    assert f"{path} is missing or damaged" in str(caught.value)


def test_another_programs_zarr_group_is_refused(store, tmp_path):
    zarr.create_group(tmp_path / "other.zarr")
    shutil.copy(store.path / "manifest.json", tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="is a Zarr group, but not one of 'mdlm-interp activations'"):
        open_store(tmp_path / "other.zarr")


def test_attributes_that_lack_a_part_are_refused(store):
    del zarr.open_group(store.path).attrs["hooks"]
    with pytest.raises(StoreError, match=r"zarr.json lacks the attribute 'hooks'; restore it from a copy"):
        open_store(store.path)


def test_a_store_of_a_later_version_is_refused(store):
    zarr.open_group(store.path).attrs["schema_version"] = 2
    with pytest.raises(StoreError, match=r"zarr.json has schema_version 2, this package reads up to 1"):
        open_store(store.path)


def test_a_path_that_is_no_store_is_refused_with_the_nearest(store):
    with pytest.raises(StoreError, match=r"runs.zarr does not exist; did you mean 'run.zarr'\?"):
        open_store(store.path.parent / "runs.zarr")
    with pytest.raises(StoreError, match=r"manifest.json is a file, not a store"):
        open_store(store.path / "manifest.json")
