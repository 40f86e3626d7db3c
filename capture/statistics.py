"""Running mean and mean square of activations, by masked or not and by part of [0, 1] in t.

1. A block of rows (a shard) is split into groups by (is_masked, t_bin).
2. Sums over each group's rows are taken one row after another in float64.
3. The block's means are merged into the running ones (Chan et al.), blocks in row order.

The running values are what the store holds, and blocks are fixed by the store's layout: the same rows give
the same bits whatever the batch size, and whether computed while capturing or from the store.
"""

# Axes: row, is_masked (no, yes), t_bin, then the axes of one row

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.schema import T_BINS
from mdlm_interp.shapes import Float64


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
    """Moments of the blocks added so far.

    Source:
        Chan, Golub, LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._count = np.zeros(2 * T_BINS)
        self._mean = np.zeros((2 * T_BINS, int(np.prod(shape))))
        self._mean_square = np.zeros(2 * T_BINS)

    def add(self, acts: NDArray[np.float32], is_masked: NDArray[np.bool_], t: NDArray[np.float64]) -> None:
        """Merge one block.

        Args:
            acts: Activations [row, ...].
            t: Diffusion time of each row.
        """
        t_bin = np.minimum((t * T_BINS).astype(np.int64), T_BINS - 1)
        group = is_masked * T_BINS + t_bin
        for number in np.unique(group):
            values = acts[group == number].astype(np.float64).reshape(-1, self._mean.shape[1])
            count = len(values)
            # Along the first axis numpy adds row after row: no blocking that depends on the machine.
            mean = values.sum(axis=0) / count
            mean_square = (values * values).sum(axis=0).mean() / count
            self._count[number] += count
            share = count / self._count[number]
            self._mean[number] += (mean - self._mean[number]) * share
            self._mean_square[number] += (mean_square - self._mean_square[number]) * share

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a store keeps, by name."""
        empty = self._count == 0
        mean, mean_square = self._mean.copy(), self._mean_square.copy()
        mean[empty], mean_square[empty] = np.nan, np.nan
        return {
            "count": self._count.reshape(2, T_BINS).copy(),
            "mean": mean.reshape(2, T_BINS, *self._shape),
            "mean_square": mean_square.reshape(2, T_BINS),
        }
