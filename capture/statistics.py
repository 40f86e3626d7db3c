"""Mean and mean square of activations, by masked or not and by part of [0, 1] in t.

1. The rows of a sequence in a shard are cut into pieces from its first one on. Of a piece the masked rows are added
   in their order, in float64, and so are the unmasked ones. numba does this where it is installed, with the same bits.
2. These sums are added, piece after piece, to those of the shard; the shards' sums, shard after shard, to those of
   the store.

So on one machine the same rows give the same bits whatever the batch size, the rank or an interruption; on
another, sums of float64 may differ in their last bits.
"""

# Axes: row, is_masked (no, yes), t_bin, then the axes of one row

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.schema import T_BINS
from mdlm_interp.shapes import Float64

PIECE_ROWS = 256
"""Rows of a sequence that are added up before they are added to the others: part of the result."""
MOMENTS = ("count", "total", "square")
"""What is kept of `RunningMoments` to go on with them, by name."""
SCRATCH_BYTES = 2**20
"""Of float64 that pieces are converted to at a time, at least one piece: it should stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class HookStatistics:
    """First and second moments of one hook's rows; NaN where a group has none."""

    count: Float64[Tensor, "2 t_bin"]
    """Number of rows: [0] unmasked, [1] masked."""
    mean: Float64[Tensor, "2 t_bin *row"]
    """Mean row."""
    mean_square: Float64[Tensor, "2 t_bin"]
    """Mean over rows of the squared norm divided by the row's size."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> HookStatistics:
        """From what a store keeps."""
        return cls(**{name: torch.from_numpy(values) for name, values in arrays.items()})

    def pooled(self) -> tuple[int, Float64[Tensor, "*row"], float]:
        """(count, mean, mean_square) over all groups."""
        present = self.count > 0
        count = self.count[present]
        share = count / count.sum()
        mean = torch.tensordot(share, self.mean[present], dims=1)
        return int(count.sum()), mean, float(share @ self.mean_square[present])


@dataclass(frozen=True)
class Strata:
    """Which rows of a batch are added up together; the same for every hook."""

    order: NDArray[np.int64]
    """Rows, those of a piece and group next to each other."""
    runs: NDArray[np.int64]
    """Of each piece's groups (group, start, stop) in `order`; a group is is_masked * T_BINS + t_bin."""

    @classmethod
    def of(cls, is_masked: NDArray[np.bool_], t: NDArray[np.float64], seq: NDArray[np.int64]) -> Strata:
        """The strata of rows in order, whole sequences or what of them is in the shard.

        Args:
            t: Diffusion time of each row, one for the rows of a sequence.
            seq: Sequence of each row.
        """
        count = len(seq)
        firsts = np.flatnonzero(np.diff(seq, prepend=seq[0] - 1 if count else 0))
        within = np.arange(count) - np.repeat(firsts, np.diff(firsts, append=count))
        piece = np.cumsum(within % PIECE_ROWS == 0)
        group = np.minimum((t * T_BINS).astype(np.int64), T_BINS - 1) + is_masked * T_BINS
        order = np.lexsort((group, piece))  # stable: within a group the rows stay in their order
        key = (piece * 2 * T_BINS + group)[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        return cls(
            order, np.stack([group[order[starts]], starts, np.append(starts[1:], count)[: len(starts)]], 1)
        )


class RunningMoments:
    """Sums over the rows added so far."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        groups = 2 * T_BINS
        self.count = np.zeros(groups)
        """Rows of each group [is_masked * T_BINS + t_bin]."""
        self.total = np.zeros((groups, prod(shape)))
        """Sum of the rows of each group, flattened."""
        self.square = np.zeros(groups)
        """Sum of the squares of all their values."""

    def add(self, acts: NDArray[np.float32], strata: Strata) -> None:
        """Add the rows [row, ...] that the strata are of."""
        if not len(strata.runs):
            return
        rows = np.ascontiguousarray(acts.reshape(len(acts), self.total.shape[1]))
        squares = np.zeros((len(strata.runs), rows.shape[1]))
        loop = _compiled()
        (loop.add_runs if loop else add_runs)(rows, strata.order, strata.runs, self.total, squares)
        # Unlike `count[groups] += ...` these add to a group again and again, in order.
        groups = strata.runs[:, 0]
        np.add.at(self.count, groups, strata.runs[:, 2] - strata.runs[:, 1])
        np.add.at(self.square, groups, squares.sum(1))

    def merge(self, later: RunningMoments) -> None:
        """Add the sums of rows that come after these."""
        self.count += later.count
        self.total += later.total
        self.square += later.square

    @property
    def finite(self) -> bool:
        """Whether every value added was finite."""
        # A float64 cannot overflow by adding squares of float32 values that are finite.
        return bool(np.isfinite(self.square).all())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a store keeps, by name."""
        shape = (2, T_BINS)
        with np.errstate(invalid="ignore"):
            mean = self.total / self.count[:, None]
            mean_square = self.square / (self.total.shape[1] * self.count)
        return {
            "count": self.count.reshape(shape).copy(),
            "mean": mean.reshape(*shape, *self._shape),
            "mean_square": mean_square.reshape(shape),
        }


def add_runs(
    rows: NDArray[np.float32],
    order: NDArray[np.int64],
    runs: NDArray[np.int64],
    total: NDArray[np.float64],
    squares: NDArray[np.float64],
) -> None:
    """Add up the rows `order[start:stop]` of each run, one after the other, column by column.

    Args:
        total: [group, column], to which a run's sum is added.
        squares: [run, column], zeros, which become the sums of squares.
    """
    size = rows.shape[1]
    narrow, wide = _scratch(size)
    first = 0  # of the runs that are converted together
    while first < len(runs):
        last = first + int(np.searchsorted(runs[first:, 2], runs[first, 1] + len(wide), side="right"))
        start, stop = int(runs[first, 1]), int(runs[last - 1, 2])
        piece = wide[: stop - start]
        # The mode in which numpy copies straight into its place.
        np.take(rows, order[start:stop], axis=0, out=narrow[: stop - start], mode="clip")
        np.copyto(piece, narrow[: stop - start])
        parts = [slice(low - start, high - start) for low, high in runs[first:last, 1:].tolist()]
        for run, part in enumerate(parts, first):
            total[runs[run, 0]] += _in_order(piece[part])
        np.multiply(piece, piece, out=piece)
        for run, part in enumerate(parts, first):
            squares[run] = _in_order(piece[part])
        first = last


def _in_order(piece: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of rows, one after the other."""
    # numpy would add a single column in pairs.
    single = piece.shape[1] == 1
    summed: NDArray[np.float64] = np.add.accumulate(piece)[-1] if single else np.add.reduce(piece)
    return summed


def _compiled() -> ModuleType | None:
    """The module of the compiled loop, where numba is installed and switched on."""
    if find_spec("numba") is None or os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return None
    from capture import moment_loops

    return moment_loops


_kept = threading.local()


def _scratch(size: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Memory for rows of that size in float32 and float64, used again by the same thread."""
    found: tuple[NDArray[np.float32], NDArray[np.float64]] | None = getattr(_kept, "scratch", None)
    if found is None or found[1].shape[1] != size:
        shape = (max(PIECE_ROWS, SCRATCH_BYTES // (8 * size)), size)
        found = _kept.scratch = np.empty(shape, np.float32), np.empty(shape)
    return found
