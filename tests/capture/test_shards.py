"""Shard files written front to back are, byte for byte, the files that zarr-python writes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture import schema
from capture.schema import Layout, StoredType
from capture.shards import Piece, ShardEncoder, column_chunk, index_bytes, shard_digest
from mdlm_interp.errors import StoreError
from tests.capture.stores import stored_values

SHARD_ROWS = 768
HOOKS = {"blocks.0.hook_mlp_out": (5,), "blocks.0.attn.hook_z": (2, 3), "ln_final.hook_scale": (1,)}
ROWS = {
    "one row": 1,
    "part of a chunk": 100,
    "one chunk": 256,
    "chunks and a part": 600,
    "a full shard": 768,
    "a shard and one row": 769,
    "two shards and a part of a chunk": 1800,
    "two full shards": 1536,
}


def content(pieces: list[Piece]) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def encoded(values: NDArray[Any], layout: Layout, hook: str, portions: list[int]) -> bytes:
    """One shard file, its rows given in portions that end at these numbers."""
    encoder = ShardEncoder(layout.shard_shape(hook))
    ends = sorted({0, *(end for end in portions if end < len(values)), len(values)})
    pieces = [piece for start, stop in pairwise(ends) for piece in encoder.encode(values[start:stop])]
    return content([*pieces, *encoder.finish()])


def zarrs_files(root: Path, layout: Layout, values: dict[str, NDArray[Any]]) -> None:
    """The same rows by zarr-python."""
    rows = len(next(iter(values.values())))
    with zarr.config.set({"array.write_empty_chunks": True}):
        schema.create_row_arrays(zarr.create_group(root), layout, rows)
        for name, array in values.items():
            zarr.open_array(root, path=name)[...] = array


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_file_is_byte_identical_to_zarr_pythons(tmp_path: Path, rows: int, dtype: StoredType):
    rng = np.random.default_rng(rows)
    layout = Layout(shapes=HOOKS, length=9, dtype=dtype, shard_rows=SHARD_ROWS)
    values = {}
    for hook, shape in HOOKS.items():
        acts = rng.standard_normal((rows, *shape)).astype(np.float32)
        acts[rows // 2 :] = 0  # chunks of zeros, and of fill, must have bytes as well
        acts[rows // 3] = np.nan
        values[f"acts/{hook}"] = stored_values(acts, dtype)[0]
    zarrs_files(tmp_path / "zarr", layout, values)
    for hook, shape in HOOKS.items():
        array = values[f"acts/{hook}"]
        files = sorted((tmp_path / "zarr" / "acts" / hook).glob("c.*"))
        assert len(files) == -(-rows // SHARD_ROWS)
        for number in range(len(files)):
            part = array[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
            file = tmp_path / "zarr" / schema.file_of(f"acts/{hook}", 1 + len(shape), number)
            ours = encoded(part, layout, hook, [3, 255, 256, 300, 511, 700])
            assert ours == file.read_bytes(), (hook, number)


@given(st.lists(st.integers(1, 599), max_size=9))
def test_portions_of_any_size_give_the_same_file(portions):
    layout = Layout(shapes=HOOKS, length=9, shard_rows=SHARD_ROWS)
    values = np.random.default_rng(0).standard_normal((600, 2, 3)).astype(np.float32)
    hook = "blocks.0.attn.hook_z"
    assert encoded(values, layout, hook, portions) == encoded(values, layout, hook, [])


def test_rows_that_lie_otherwise_in_memory_give_the_same_file():
    layout = Layout(shapes=HOOKS, length=9, shard_rows=SHARD_ROWS)
    values = np.random.default_rng(0).standard_normal((300, 2, 3)).astype(np.float32)
    hook = "blocks.0.attn.hook_z"
    across = np.asfortranarray(values)
    assert not across.flags.c_contiguous
    assert encoded(across, layout, hook, []) == encoded(values, layout, hook, [])


@pytest.mark.parametrize("rows", [1, 500, 768, 1000])
@pytest.mark.parametrize("name", schema.ROW_COLUMNS)
def test_columns_are_byte_identical_to_zarr_pythons(tmp_path: Path, name: str, rows: int):
    column = schema.ROW_COLUMNS[name]
    values = np.random.default_rng(rows).integers(0, 2, rows).astype(column.dtype)
    values[rows // 2 :] = column.fill
    layout = Layout(shapes={}, length=9, shard_rows=SHARD_ROWS)
    zarrs_files(tmp_path / "zarr", layout, {f"rows/{name}": values})
    for number in range(-(-rows // SHARD_ROWS)):
        part = values[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        ours, checksum = column_chunk(part, SHARD_ROWS, column.fill)
        assert ours == (tmp_path / "zarr" / "rows" / name / f"c.{number}").read_bytes()
        assert ours[-4:] == checksum.to_bytes(4, "little")


def test_checksums_are_those_between_the_chunks():
    layout = Layout(shapes=HOOKS, length=9, shard_rows=SHARD_ROWS)
    shape = layout.shard_shape("blocks.0.hook_mlp_out")
    encoder = ShardEncoder(shape)
    pieces = encoder.encode(np.random.default_rng(0).standard_normal((600, 5)).astype(np.float32))
    data = content([*pieces, *encoder.finish()])
    size = shape.chunk_bytes + 4
    assert len(data) == 3 * size + shape.index_bytes
    stored = [int.from_bytes(data[i * size + size - 4 : i * size + size], "little") for i in range(3)]
    assert (encoder.rows, encoder.checksums) == (600, stored)
    assert data.endswith(index_bytes(shape, 3))


def test_the_digest_changes_with_any_name_or_checksum():
    checksums = {"acts/a": [1, 2], "rows/b": [3]}
    others = [
        {"acts/a": [2, 1], "rows/b": [3]},
        {"acts/a": [1, 2, 3], "rows/b": []},
        {"acts/a": [1, 2], "rows/c": [3]},
        {"acts/a": [1, 2]},
    ]
    assert shard_digest(dict(reversed(checksums.items()))) == shard_digest(checksums)
    assert len({shard_digest(other) for other in [checksums, *others]}) == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 5)), r"a shard of float32 \[5\] rows got float64 \[5\] rows"),
        (np.zeros((3, 4), np.float32), r"a shard of float32 \[5\] rows got float32 \[4\] rows"),
        (np.zeros((769, 5), np.float32), r"a shard of 768 rows got 769"),
    ],
)
def test_rows_that_do_not_fit_are_refused(values, message):
    layout = Layout(shapes=HOOKS, length=9, shard_rows=SHARD_ROWS)
    with pytest.raises(StoreError, match=message):
        ShardEncoder(layout.shard_shape("blocks.0.hook_mlp_out")).encode(values)
