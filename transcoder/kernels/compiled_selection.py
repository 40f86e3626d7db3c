"""The selections as compiled loops, on CPU tensors: a part of what `compiled.py` gives."""

# Axes: batch, feature

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.shapes import Float
from oracle.threads import over_rows
from transcoder.kernels import plain, selection_loops
from transcoder.sparse import SparseActs, offsets_of

SAMPLED_ROWS = 32
"""One of so many rows tells where the largest values of all are to be sought."""


class Bits(NamedTuple):
    """Floats in memory, and the same as integers, whose order above zero is theirs."""

    x: NDArray[Any]
    bits: NDArray[Any]
    infinity: np.integer[Any]
    """Bits of infinity; what is above is NaN."""
    magnitude: np.integer[Any]
    """All bits but the sign."""

    @classmethod
    def of(cls, x: Tensor) -> Bits:
        """Of a tensor, flat."""
        memory: NDArray[Any] = x.detach().contiguous().view(-1).numpy()
        integer = np.dtype(f"int{8 * memory.itemsize}").type
        infinity = np.array(np.inf, memory.dtype).view(integer)[()]
        return cls(memory, memory.view(integer), infinity, integer(np.iinfo(integer).max))


def select_topk(pre_acts: Float[Tensor, "batch feature"], k: int) -> SparseActs:
    """See `plain.select_topk`."""
    batch, n_features = pre_acts.shape
    k = min(k, n_features)
    if k == 0:
        return plain.select_topk(pre_acts, k)
    given = Bits.of(pre_acts)
    indices, counts = np.empty((batch, k), np.int32), np.empty(batch, np.int64)

    def run(first: int, stop: int) -> None:
        selection_loops.largest_of_rows(*given, n_features, k, first, stop, indices, counts)

    over_rows(run, batch, pre_acts.numel())
    kept = np.arange(k) < counts[:, None]
    rows, chosen = np.arange(batch).repeat(counts), indices[kept]
    return SparseActs(
        torch.from_numpy(given.x[rows * n_features + chosen]),
        torch.from_numpy(chosen),
        offsets_of(torch.from_numpy(counts)),
    )


def select_batch_topk(pre_acts: Float[Tensor, "batch feature"], n: int) -> SparseActs:
    """See `plain.select_batch_topk`.

    Only what is above a guess, from a sample of rows, is listed; if that is fewer than n, what is above zero.
    """
    batch, n_features = pre_acts.shape
    given = Bits.of(pre_acts)
    guess = _lower_bound(given.x.reshape(batch, n_features)[::SAMPLED_ROWS], n / max(1, pre_acts.numel()))
    offsets, indices, keys = _listed_above(given, n_features, guess)
    if len(keys) < n and guess > 0:
        offsets, indices, keys = _listed_above(given, n_features, given.x.dtype.type(0))
    counts, kept = np.diff(offsets), np.ones(len(keys), np.bool_)
    if len(keys) > n:
        threshold = np.partition(keys, len(keys) - n)[len(keys) - n] if n else given.infinity + 2
        selection_loops.keep_first(keys, threshold, n - np.sum(keys > threshold), offsets, kept, counts)
    rows, chosen = np.arange(batch).repeat(counts), indices[kept]
    values = torch.from_numpy(given.x[rows * n_features + chosen])
    return SparseActs(values, torch.from_numpy(chosen), offsets_of(torch.from_numpy(counts)))


def _lower_bound(sample: NDArray[Any], share: float) -> Any:
    """A positive value that somewhat more than this share of all is probably above; zero if there is none."""
    positive = sample[(sample > 0) & (sample < np.inf)]
    rank = int(1.2 * share * sample.size + 4 * (share * sample.size) ** 0.5) + 1
    if rank > len(positive):
        return sample.dtype.type(0)
    return np.partition(positive, len(positive) - rank)[len(positive) - rank]


def _listed_above(
    given: Bits, n_features: int, limit: Any
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """Row by row, the features above a limit, and their values as ordered integers."""
    n_rows = given.x.size // max(1, n_features)
    counts = np.empty(n_rows, np.int64)

    def count(first: int, stop: int) -> None:
        selection_loops.count_above(given.x, n_features, limit, first, stop, counts)

    over_rows(count, n_rows, given.x.size)
    offsets = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))
    indices, keys = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], given.bits.dtype)

    def collect(first: int, stop: int) -> None:
        selection_loops.list_above(*given, n_features, limit, offsets, first, stop, indices, keys)

    over_rows(collect, n_rows, given.x.size)
    return offsets, indices, keys
