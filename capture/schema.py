"""What an activation store consists of: the one place that knows array names, axes, chunks and the format.

    zarr.json                 group; attributes: format, schema_version, hooks, dtype, config, provenance
    manifest.json             what is committed; see manifest.py
    acts/<hook name>          [row, ...] float32, float16, or bfloat16 kept as uint16
    rows/<column>             [row]
    seqs/<column>             [sequence] or [sequence, pos]; written when the store is complete
    stats/<hook name>/<what>  [is_masked, t_bin, ...] float64; written when the store is complete
    pending/                  only until then: what seqs and stats are made of, a file a shard

Every array is a plain Zarr v3 array with crc32c in each chunk, so that any Zarr reader opens it and a
damaged chunk is an error. `acts` have chunks of 256 rows inside shards: a shard file is the row-major
matrix, four checksum bytes after each chunk, and an index. What was never written reads as NaN or -1.

Rows are in order of their sequence, then of their position. While a capture runs, the shape of the arrays
is a guess that grows; the manifest alone says which rows there are.
"""

# Axes: row, sequence, pos, d (hidden_dim), head, d_head, mlp, vocab, is_masked (no, yes), t_bin

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from capture.shards import ShardShape
from mdlm_interp.config import MDLMConfig

FORMAT = "mdlm-interp activations"
SCHEMA_VERSION = 2

CHUNK_ROWS = 256
"""Rows of activations that are read and checksummed together."""
SHARD_ROWS = 16384
"""Rows of a shard file, and rows between two commits, unless the capture asks for another number."""
SEQUENCE_CHUNK = 1024
"""Sequences in one file of a `seqs` array."""
PENDING = "pending"
"""Directory of what `seqs` and `stats` are made of when the capture is complete."""
T_BINS = 10
"""Equal parts of [0, 1] that statistics tell apart."""

StoredType: TypeAlias = Literal["float32", "float16", "bfloat16"]

ARRAY_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    # Zarr has no bfloat16; any reader can take these as the upper halves of float32.
    "bfloat16": np.dtype(np.uint16),
}
"""What acts of each stored type are in Zarr."""
BFLOAT16_FILL = 0x7FC0
"""NaN in bfloat16."""


@dataclass(frozen=True)
class Column:
    """A one-dimensional array beside the activations."""

    dtype: str
    fill: float | int | bool
    """What was never written reads as."""
    description: str
    per_position: bool = False
    """Of a sequence's columns: whether there is a value for each position; shorter sequences end in fill."""


