"""Rows out of an array's files in a local directory, at the speed of the disk or of memory.

1. A file is opened once and kept open, a few hundred at a time. Its index is checked and says where each
   chunk of rows is; a file without an index is one chunk.
2. The first time that a chunk is touched all of it is read and its crc32c compared; a bit remembers that.
   From then on only the rows asked for are read, straight into their place.
3. Of scattered rows, those of a chunk that is worth it come with the whole chunk; the others one by one,
   after the kernel was asked to fetch all of them at once.

Files are read, not mapped: if a disk fails or a file is cut short under a map the process dies (SIGBUS),
where a read returns an error. Reads cost as much as copies out of a map.
"""

# Axes: row, then the axes of one row

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from capture.open_files import REMEDY, FileCache, FileState, OpenFile
from capture.schema import file_of
from capture.shards import ABSENT, CRC_BYTES, ShardShape
from mdlm_interp.errors import StoreError

ROW_COST_BYTES = 16384
"""A read by itself takes as long as this many more bytes of one that is being made anyway."""
PAGE_BYTES = 4096
PROBES = 4
"""Scattered rows of a file that are tried before the kernel is asked for all of them."""


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """How an array's rows lie in its files, from its zarr.json."""

    rows: int
    """Size of the first axis."""
    shard: ShardShape
    """Of a file."""
    indexed: bool
    """Whether a file is a shard, which ends in an index; otherwise it is a single chunk."""


def array_layout(metadata: Mapping[str, Any]) -> ArrayLayout:
    """The layout that a zarr.json describes.

    Raises:
        ValueError: If it is not one that this package writes.
    """
    shape, per_file = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    separator = metadata["chunk_key_encoding"]["configuration"]["separator"]
    codecs = metadata["codecs"]
    indexed = codecs[0]["name"] == "sharding_indexed"
    per_chunk = per_file
    if indexed:
        sharding = codecs[0]["configuration"]
        per_chunk, codecs = sharding["chunk_shape"], sharding["codecs"]
        if not _plain(sharding["index_codecs"]) or sharding["index_location"] != "end":
            raise ValueError("its shards have another index")
    if not _plain(codecs) or separator != ".":
        raise ValueError("it has other codecs or chunk keys than this package writes")
    if not (list(shape[1:]) == list(per_file[1:]) == list(per_chunk[1:])) or per_file[0] % per_chunk[0]:
        raise ValueError("its chunks divide more than the first axis")
    dtype = np.dtype(metadata["data_type"])
    shard = ShardShape(
        dtype=dtype.newbyteorder("<"),
        row=tuple(int(size) for size in shape[1:]),
        chunk_rows=int(per_chunk[0]),
        n_chunks=int(per_file[0]) // int(per_chunk[0]),
        fill=0,
    )
    return ArrayLayout(rows=int(shape[0]), shard=shard, indexed=indexed)


