"""Rows of an array through zarr-python: for stores that are not in a local directory."""

# Axes: row, then the axes of one row

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from capture.open_files import REMEDY
from capture.places import Place
from capture.schema import file_of
from mdlm_interp.errors import StoreError

LONG_RUN = 32
"""Consecutive rows, on average, from which slices are faster than zarr's selection by number."""


class ZarrRows:
    """An array of any place; see `reader.RowArray`."""

    def __init__(self, place: Place, path: str) -> None:
        array = zarr.open_array(place.zarr_store(), path=path, mode="r")
        self.rows, self.row = int(array.shape[0]), tuple(int(size) for size in array.shape[1:])
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        self._array, self._path, self._name = array, path, place.name
        self._per_file = int((array.shards or array.chunks)[0])
        self._files = frozenset(place.names(path))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Consecutive rows."""
        numbers = range(start // self._per_file, -(-stop // self._per_file) if stop > start else 0)
        return self._checked(numbers, lambda: np.asarray(self._array[start:stop]))

    def take(
        self,
        rows: NDArray[np.int64],
        out: NDArray[Any],
        positions: NDArray[np.int64] | None,
        *,
        check: bool = True,
    ) -> None:
        """Copy rows, which ascend, to these positions of `out`; all chunks are checked, asked or not."""
        if not len(rows):
            return
        numbers = np.unique(rows // self._per_file).tolist()
        out[slice(0, len(rows)) if positions is None else positions] = self._checked(
            numbers, lambda: self._select(rows)
        )

    def prefetch(self, rows: NDArray[np.int64], *, check: bool = True) -> None:
        """Nothing: zarr asks for the parts of one read all at once."""

    def _select(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        if len(rows) < LONG_RUN * len(starts):
            return np.asarray(self._array.oindex[rows])
        runs = pairwise([*starts.tolist(), len(rows)])
        return np.concatenate([self._array[int(rows[a]) : int(rows[b - 1]) + 1] for a, b in runs])

    def _checked(self, numbers: Iterable[int], read: Any) -> NDArray[Any]:
        numbers = list(numbers)
        for number in numbers:
            # Zarr reads an object that is not there as fill values.
            if self._file(number).rpartition("/")[2] not in self._files:
                raise StoreError(f"{self._name}/{self._file(number)} is missing; {REMEDY}")
        try:
            values: NDArray[Any] = read()
        except ValueError as error:  # what zarr raises for a checksum
            damaged = next((self._file(number) for number in numbers if self._is_damaged(number)), self._path)
            raise StoreError(f"{self._name}/{damaged} is damaged ({error}); {REMEDY}") from error
        return values

    def _file(self, number: int) -> str:
        return file_of(self._path, 1 + len(self.row), number)

    def _is_damaged(self, number: int) -> bool:
        try:
            self._array[number * self._per_file : (number + 1) * self._per_file]
        except ValueError:
            return True
        return False
