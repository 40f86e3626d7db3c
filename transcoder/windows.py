"""A process's rows of shuffled batches: it reads those of its own, and copies each once into its place.

The order is that of `capture.iteration.ShuffledRows`, so which rows make a batch, and where in it each is, depends on
nothing here. A window is read when a batch first needs it, ascending, and of its rows only those that some batch will
want of this process; each batch then gathers its rows straight into the tensors that training takes.
"""

# Axes: layer, row, d_model

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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


class OwnRows(ShuffledRows):
    """Batches of which some rows are read; see `ShuffledRows` for the arguments."""

    _kept: dict[tuple[int, int, int, int], _Window] | None = None
    """The windows of the part given last, by epoch, number and the part."""

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
                self._kept[keys[window]] = self._read_own(epoch, window, own)
                self._prefetch_after(epoch, window)
            kept = self._kept[keys[window]]
            index = torch.from_numpy(kept.places[positions])
            for name, out in acts:
                torch.index_select(kept.own.acts[name], 0, index, out=out[filled : filled + len(index)])
            filled += len(index)
            coords = {name: values[index] for name, values in kept.own.coords.items()}
            parts.append(RowBatch(rows=kept.own.rows[index], acts={}, coords=coords))
        return RowBatch(
            rows=torch.cat([part.rows for part in parts]),
            acts={},
            coords={name: torch.cat([part.coords[name] for part in parts]) for name in parts[0].coords},
        )

    def _read_own(self, epoch: int, window: int, own: range) -> _Window:
        rows, order = self._window_rows(epoch, window)
        place_in_batch = (int(self._share(epoch).bounds[window]) + np.arange(len(rows))) % self.batch_size
        is_own = np.zeros(len(rows), np.bool_)
        is_own[order] = (place_in_batch >= own.start) & (place_in_batch < own.stop)
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