ROW_COLUMNS = {
    "seq": Column("int64", -1, "number of the sequence"),
    "pos": Column("int64", -1, "position in the sequence"),
    "x0": Column("int64", -1, "token id of the clean text"),
    "xt": Column("int64", -1, "token id that the model read: x0, or the mask"),
    "is_masked": Column("bool", False, "whether xt is the mask"),
    "doc": Column(
        "int64", -1, "number of the document over all files, empty ones counted; -1 for an added end-of-text"
    ),
}
SAMPLER_COLUMNS = {
    "step": Column("int64", -1, "step of the sampler, from 0, that the model was run for"),
    "t": Column("float64", float("nan"), "time at the start of the step"),
    "reveal_step": Column(
        "int64", -1, "step that wrote the token that stands here at the end; -1 if it was given"
    ),
    "token": Column(
        "int64", -1, "token id drawn here in this step, kept or not; -1 where none could be written"
    ),
    "confidence": Column(
        "float64",
        float("nan"),
        "probability of that token, before temperature; NaN where none could be written",
    ),
}
"""Of a store whose source is a sampler, beside ROW_COLUMNS. There x0 is the text at the end of the decoding."""
SEQUENCE_COLUMNS = {
    "row": Column("int64", -1, "first row of the sequence; its rows end where the next one's begin"),
    "length": Column("int64", -1, "tokens of the sequence"),
    "t": Column("float64", float("nan"), "diffusion time, 0 clean to 1 all masked"),
    "sigma": Column("float64", float("nan"), "total noise at t, which a time-conditioned model reads"),
    "seed": Column("uint64", 0, "key of times, masks and subsets, with the block's number"),
    "block": Column("int64", -1, "number of the block of text"),
    "source": Column("int64", -1, "number of the file that the first document is from"),
    "offset": Column(
        "int64",
        -1,
        "position of that document in its file from 0: line of JSON lines, row of a table, <|endoftext|> before it",
    ),
    "x0": Column("int32", -1, "token ids of the clean text", per_position=True),
    "xt": Column("int32", -1, "token ids that the model read", per_position=True),
    "doc": Column(
        "int64", -1, "number of each token's document over all files, empty ones counted", per_position=True
    ),
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


def row_columns(*, sampled: bool) -> Mapping[str, Column]:
    """The columns of a store's rows: those of a sampler too if it has them."""
    return {**ROW_COLUMNS, **SAMPLER_COLUMNS} if sampled else ROW_COLUMNS


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of one store."""

    shapes: Mapping[str, tuple[int, ...]]
    """By hook name, in execution order: the shape of one row."""
    length: int
    """Tokens of the longest sequence."""
    dtype: StoredType = "float32"
    """Type of the activations."""
    shard_rows: int = SHARD_ROWS
    """Rows of a shard, a multiple of CHUNK_ROWS."""
    sampled: bool = False
    """Whether the rows come from a sampler and have its columns too."""

    @property
    def row_columns(self) -> Mapping[str, Column]:
        """The arrays of `rows`."""
        return row_columns(sampled=self.sampled)

    @property
    def column_bytes(self) -> int:
        """Bytes of one row over all arrays of rows."""
        return sum(np.dtype(column.dtype).itemsize for column in self.row_columns.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all arrays of acts and rows, but for checksums (under 1 %)."""
        acts = sum(ARRAY_TYPES[self.dtype].itemsize * prod(shape) for shape in self.shapes.values())
        return acts + self.column_bytes

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the statistics of all hooks: a mean for each value of a row, a count and a mean square."""
        return sum(2 * T_BINS * 8 * (prod(shape) + 2) for shape in self.shapes.values())

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence over all arrays of seqs."""
        return sum(
            np.dtype(column.dtype).itemsize * (self.length if column.per_position else 1)
            for column in SEQUENCE_COLUMNS.values()
        )

    def shard_shape(self, hook: str) -> ShardShape:
        """What the shard files of a hook have in common."""
        return ShardShape(
            dtype=ARRAY_TYPES[self.dtype],
            row=tuple(self.shapes[hook]),
            chunk_rows=CHUNK_ROWS,
            n_chunks=self.shard_rows // CHUNK_ROWS,
            fill=acts_fill(self.dtype),
        )


def acts_fill(dtype: StoredType) -> float | int:
    """What an activation that was never written reads as: NaN."""
    return BFLOAT16_FILL if dtype == "bfloat16" else float("nan")


def create_row_arrays(group: zarr.Group, layout: Layout, rows: int) -> None:
    """The metadata of every array of `acts` and `rows`, for this many rows and none written."""
    for parent in ("acts", "rows"):
        group.require_group(parent)
    for hook, shape in layout.shapes.items():
        lossy = {} if layout.dtype == "float32" else {"logical_dtype": layout.dtype, "lossy": True}
        _create(
            group,
            f"acts/{hook}",
            shape=(rows, *shape),
            dtype=ARRAY_TYPES[layout.dtype].name,
            chunks=(CHUNK_ROWS, *shape),
            shards=(layout.shard_rows, *shape),
            fill_value=acts_fill(layout.dtype),
            dimension_names=("row", *(row_axes(hook) or ())),
            attributes=lossy,
        )
    for name, column in layout.row_columns.items():
        _create_column(group, f"rows/{name}", column, (rows,), layout.shard_rows)


def create_sequence_array(group: zarr.Group, name: str, n_sequences: int, length: int) -> zarr.Array[Any]:
    """One array of `seqs`, empty; write through this object (see `_create`)."""
    column = SEQUENCE_COLUMNS[name]
    shape = (n_sequences, length) if column.per_position else (n_sequences,)
    return _create_column(group, f"seqs/{name}", column, shape, SEQUENCE_CHUNK)


def create_statistics(group: zarr.Group, hook: str, values: Mapping[str, NDArray[np.float64]]) -> None:
    """The arrays of one hook's statistics, filled."""
    parent = group.require_group(f"stats/{hook}")
    for name, value in values.items():
        axes = ("is_masked", "t_bin", *(row_axes(hook) or ()))[: value.ndim]
        options = {"shape": value.shape, "chunks": value.shape, "dimension_names": axes}
        array = _create(parent, name, dtype="float64", fill_value=float("nan"), **options)
        array[...] = value


def _create_column(
    group: zarr.Group, path: str, column: Column, shape: tuple[int, ...], chunk: int
) -> zarr.Array[Any]:
    return _create(
        group,
        path,
        shape=shape,
        dtype=column.dtype,
        chunks=(chunk, *shape[1:]),
        fill_value=column.fill,
        dimension_names=("row" if path.startswith("rows/") else "sequence", "pos")[: len(shape)],
        attributes={"description": column.description},
    )


def _create(parent: zarr.Group, name: str, **options: Any) -> zarr.Array[Any]:
    # That empty chunks are written is no metadata: an array opened again has zarr's default.
    return parent.create_array(
        name=name,
        serializer=BytesCodec(endian="little"),
        filters=None,
        # Without a checksum in every chunk a flipped bit would read as a number.
        compressors=[Crc32cCodec()],
        # One file a shard, with no directory of its own to be made and synced at each commit.
        chunk_key_encoding={"name": "default", "separator": "."},
        # Otherwise a chunk of zeros, or of fill, would have no file: the same as one that was lost.
        config={"write_empty_chunks": True},
        **options,
    )


def file_of(array: str, ndim: int, number: int) -> str:
    """Path in the store of an array's numbered shard, or unsharded chunk, along the first axis."""
    return f"{array}/c." + ".".join([str(number), *["0"] * (ndim - 1)])


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
