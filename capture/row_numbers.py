"""Which rows are asked for: checked, and in the order in which they are read."""

# Axes: row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.errors import StoreError

Rows: TypeAlias = "slice | Sequence[int] | NDArray[np.integer[Any]] | Tensor"


@dataclass(frozen=True)
class RowNumbers:
    """The rows that a store has."""

    committed: int
    planned: int
    complete: bool

    def span(self, rows: slice) -> tuple[int, int]:
        """Both ends of a slice.

        Raises:
            StoreError: If it has a step, or does not lie in the store.
        """
        start, stop = rows.start or 0, self.committed if rows.stop is None else rows.stop
        if rows.step is not None and rows.step != 1:
            raise StoreError(f"a slice of rows must have step 1, got {rows.step}; pass range(...) instead")
        if not (0 <= start <= self.committed and 0 <= stop <= self.committed):
            end = stop if 0 <= start <= self.committed else start
            raise StoreError(self._out_of_range(end, f"a slice from {start} to {stop}"))
        return start, max(start, stop)

    def ascending(self, rows: Any) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Row numbers in ascending order, and where each was asked for unless they came so.

        Raises:
            StoreError: If they are not whole numbers of rows of the store.
        """
        given = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        if given.size == 0:
            return np.empty(0, np.int64), None
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            hint = "; of a mask, pass mask.nonzero()" if given.dtype == np.bool_ else ""
            raise StoreError(
                f"rows must be a list of whole numbers, got {given.dtype} {list(given.shape)}{hint}"
            )
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= self.committed:
            raise StoreError(self._out_of_range(low if low < 0 else high, "rows"))
        numbers = given.astype(np.int64)
        if bool((numbers[1:] >= numbers[:-1]).all()):
            return numbers, None
        positions = np.argsort(numbers, kind="stable")
        return numbers[positions], positions

    def _out_of_range(self, row: int, what: str) -> str:
        planned = f"{self.committed} of {self.planned} rows are committed"
        state = "" if self.complete else f"; the store is incomplete, {planned}"
        return f"{what} must lie in [0, {self.committed}), got {row}{state}"
