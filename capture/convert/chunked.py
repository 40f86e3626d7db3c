"""Rows out of files in which each chunk of rows lies in one piece: checked once, then read straight.

What an HDF5 file and a safetensors file have in common for a reader. The first time that a chunk is touched
all of it is read and compared with its checksum; from then on only the rows asked for are.
"""

# Axes: row, then the axes of one row

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.open_files import OpenFile

ROW_COST_BYTES = 16384
"""A read by itself takes as long as this many more bytes of one that is being made anyway."""


class CheckedRows(ABC):
    """An array by rows; see `store_files.RowArray`."""

    def __init__(self, *, rows: int, row: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int) -> None:
        self.rows, self.row, self.dtype = rows, row, dtype
        self._chunk_rows = chunk_rows
        self._row_bytes = prod(row) * dtype.itemsize
        self._checked = bytearray(-(-rows // chunk_rows))

    @abstractmethod
    def _place(self, chunk: int) -> tuple[OpenFile, int]:
        """The file that holds a chunk, and the offset at which it begins."""

    @abstractmethod
    def _read_checked(self, chunk: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """All rows of a chunk, which are start to stop; raises StoreError unless they match their checksum."""

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Consecutive rows, checked."""
        out = np.empty((stop - start, *self.row), self.dtype)
        at = start
        while at < stop:
            end = min(stop, (at // self._chunk_rows + 1) * self._chunk_rows)
            self._fill(at, end, out[at - start : end - start], check=True)
            at = end
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
            check: Compare checksums of chunks that were not checked before, which reads them whole.
        """
        for low, high, part in self._spans(rows):
            at = np.arange(part.start, part.stop) if positions is None else positions[part]
            reads_whole = check and not self._checked[low // self._chunk_rows]
            if reads_whole or self._dense(low, high, len(at)):
                span = np.empty((high - low, *self.row), self.dtype)
                self._fill(low, high, span, check=check)
                out[at] = span[rows[part] - low]
                continue
            for row, target in zip(rows[part].tolist(), at.tolist(), strict=True):
                self._read(row, row + 1, out[target : target + 1])

    def prefetch(self, rows: NDArray[np.int64], *, check: bool = True) -> None:
        """Begin to fetch what `take` of these rows would read; returns at once."""
        for low, high, part in self._spans(rows):
            chunk = low // self._chunk_rows
            file, offset = self._place(chunk)
            first = chunk * self._chunk_rows
            if check and not self._checked[chunk]:
                file.advise(offset, (min(first + self._chunk_rows, self.rows) - first) * self._row_bytes)
            elif self._dense(low, high, part.stop - part.start):
                file.advise(offset + (low - first) * self._row_bytes, (high - low) * self._row_bytes)
            else:
                for row in rows[part].tolist():
                    file.advise(offset + (row - first) * self._row_bytes, self._row_bytes)

    def _spans(self, rows: NDArray[np.int64]) -> list[tuple[int, int, slice]]:
        """For each chunk that has some of these rows: the first, one past the last, and which they are."""
        starts = np.flatnonzero(np.diff(rows // self._chunk_rows, prepend=-1)).tolist()
        return [(int(rows[a]), int(rows[b - 1]) + 1, slice(a, b)) for a, b in pairwise([*starts, len(rows)])]

    def _dense(self, low: int, high: int, wanted: int) -> bool:
        """Whether to read all rows of a span of which some are wanted."""
        return wanted * (ROW_COST_BYTES + self._row_bytes) >= (high - low) * self._row_bytes

    def _fill(self, start: int, stop: int, out: NDArray[Any], *, check: bool) -> None:
        """Rows of one chunk."""
        chunk = start // self._chunk_rows
        if self._checked[chunk] or not check:
            self._read(start, stop, out)
            return
        first = chunk * self._chunk_rows
        last = min(first + self._chunk_rows, self.rows)
        whole = out if stop - start == last - first else np.empty((last - first, *self.row), self.dtype)
        self._read_checked(chunk, first, last, whole)
        self._checked[chunk] = True
        if whole is not out:
            out[...] = whole[start - first : stop - first]

    def _read(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Rows of one chunk as they are in the file."""
        chunk = start // self._chunk_rows
        file, offset = self._place(chunk)
        offset += (start - chunk * self._chunk_rows) * self._row_bytes
        file.read([out], offset, (stop - start) * self._row_bytes)
