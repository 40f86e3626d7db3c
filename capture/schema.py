"""What an activation store consists of: the one place that knows array names, axes, chunks and the format.

    zarr.json                 group; attributes: format, schema_version, hooks, config, provenance
    manifest.json             what is committed; see manifest.py
    acts/<hook name>          [row, ...] float32; row = sequence * length + position
    rows/<column>             [row]
    seqs/<column>             [sequence]; the whole plan, written before the first row
    stats/<hook name>/<what>  [is_masked, t_bin, ...] float64; written when the store is complete

Every array is a plain Zarr v3 array with crc32c in each chunk, so that any Zarr reader opens it and a
damaged chunk is an error. `acts` have chunks of 256 rows inside shards: a shard file is the row-major
matrix, four checksum bytes after each chunk, and an index. What was never written reads as NaN or -1.
"""

# Axes: row, sequence, d (hidden_dim), head, d_head, mlp, vocab, is_masked (no, yes), t_bin

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from mdlm_interp.config import MDLMConfig

FORMAT = "mdlm-interp activations"
SCHEMA_VERSION = 1

CHUNK_ROWS = 256
"""Rows of activations that are read and checksummed together."""
SHARD_ROWS = 16384
"""Rows of a shard file, and rows between two commits; a multiple of CHUNK_ROWS."""
SEQUENCE_CHUNK = 65536
"""Sequences in one file of a `seqs` array."""
T_BINS = 10
"""Equal parts of [0, 1] that statistics tell apart."""


@dataclass(frozen=True)
class Column:
    """A one-dimensional array beside the activations."""

    dtype: str
    fill: float | int | bool
    """What was never written reads as."""
    description: str


ROW_COLUMNS = {
    "seq": Column("int64", -1, "number of the sequence"),
    "pos": Column("int64", -1, "position in the sequence"),
    "x0": Column("int64", -1, "token id of the clean text"),
    "xt": Column("int64", -1, "token id that the model read: x0, or the mask"),
    "is_masked": Column("bool", False, "whether xt is the mask"),
    "doc": Column("int64", -1, "running number of the document over all files; -1 for an added end-of-text"),
}
SEQUENCE_COLUMNS = {
    "t": Column("float64", float("nan"), "diffusion time, 0 clean to 1 all masked"),
    "sigma": Column("float64", float("nan"), "total noise at t, which a time-conditioned model reads"),
    "seed": Column("uint64", 0, "key of the masks, with the sequence's number"),
    "source": Column("int64", -1, "number of the file that the first document is from"),
    "offset": Column("int64", -1, "number of that document in its file"),
}

STATISTICS = ("count", "mean", "mean_square")

_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_ROW_AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("hook_embed", "hook_final_in", *_STREAM), ("d",)),
    **{f"{norm}.hook_scale": ("one",) for norm in ("ln1", "ln2", "ln_final")},
    **{f"{norm}.hook_normalized": ("d",) for norm in ("ln1", "ln2", "ln_final")},
    **{f"{branch}.{name}": ("d",) for branch in ("attn", "mlp") for name in ("hook_in", "hook_out")},
    **{f"attn.hook_{name}": ("head", "d_head") for name in ("q", "k", "v", "rot_q", "rot_k", "z")},
    **dict.fromkeys(("mlp.hook_pre", "mlp.hook_post"), ("mlp",)),
    "hook_logits": ("vocab",),
}
"""Axes after the row, by hook name without its block; hook points that are not here have no row a token."""


def row_axes(hook: str) -> tuple[str, ...] | None:
    """Names of a hook's axes after [batch pos], or None if it has no position axis or two of them."""
    return _ROW_AXES.get(re.sub(r"^blocks\.\d+\.", "", hook))