def _plain(codecs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are little-endian bytes with a checksum."""
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    return [codec["name"] for codec in codecs] == ["bytes", "crc32c"] and endian == "little"


class RowFiles:
    """An array in a local directory; see `reader.RowArray`."""

    def __init__(self, directory: Path, layout: ArrayLayout, cache: FileCache) -> None:
        self.rows = layout.rows
        self.dtype, self.row = layout.shard.dtype, layout.shard.row
        self._indexed, self._shape, self._cache = layout.indexed, layout.shard, cache
        self._states: dict[int, FileState] = {}
        self._paths: dict[int, str] = {}
        self._chunk_rows, self._n_chunks = layout.shard.chunk_rows, layout.shard.n_chunks
        self._chunk_bytes, self._row_bytes = layout.shard.chunk_bytes, prod(self.row) * self.dtype.itemsize
        before, _, after = file_of(str(directory), 1 + len(self.row), 0).rpartition("c.0")
        self._before, self._after = before + "c.", after

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Consecutive rows."""
        out = np.empty((stop - start, *self.row), self.dtype)
        place, low = divmod(start, self._chunk_rows)
        if 0 < stop - start <= self._chunk_rows - low:
            # The usual read is of one chunk; the loop costs a twentieth of a short one's time.
            self._read_part(
                self._file(place // self._n_chunks), place % self._n_chunks, low, low + len(out), out
            )
            return out
        at = start
        while at < stop:
            place, low = divmod(at, self._chunk_rows)
            number, chunk = divmod(place, self._n_chunks)
            high = min(self._chunk_rows, low + stop - at)
            self._read_part(self._file(number), chunk, low, high, out[at - start : at - start + high - low])
            at += high - low
        return out

    def take(
        self,
        rows: NDArray[np.int64],
        out: NDArray[Any],
        positions: NDArray[np.int64] | None,
        *,
        check: bool = True,
    ) -> None:
        """Copy rows, which ascend, to these positions of `out`; to the first ones in order if none.

        Args:
            check: Read chunks whole that were not checked before.
        """
        for file, within, part in self._by_file(rows):
            at = np.arange(part.start, part.stop) if positions is None else positions[part]
            chunk = within // self._chunk_rows
            whole = self._worth_reading_whole(file, chunk, check)
            for number in np.flatnonzero(whole).tolist():
                low, high = np.searchsorted(chunk, [number, number + 1]).tolist()
                self._take_of_chunk(
                    file, number, within[low:high] - number * self._chunk_rows, out, at[low:high]
                )
            single = ~whole[chunk]
            if single.any():
                self._take_singly(file, within[single], out, at[single])

    def prefetch(self, rows: NDArray[np.int64], *, check: bool = True) -> None:
        """Ask the kernel to begin fetching what `take` of the same rows will read from the disk."""
        for file, within, _ in self._by_file(rows):
            chunk = within // self._chunk_rows
            whole = self._worth_reading_whole(file, chunk, check)
            for number in np.flatnonzero(whole).tolist():
                start = self._offset(file, number)
                if not file.in_memory(start + self._chunk_bytes // 2):
                    file.advise(start, self._chunk_bytes + CRC_BYTES)
            starts = self._offsets(file, within[~whole[chunk]])
            if all(file.in_memory(offset) for offset in starts[:: len(starts) // PROBES + 1].tolist()):
                continue
            # Rows less than a page apart are one request.
            breaks = np.flatnonzero(np.diff(starts) > self._row_bytes + PAGE_BYTES) + 1
            firsts, lasts = starts[[0, *breaks]], starts[[*(breaks - 1), -1]]
            for start, end in zip(firsts.tolist(), lasts.tolist(), strict=True):
                file.advise(start, end + self._row_bytes - start)

    def _by_file(self, rows: NDArray[np.int64]) -> Iterator[tuple[OpenFile, NDArray[np.int64], slice]]:
        """Each file that has some of these rows, their numbers in it, and which they are."""
        size = self._shape.rows
        numbers = rows // size
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(rows)]):
            number = int(numbers[start])
            yield self._file(number), rows[start:stop] - number * size, slice(start, stop)

    def _worth_reading_whole(
        self, file: OpenFile, chunk: NDArray[np.int64], check: bool
    ) -> NDArray[np.bool_]:
        """By chunk: whether to read all of it rather than some rows."""
        wanted = np.bincount(chunk, minlength=self._n_chunks)
        whole = wanted * (ROW_COST_BYTES + self._row_bytes) >= self._chunk_bytes
        if check:
            whole |= ~np.frombuffer(file.state.checked, np.bool_)
        found: NDArray[np.bool_] = whole & (wanted > 0)
        return found

    def _read_part(self, file: OpenFile, chunk: int, low: int, high: int, out: NDArray[Any]) -> None:
        """Rows low to high of a chunk, which is checked if it was not before."""
        offset = self._offset(file, chunk)
        if file.state.checked[chunk]:
            file.read([out], offset + low * self._row_bytes, (high - low) * self._row_bytes)
            return
        whole = out if high - low == self._chunk_rows else np.empty((self._chunk_rows, *self.row), self.dtype)
        stored = bytearray(CRC_BYTES)
        file.read([whole, stored], offset, self._chunk_bytes + CRC_BYTES)
        if google_crc32c.value(whole.reshape(-1).view(np.uint8)) != int.from_bytes(stored, "little"):
            raise StoreError(f"{file.path} is damaged (chunk {chunk} does not match its checksum); {REMEDY}")
        file.state.checked[chunk] = True
        if whole is not out:
            out[...] = whole[low:high]

    def _take_of_chunk(
        self, file: OpenFile, chunk: int, rows: NDArray[np.int64], out: NDArray[Any], at: NDArray[np.int64]
    ) -> None:
        low, high, first = int(rows[0]), int(rows[-1]) + 1, int(at[0])
        consecutive = high - low == len(rows) and _ascend_by_one(rows)
        in_order = int(at[-1]) - first == len(at) - 1 and _ascend_by_one(at)
        target = out[first : first + len(at)]
        if consecutive and in_order:
            self._read_part(file, chunk, low, high, target)
            return
        span = np.empty((high - low, *self.row), self.dtype)
        self._read_part(file, chunk, low, high, span)
        if in_order:
            # The mode in which numpy copies straight into its place.
            np.take(span, rows - low, axis=0, out=target, mode="clip")
        else:
            out[at] = span if consecutive else span[rows - low]

    def _take_singly(
        self, file: OpenFile, rows: NDArray[np.int64], out: NDArray[Any], at: NDArray[np.int64]
    ) -> None:
        offsets = self._offsets(file, rows)
        breaks = np.flatnonzero((np.diff(offsets) != self._row_bytes) | (np.diff(at) != 1)) + 1
        starts = [0, *breaks.tolist()]
        sizes = (np.diff([*starts, len(rows)]) * self._row_bytes).tolist()
        targets = (at[starts] * self._row_bytes).tolist()
        pieces = zip(offsets[starts].tolist(), targets, sizes, strict=True)
        file.read_pieces(out.reshape(-1).view(np.uint8).data, pieces)

    def _offset(self, file: OpenFile, chunk: int) -> int:
        offset = int(file.state.offsets[chunk])
        if offset < 0:
            raise StoreError(f"{file.path} is damaged (chunk {chunk} is missing); {REMEDY}")
        return offset

    def _offsets(self, file: OpenFile, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of a file begin in it."""
        chunk, row = np.divmod(rows, self._chunk_rows)
        starts = file.state.offsets[chunk]
        if len(starts) and starts.min() < 0:
            self._offset(file, int(chunk[starts.argmin()]))
        starts += row * self._row_bytes
        return starts

    def _file(self, number: int) -> OpenFile:
        path = self._paths.get(number)
        if path is None:
            path = self._paths[number] = f"{self._before}{number}{self._after}"
        file = self._cache.get(path)
        if file is None:
            file = OpenFile(path)
            state = self._states.get(number)
            identity = file.identity()
            if state is None or state.identity != identity:
                offsets = self._index(file, identity[2])
                state = FileState(identity, offsets, bytearray(self._n_chunks))
                self._states[number] = state
            file.state = state
            self._cache.add(file)
        return file

    def _index(self, file: OpenFile, size: int) -> NDArray[np.int64]:
        """The offset of each chunk, -1 if it is absent."""
        stored = self._chunk_bytes + CRC_BYTES
        if not self._indexed:
            if size != stored:
                raise StoreError(f"{file.path} is damaged ({size} bytes, expected {stored}); {REMEDY}")
            return np.zeros(1, np.int64)
        end = size - self._shape.index_bytes
        if end < 0:
            raise StoreError(f"{file.path} is damaged ({size} bytes: was it truncated?); {REMEDY}")
        content = bytearray(self._shape.index_bytes)
        file.read([content], end, len(content))
        table, checksum = bytes(content[:-CRC_BYTES]), int.from_bytes(content[-CRC_BYTES:], "little")
        if google_crc32c.value(table) != checksum:
            raise StoreError(
                f"{file.path} is damaged (its index does not match its checksum: was it truncated?); {REMEDY}"
            )
        entries = np.frombuffer(table, "<u8").reshape(-1, 2).tolist()
        absent = [ABSENT, ABSENT]
        if any(entry != absent and (entry[1] != stored or entry[0] > end - stored) for entry in entries):
            raise StoreError(
                f"{file.path} is damaged (its index does not fit the file: truncated?); {REMEDY}"
            )
        return np.array([-1 if entry == absent else entry[0] for entry in entries])


def _ascend_by_one(numbers: NDArray[np.int64]) -> bool:
    return bool((numbers[1:] - numbers[:-1] == 1).all())
