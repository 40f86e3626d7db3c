"""Which rows are asked for: checked, and in the order in which they are read."""

# Axes: row

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.errors import MdlmError, StoreError

Rows: TypeAlias = "slice | Sequence[int] | NDArray[np.integer[Any]] | Tensor"


MOST_SHOWN = 80
"""Characters of a value in a message: what a caller mistook for a number may be a whole array."""


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
        given = whole_numbers(rows, "rows", StoreError)
        if given.size == 0:
            return np.empty(0, np.int64), None
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


def whole_numbers(given: Any, what: str, error: type[MdlmError]) -> NDArray[np.integer[Any]]:
    """A list, array or tensor of whole numbers as an array [n]; an empty one may be of any type.

    Args:
        what: What a message calls them.
    Raises:
        MdlmError: An `error`, if they are anything else; a mask would be read as numbers 0 and 1.
    """
    try:
        found = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except (TypeError, ValueError):  # bfloat16, which numpy lacks, or rows of unequal length
        found = np.asarray(None)
    if found.size == 0:
        return np.empty(0, np.int64)
    if found.ndim == 1 and np.issubdtype(found.dtype, np.integer):
        return found
    got, remedy = shown(given), "pass one flat list of integers"
    if found.ndim:
        got = f"{found.dtype} {list(found.shape)} that begins with {shown(found.ravel()[:1].tolist()[0])}"
    if found.ndim and found.dtype == np.bool_:
        flat = "mask.nonzero().flatten()" if isinstance(given, Tensor) else "numpy.flatnonzero(mask)"
        remedy = f"of a mask, pass {flat}"
    raise error(f"{what} must be a list of whole numbers, got {got}; {remedy}")


def whole_number(given: Any, what: str, error: type[MdlmError]) -> int:
    """One whole number, of Python, numpy or torch.

    Args:
        what: What a message calls it.
    Raises:
        MdlmError: An `error`, if it is anything else, as 2.0 and True.
    """
    try:
        if not isinstance(given, bool):
            return operator.index(given)
    except TypeError:
        pass
    raise error(f"{what} must be a whole number, got {shown(given)}; pass an int")


def shown(value: object) -> str:
    """A value on one line of a message."""
    line = " ".join(repr(value).split())
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 3]}..."
