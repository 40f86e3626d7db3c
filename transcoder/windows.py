"""A process's rows of shuffled batches: it reads those of its own, and copies each once into its place.

The order is that of `capture.iteration.ShuffledRows`, so which rows make a batch, and where in it each is, depends on
nothing here. A window is read ascending, and of its rows only those that some batch will want of this process; each
batch then gathers its rows straight into the tensors that training takes. While the batches of one window are used, a
thread reads the next, so that training waits for neither the disk nor the copies; it begins when the window before is
given up, so that at most two are in memory.
"""

# Axes: layer, row, d_model

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.iteration import RowBatch, ShuffledRows
from mdlm_interp.shapes import Float32


class _Window(NamedTuple):
    """What is kept of a window."""

    own: RowBatch
    """This process's rows, ascending."""
    places: NDArray[np.int64]
    """Of each row in the order of use, where it is in `own`; of no meaning for other processes' rows."""


_Key: TypeAlias = tuple[int, int, int, int]
"""Of a window: epoch, number, and the ends of the part of each batch."""


class _Ahead:
    """A window that a thread reads before it is asked for."""

    def __init__(self, key: _Key, read: Callable[[], _Window]) -> None:
        self._key, self._process = key, os.getpid()
        self._found: Future[_Window] = Future()
        # No daemon: the end of the program waits for it, as it may be inside another library.
        Thread(target=self._run, args=(read,), name="window read ahead").start()

    def _run(self, read: Callable[[], _Window]) -> None:
        try:
            self._found.set_result(read())
        except BaseException as error:  # noqa: BLE001  (raised where the window is asked for)
            self._found.set_exception(error)

    def is_of(self, key: _Key) -> bool:
        """Whether it is this window; a forked process has not the thread that reads it."""
        return self._key == key and self._process == os.getpid()

    def window(self) -> _Window:
        """The window, when it is read.

        Raises:
            Exception: What reading it raised.
        """
        return self._found.result()


class OwnRows(ShuffledRows):
    """Batches of which some rows are read; see `ShuffledRows` for the arguments."""

    _kept: dict[_Key, _Window] | None = None
    """The windows of the part given last."""
    _ahead: _Ahead | None = None

    def part(
        self, epoch: int, step: int, own: range, acts: Sequence[tuple[str, Float32[Tensor, "row d_model"]]]
    ) -> RowBatch:
        """The numbers and coordinates of some rows of a batch; their activations go into tensors.

        Args:
            own: Which rows of each batch this process takes, the same of all.
            acts: Names of hook points, and where to write these rows of each.
        Raises:
            ConfigError: If there is no such step.
        """
        self._check(epoch, step)
        pieces = self._pieces(epoch, step)
        before = self._kept or {}
        keys = {window: (epoch, window, own.start, own.stop) for window, _ in pieces}
        self._kept = {key: before[key] for key in keys.values() if key in before}
        parts, filled = [], 0
        for window, positions in _of_part(pieces, own):
            if keys[window] not in self._kept:
                self._kept[keys[window]] = self._window(keys[window])
                self._prefetch_after(epoch, window)
            kept = self._kept[keys[window]]
            index = torch.from_numpy(kept.places[positions])
            for name, out in acts:
                torch.index_select(kept.own.acts[name], 0, index, out=out[filled : filled + len(index)])
            filled += len(index)
            coords = {name: values[index] for name, values in kept.own.coords.items()}
            parts.append(RowBatch(rows=kept.own.rows[index], acts={}, coords=coords))
        if len(self._kept) == 1:
            self._read_ahead((*self._following(epoch, pieces[-1][0]), own.start, own.stop))
        return RowBatch(
            rows=torch.cat([part.rows for part in parts]),
            acts={},
            coords={name: torch.cat([part.coords[name] for part in parts]) for name in parts[0].coords},
        )

    def _window(self, key: _Key) -> _Window:
        ahead, self._ahead = self._ahead, None
        return ahead.window() if ahead is not None and ahead.is_of(key) else self._read_own(key)

    def _read_ahead(self, key: _Key) -> None:
        if self._ahead is None or not self._ahead.is_of(key):
            self._ahead = _Ahead(key, lambda: self._read_own(key))

    def _read_own(self, key: _Key) -> _Window:
        epoch, window, start, stop = key
        rows, order = self._window_rows(epoch, window)
        place_in_batch = (int(self._share(epoch).bounds[window]) + np.arange(len(rows))) % self.batch_size
        is_own = np.zeros(len(rows), np.bool_)
        is_own[order] = (place_in_batch >= start) & (place_in_batch < stop)
        return _Window(self._read(rows[is_own]), (is_own.cumsum() - 1)[order])


def _of_part(pieces: Sequence[tuple[int, slice]], own: range) -> Iterator[tuple[int, slice]]:
    """The pieces of a batch, or what of them is among some rows of it.

    >>> list(_of_part([(0, slice(90, 100)), (1, slice(0, 6))], range(8, 12)))
    [(0, slice(98, 100, None)), (1, slice(0, 2, None))]
    """
    start = 0
    for window, piece in pieces:
        size = piece.stop - piece.start
        low, high = max(own.start - start, 0), min(own.stop - start, size)
        if low < high:
            yield window, slice(piece.start + low, piece.start + high)
        start += size
