"""Mean and mean square of activations, by masked or not and by part of [0, 1] in t.

1. The rows of a shard are taken a sequence at a time: sums over its masked rows and over its unmasked ones, in
   float64, of pieces that depend on the sequence alone.
2. These sums are added, sequence after sequence, to those of the shard; the shards' sums, shard after shard,
   to those of the store.

So on one machine the same rows give the same bits whatever the batch size, the rank or an interruption; on
another, sums of float64 may differ in their last bits.
"""

# Axes: row, is_masked (no, yes), t_bin, then the axes of one row

from __future__ import annotations

import threading
from collections.abc import Mapping
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
PIECE_BYTES = 2**21
"""Rows that are converted to float64 at a time, at most: they should stay in the processor's cache."""


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

    def add(
        self,
        acts: NDArray[np.float32],
        is_masked: NDArray[np.bool_],
        t: NDArray[np.float64],
        seq: NDArray[np.int64],
    ) -> None:
        """Add rows in order, whole sequences or what of them is in the shard.

        Args:
            acts: Activations [row, ...].
            t: Diffusion time of each row.
            seq: Sequence of each row.
        """
        ends = np.flatnonzero(np.diff(seq)) + 1
        for start, stop in pairwise([0, *ends.tolist(), len(t)]):
            if stop > start:
                self._add_sequence(acts[start:stop], is_masked[start:stop], float(t[start]))

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

    def _add_sequence(self, acts: NDArray[np.float32], is_masked: NDArray[np.bool_], t: float) -> None:
        size = self.total.shape[1]
        groups = [min(int(t * T_BINS), T_BINS - 1) + masked * T_BINS for masked in (0, 1)]
        member = np.stack([~is_masked, is_masked]).astype(np.float64)
        self.count[groups] += member.sum(axis=1)
        scratch = _scratch(size)
        for start in range(0, len(acts), len(scratch)):
            weight = member[:, start : start + len(scratch)]
            piece = scratch[: weight.shape[1]]
            np.copyto(piece, acts[start : start + len(scratch)].reshape(-1, size))
            # A product with zeros and ones is the sum over each group, at the speed of BLAS. Infinite values
            # make it NaN, which `finite` tells.
            with np.errstate(invalid="ignore"):
                self.total[groups] += weight @ piece
                self.square[groups] += weight @ np.einsum("rd,rd->r", piece, piece)


_kept = threading.local()


def _scratch(size: int) -> NDArray[np.float64]:
    """Memory for rows of that size in float64, used again by the same thread."""
    found: NDArray[np.float64] | None = getattr(_kept, "scratch", None)
    if found is None or found.shape[1] != size:
        found = _kept.scratch = np.empty((max(1, min(PIECE_ROWS, PIECE_BYTES // (8 * size))), size))
    return found
