"""The bytes of a shard file: a matrix of rows with a checksum after each chunk, then an index.

    chunk 0, crc32c of it | chunk 1, crc32c of it | ... | index, crc32c of it
    index: for every chunk that a shard can have, offset and size as uint64; 2**64 - 1 twice for none

This is Zarr's `sharding_indexed` codec (index at the end, chunks as little-endian bytes and crc32c), and
the files are byte-identical to those that zarr-python writes, but rows go in as they come: nothing is kept
in memory beyond checksums, and a file is written once from front to back.

Source:
    zarr-specs.readthedocs.io, Zarr v3 "sharding_indexed" and "crc32c" codecs.
"""

# Axes: row, then the axes of one row

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import StoreError

ABSENT = 2**64 - 1
"""Offset and size, in an index, of a chunk that was never written."""
CRC_BYTES = 4

Piece: TypeAlias = "bytes | NDArray[np.uint8]"
"""Part of a file's content."""


@dataclass(frozen=True, kw_only=True)
class ShardShape:
    """What every shard file of one array has in common."""

    dtype: np.dtype[Any]
    row: tuple[int, ...]
    """Sizes of the axes after the row."""
    chunk_rows: int
    """Rows that are read and checksummed together."""
    n_chunks: int
    """Chunks of a full shard."""
    fill: float | int
    """What pads the last chunk of a shorter shard."""

    @property
    def rows(self) -> int:
        """Rows of a full shard."""
        return self.chunk_rows * self.n_chunks

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, without its checksum."""
        return self.chunk_rows * prod(self.row) * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes at the end of a shard file: the index and its checksum."""
        return 16 * self.n_chunks + CRC_BYTES


def bytes_of(piece: Piece) -> memoryview:
    """A piece as bytes, without a copy."""
    return memoryview(piece).cast("B")  # type: ignore[arg-type]  # numpy's stubs do not say that arrays are buffers


class ShardEncoder:
    """Turns rows, in any portions, into the pieces of one shard file in order."""

    def __init__(self, shape: ShardShape) -> None:
        self._shape = shape
        self._running = 0
        """Checksum of the chunk that is being filled."""
        self.rows = 0
        """Rows taken so far."""
        self.checksums: list[int] = []
        """crc32c of each finished chunk."""

    def encode(self, rows: NDArray[Any]) -> list[Piece]:
        """The bytes of these rows, as views of them where possible, with checksums between chunks."""
        if rows.dtype != self._shape.dtype or rows.shape[1:] != self._shape.row:
            raise StoreError(
                f"a shard of {self._shape.dtype} {list(self._shape.row)} rows got {rows.dtype} "
                f"{list(rows.shape[1:])} rows"
            )
        if self.rows + len(rows) > self._shape.rows:
            raise StoreError(f"a shard of {self._shape.rows} rows got {self.rows + len(rows)}")
        little = np.ascontiguousarray(rows, self._shape.dtype.newbyteorder("<"))
        pieces: list[Piece] = []
        done = 0
        while done < len(rows):
            filled = self.rows % self._shape.chunk_rows
            take = min(len(rows) - done, self._shape.chunk_rows - filled)
            piece = little[done : done + take].reshape(-1).view(np.uint8)
            self._running = google_crc32c.extend(self._running, piece)
            pieces.append(piece)
            done += take
            self.rows += take
            if filled + take == self._shape.chunk_rows:
                pieces.append(self._end_chunk())
        return pieces

    def finish(self) -> list[Piece]:
        """The padding of an unfinished chunk, if any, and the index."""
        pieces: list[Piece] = []
        short = -self.rows % self._shape.chunk_rows
        if short:
            rows = self.rows
            pieces += self.encode(np.full((short, *self._shape.row), self._shape.fill, self._shape.dtype))
            self.rows = rows
        return [*pieces, index_bytes(self._shape, len(self.checksums))]

    def _end_chunk(self) -> bytes:
        checksum, self._running = self._running, 0
        self.checksums.append(checksum)
        return checksum.to_bytes(CRC_BYTES, "little")


def index_bytes(shape: ShardShape, present: int) -> bytes:
    """The end of a shard file whose first `present` chunks are there."""
    index = np.full((shape.n_chunks, 2), ABSENT, "<u8")
    size = shape.chunk_bytes + CRC_BYTES
    index[:present, 0] = np.arange(present) * size
    index[:present, 1] = size
    table = index.tobytes()
    checksum: int = google_crc32c.value(table)
    return table + checksum.to_bytes(CRC_BYTES, "little")


def column_chunk(values: NDArray[Any], size: int, fill: float | int | bool) -> tuple[bytes, int]:
    """The bytes of an unsharded chunk, padded to its size, and their checksum."""
    padded = np.full(size, fill, values.dtype.newbyteorder("<"))
    padded[: len(values)] = values
    data = padded.tobytes()
    checksum = google_crc32c.value(data)
    return data + checksum.to_bytes(CRC_BYTES, "little"), checksum


def shard_digest(checksums: Mapping[str, Iterable[int]]) -> str:
    """SHA-256 over the name of every array, sorted, and the crc32c of each of its chunks in the shard.

    It changes when any byte of the shard does, and costs nothing to take while writing. It protects against
    accidents; against someone who forges checksums use `ActivationStore.fingerprint`, which reads every row.
    """
    digest = hashlib.sha256()
    for name in sorted(checksums):
        digest.update(f"{name} {' '.join(f'{checksum:08x}' for checksum in checksums[name])}\n".encode())
    return digest.hexdigest()
