"""Mean and mean square of activations, by masked or not and by part of [0, 1] in t.

1. The rows of a sequence in a shard are cut into pieces from its first one on. Of a piece the masked rows are added
   in their order, in float64, and so are the unmasked ones.
2. These sums are added, piece after piece, to those of the shard; the shards' sums, shard after shard, to those of
   the store.

So on one machine the same rows give the same bits whatever the batch size, the rank or an interruption; on
another, sums of float64 may differ in their last bits.
"""

# Axes: row, is_masked (no, yes), t_bin, then the axes of one row

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.schema import T_BINS
from mdlm_interp.shapes import Float64

PIECE_ROWS = 256
"""Rows of a sequence that are added up before they are added to the others: part of the result."""
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
    runs: list[tuple[int, int, int]]
    """(group, start, stop) in `order` of each piece's groups; a group is is_masked * T_BINS + t_bin."""

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
        starts = np.flatnonzero(np.diff(key, prepend=-1)).tolist()
        runs = [(int(group[order[start]]), start, stop) for start, stop in pairwise([*starts, count])]
        return cls(order, runs)


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
        size = self.total.shape[1]
        rows = acts.reshape(-1, size)
        narrow, wide = _scratch(size)
        first = 0
        for runs in _fitting(strata.runs, len(wide)):
            stop = runs[-1][2]
            piece = wide[: stop - first]
            # The mode in which numpy copies straight into its place.
            np.take(rows, strata.order[first:stop], axis=0, out=narrow[: stop - first], mode="clip")
            np.copyto(piece, narrow[: stop - first])
            squares = np.einsum("rd,rd->r", piece, piece)
            for group, start, end in runs:
                part = slice(start - first, end - first)
                self.count[group] += end - start
                self.total[group] += np.add.reduce(piece[part], axis=0)
                self.square[group] += np.add.reduce(squares[part])
            first = stop

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


def _fitting(runs: list[tuple[int, int, int]], rows: int) -> Iterator[list[tuple[int, int, int]]]:
    """The runs in order, as many at a time as have that many rows together."""
    taken: list[tuple[int, int, int]] = []
    for run in runs:
        if taken and run[2] - taken[0][1] > rows:
            yield taken
            taken = []
        taken.append(run)
    if taken:
        yield taken


_kept = threading.local()


def _scratch(size: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Memory for rows of that size in float32 and float64, used again by the same thread."""
    found: tuple[NDArray[np.float32], NDArray[np.float64]] | None = getattr(_kept, "scratch", None)
    if found is None or found[1].shape[1] != size:
        shape = (max(PIECE_ROWS, SCRATCH_BYTES // (8 * size)), size)
        found = _kept.scratch = np.empty(shape, np.float32), np.empty(shape)
    return found