def row_shape(hook: str, model: MDLMConfig) -> tuple[int, ...]:
    """Sizes of those axes; the hook must have them."""
    sizes = {
        "d": model.hidden_dim,
        "one": 1,
        "head": model.n_heads,
        "d_head": model.d_head,
        "mlp": model.d_mlp,
        "vocab": model.vocab_size,
    }
    axes = row_axes(hook)
    assert axes is not None, hook
    return tuple(sizes[axis] for axis in axes)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of one store."""

    shapes: Mapping[str, tuple[int, ...]]
    """By hook name, in execution order: the shape of one row."""
    n_sequences: int
    length: int
    """Tokens per sequence."""

    @property
    def rows(self) -> int:
        """Rows of the complete store."""
        return self.n_sequences * self.length

    @property
    def shard_rows(self) -> int:
        """Rows of each shard but the last: SHARD_ROWS, or one shard when the run is small."""
        return min(SHARD_ROWS, -(-self.rows // CHUNK_ROWS) * CHUNK_ROWS)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all arrays."""
        columns = sum(np.dtype(column.dtype).itemsize for column in ROW_COLUMNS.values())
        return columns + sum(4 * int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the complete store, but for checksums and metadata (under 1 %)."""
        # A shard is written whole chunks at a time.
        rows = -(-self.rows // CHUNK_ROWS) * CHUNK_ROWS
        return rows * self.row_bytes + 40 * self.n_sequences


def create_arrays(group: zarr.Group, layout: Layout) -> dict[str, zarr.Array[Any]]:
    """Every array of `acts`, `rows` and `seqs`, full size and empty, by its path in the store.

    Write through these objects: that empty chunks are written is no metadata, an array opened again has
    zarr's default.
    """
    for parent in ("acts", "rows", "seqs"):
        group.create_group(parent)
    arrays = {
        f"acts/{hook}": _create(
            group,
            f"acts/{hook}",
            shape=(layout.rows, *shape),
            dtype="float32",
            chunks=(CHUNK_ROWS, *shape),
            shards=(layout.shard_rows, *shape),
            fill_value=float("nan"),
            dimension_names=("row", *(row_axes(hook) or ())),
        )
        for hook, shape in layout.shapes.items()
    }
    for name, column in ROW_COLUMNS.items():
        path = f"rows/{name}"
        arrays[path] = _create_column(group, path, column, layout.rows, layout.shard_rows, "row")
    chunk = min(layout.n_sequences, SEQUENCE_CHUNK)
    for name, column in SEQUENCE_COLUMNS.items():
        path = f"seqs/{name}"
        arrays[path] = _create_column(group, path, column, layout.n_sequences, chunk, "sequence")
    return arrays


def create_statistics(group: zarr.Group, hook: str, values: Mapping[str, NDArray[np.float64]]) -> None:
    """The arrays of one hook's statistics, filled."""
    parent = group.require_group(f"stats/{hook}")
    for name, value in values.items():
        axes = ("is_masked", "t_bin", *(row_axes(hook) or ()))[: value.ndim]
        options = {"shape": value.shape, "chunks": value.shape, "dimension_names": axes}
        array = _create(parent, name, dtype="float64", fill_value=float("nan"), **options)
        array[...] = value


def _create_column(
    parent: zarr.Group, name: str, column: Column, size: int, chunk: int, axis: str
) -> zarr.Array[Any]:
    return _create(
        parent,
        name,
        shape=(size,),
        dtype=column.dtype,
        chunks=(chunk,),
        fill_value=column.fill,
        dimension_names=(axis,),
        attributes={"description": column.description},
    )


def _create(parent: zarr.Group, name: str, **options: Any) -> zarr.Array[Any]:
    return parent.create_array(
        name=name,
        serializer=BytesCodec(endian="little"),
        filters=None,
        # Without a checksum in every chunk a flipped bit would read as a number.
        compressors=[Crc32cCodec()],
        # Otherwise a chunk of zeros, or of fill, would have no file: the same as one that was lost.
        config={"write_empty_chunks": True},
        **options,
    )


def file_of(array: str, ndim: int, shard: int) -> str:
    """Path in the store of an array's numbered shard (or unsharded chunk) of rows."""
    return "/".join([array, "c", str(shard), *["0"] * (ndim - 1)])


class ContentHash:
    """SHA-256 over name, dtype, shape and bytes of arrays; independent of chunks, shards and byte order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> None:
        """One array, in blocks along its first axis."""
        self._digest.update(f"{name} {dtype} {list(shape)}\n".encode())
        little = np.dtype(dtype).newbyteorder("<")
        for block in blocks:
            self._digest.update(np.ascontiguousarray(block, little).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The hash of everything added so far."""
        return self._digest.hexdigest()
