"""An export holds the store's bits and is read as the store is."""

import os
import stat
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import zarr

from capture import open_store
from capture.convert import ExportedStore, export_store
from capture.places import Place
from capture.reader import ActivationStore
from capture.row_numbers import Rows
from tests.capture.convert.checks import assert_same_bits, assert_same_content, opened, same_values
from tests.capture.convert.conftest import FORMATS
from tests.capture.stores import HEADS, MLP, Elsewhere, Plan, make_store


def read_back(store, out, to, **options) -> ExportedStore:
    export_store(store, out, to=to, **options)
    return opened(out)


def content(out: Path) -> dict[str, bytes]:
    """Bytes of all files of an export, by path in it."""
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("every_position", [True, False])
def test_an_export_holds_the_bits_of_the_store(another, tmp_path, to, dtype, every_position):
    store = another(Plan(shard_rows=256, dtype=dtype, every_position=every_position))
    assert len(store.manifest.shards) > 3
    found = read_back(store, tmp_path / "out", to)
    assert_same_content(found, store)
    assert found.positions == store.positions


def test_a_store_that_is_in_no_local_directory_is_exported(made, store, tmp_path, to):
    elsewhere = ActivationStore(cast(Place, Elsewhere(made.root)))
    assert_same_content(read_back(elsewhere, tmp_path / "out", to), store)


def test_many_sequences_are_divided_over_files(another, tmp_path, to):
    store = another(Plan(sequences=600, shard_rows=2048))
    found = read_back(store, tmp_path / "out", to)
    assert_same_content(found, store)
    if to == "safetensors":
        assert len(list(found.path.glob("sequences-*"))) == 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_not_a_number_keeps_its_bits(tmp_path, to, dtype):
    make_store(tmp_path / "run.zarr", Plan(dtype=dtype))
    acts = zarr.open_array(tmp_path / "run.zarr", path=f"acts/{MLP}")
    bits = [0x7F800001, 0xFFC12345, 0x80000000, 0x7F800000, 0x00000001]  # NaNs, -0.0, infinity, the smallest
    if dtype != "float32":
        bits = [0x7F81, 0xFFC1, 0x8000, 0x7F80 if dtype == "bfloat16" else 0x7C00, 0x0001]
    row = np.array(bits, np.uint32 if dtype == "float32" else np.uint16).view(acts.dtype)
    acts[300] = row
    found = read_back(open_store(tmp_path / "run.zarr"), tmp_path / "out", to)
    assert_same_bits(found.files.array(f"acts/{MLP}").read(300, 301)[0], row)
    assert found.fingerprint() == open_store(tmp_path / "run.zarr").fingerprint()


def test_rows_come_in_any_order_before_and_after_their_chunk_was_checked(store, tmp_path, to):
    rows = torch.randint(0, len(store), (400,), generator=torch.Generator().manual_seed(0))
    for read in ("read", "gather"):
        found = read_back(store, tmp_path / read, to)
        found.prefetch(rows)
        several: list[Rows] = [rows, rows[:3], rows.sort().values, slice(250, 700), slice(0, 0), []]
        for asked in several:
            for hook, expected in store.read(asked).items():
                assert torch.equal(getattr(found, read)(asked, hook)[hook], expected)
            for name, column in store.coords(asked).items():
                assert torch.equal(found.coords(asked)[name], column)


def test_sequences_tokens_and_times_are_the_stores(store, tmp_path, to):
    found = read_back(store, tmp_path / "out", to)
    assert all(map(torch.equal, found.tokens(), store.tokens()))
    assert torch.equal(found.times(), store.times())
    assert [found.sequence_rows(seq) for seq in range(60)] == [store.sequence_rows(seq) for seq in range(60)]
    row = 500
    coords = store.coords([row])
    assert found.row_of(int(coords["seq"]), int(coords["pos"])) == row


def test_what_is_committed_of_an_incomplete_store_is_exported(another, tmp_path, to):
    store = another(Plan(shard_rows=256, complete=False, committed_shards=2))
    found = read_back(store, tmp_path / "out", to, incomplete=True)
    assert not found.complete
    assert_same_content(found, store)
    last = slice(len(store) - 20, len(store))
    assert same_values(found.coords(last)["t"], store.coords(last)["t"])
    assert found.coords(last)["t"].isnan().any()


@pytest.mark.parametrize("first", FORMATS)
def test_an_export_of_an_export_is_the_same_as_one_of_the_store(store, tmp_path, to, first):
    export_store(store, tmp_path / "first", to=first)
    export_store(tmp_path / "first", tmp_path / "a", to=to)
    export_store(store, tmp_path / "b", to=to)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_an_export_says_what_it_is_and_how_large(store, tmp_path, to):
    out = tmp_path / "new" / "out"
    export = export_store(str(store.path), str(out), to=to)
    found = opened(out)
    size = sum(map(len, content(out).values()))
    assert (export.path, export.size, found.bytes_on_disk) == (out, size, size)
    assert (export.rows, export.sequences, export.hooks) == (len(store), 60, store.hooks)
    assert found.path == out
    assert repr(found) == f"ActivationStore('{out}', {len(store)} rows, 3 hooks, complete)"
    assert found.source == {
        "rows": [0, len(store)],
        "sequences": [0, 60],
        "of_rows": len(store),
        "dtype": "float32",
    }
    assert found.verify() == (len(content(out)), size)


def test_others_may_read_an_export_as_any_file_of_this_user(store, tmp_path, to):
    plain = tmp_path / "plain"
    plain.touch()
    export_store(store, tmp_path / "out", to=to)
    files = [tmp_path / "out"] if to == "hdf5" else list((tmp_path / "out").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {stat.S_IMODE(plain.stat().st_mode)}


def test_a_forked_process_reads_on(store, tmp_path, to):
    found = read_back(store, tmp_path / "out", to)
    expected = store.read(slice(0, 700), HEADS)[HEADS]
    found.read(slice(0, 100), HEADS)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(found.read(slice(0, 700), HEADS)[HEADS], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(found.read(slice(0, 700), HEADS)[HEADS], expected)
