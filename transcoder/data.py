"""Rows of an activation store as training batches, in an order fixed by the seed.

1. Sequences are split into training and held-out ones by a keyed permutation.
2. Training rows are cut into chunks of 256 consecutive ones; each epoch permutes the chunks, takes them
   in windows of a few dozen, and permutes the rows of each window.
3. Batch `step` is the step-th piece of the epochs laid end to end, so every row comes once an epoch and
   all batches have one size.

Any batch is a pure function of (seed, step): nothing needs saving to resume. A window is read in the
store's order, once.
"""

# Axes: row, layer, d_model, seq, pos

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.statistics import HookStatistics
from mdlm_interp.errors import DataError, StoreError, nearest
from mdlm_interp.randomness import permutation
from mdlm_interp.shapes import Float32
from transcoder.config import hook_names
from transcoder.normalisation import Normalisation, normalisation_from_moments

CHUNK_ROWS = 256
"""Rows that are read together: the chunk of a store."""


@runtime_checkable
class RowStore(Protocol):
    """What is used of `capture.ActivationStore`; row = seq * length + pos."""

    def __len__(self) -> int:
        """Committed rows."""
        ...

    @property
    def hooks(self) -> Sequence[str]:
        """Names of the recorded hook points."""
        ...

    @property
    def length(self) -> int:
        """Positions of each sequence."""
        ...

    @property
    def n_sequences(self) -> int:
        """Recorded sequences."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """How the store was captured."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the activations come from: the model's weights, the text, versions."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the capture ran to its end."""
        ...

    @property
    def manifest(self) -> Any:
        """What the store will hold when it is complete: `planned_rows`."""
        ...

    def read(self, rows: Any, hooks: Any) -> Mapping[str, Tensor]:
        """Float32 activations [row d] of each hook point."""
        ...

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Clean and noised token ids [seq pos]."""
        ...

    def times(self) -> Tensor:
        """Diffusion time of each sequence, float64."""
        ...

    def statistics(self, hook: str) -> HookStatistics:
        """Moments of a hook point by stratum."""
        ...

    def fingerprint(self) -> str:
        """Hash of all the store's data."""
        ...


class Coverage(NamedTuple):
    """How much of a planned capture a store holds."""

    committed_rows: int
    planned_rows: int
    complete: bool

    def __str__(self) -> str:
        """One sentence for a warning or a report, without a full stop."""
        rows = f"{self.committed_rows:,} of {self.planned_rows:,} planned rows"
        state = "complete" if self.complete else "INCOMPLETE, its capture did not run to the end"
        return f"{rows} ({state})"


def coverage(store: RowStore) -> Coverage:
    """Committed and planned rows of a store."""
    return Coverage(len(store), store.planned_rows, store.complete)


def infer_shape(store: RowStore, input_hook: str, output_hook: str) -> tuple[int, int]:
    """Number of layers and d_model of a store that holds both hook points of every layer.

    Raises:
        StoreError: If a hook point is missing, or the store does not hold every position of equal sequences.
    """
    for field, needed in (("positions", "all"), ("pack", "blocks")):
        found = store.config.get(field, needed)
        if found != needed:
            raise StoreError(
                f"a transcoder is trained and judged on whole sequences, and the store was captured with {field} "
                f"{found!r}; capture with {field} {needed!r}"
            )
    present = set(store.hooks)
    n_layers = 0
    while hook_names(output_hook, n_layers + 1)[-1] in present:
        n_layers += 1
    for name in (*hook_names(output_hook, max(1, n_layers)), *hook_names(input_hook, max(1, n_layers))):
        if name not in present:
            raise StoreError(
                f"the store holds no {name!r}{nearest(name, sorted(present))}; capture {input_hook!r} and "
                f"{output_hook!r} of every block"
            )
    width = store.read([0], [hook_names(output_hook, 1)[0]])[hook_names(output_hook, 1)[0]].shape[-1]
    return n_layers, int(width)


def store_normalisation(store: RowStore, hooks: Sequence[str]) -> Normalisation:
    """The normalisation of some hook points from the store's statistics.

    Raises:
        DataError: If an activation does not vary over the store.
    """
    pooled = [store.statistics(name).pooled() for name in hooks]
    return normalisation_from_moments([(mean, mean_square) for _, mean, mean_square in pooled], hooks)


@dataclass(frozen=True)
class SequenceSplit:
    """Numbers of the sequences on each side, ascending."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_sequences(x_0: Tensor, held_out_fraction: float, seed: int) -> SequenceSplit:
    """Hold out a share of the sequences; those with equal clean tokens stay on one side.

    Args:
        x_0: Clean token ids [seq pos]: the same text noised twice must not be on both sides.
    Raises:
        DataError: If a side would be empty.
    """
    n_sequences = x_0.shape[0]
    groups = np.unique(x_0.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    n_groups = int(groups.max()) + 1 if n_sequences else 0
    if n_groups < 2:
        raise DataError(
            f"a split needs at least 2 different sequences, the store has {n_groups}; capture more text"
        )
    # Renumber groups by first appearance, so that the split does not depend on how token ids sort.
    first = np.full(n_groups, n_sequences)
    np.minimum.at(first, groups, np.arange(n_sequences))
    groups = np.argsort(np.argsort(first))[groups]
    n_held_out = min(max(1, round(held_out_fraction * n_groups)), n_groups - 1)
    chosen = permutation(seed, "clt:split", 0, n_groups)[:n_held_out]
    is_held_out = np.isin(groups, chosen)
    return SequenceSplit(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))


class RowOrder:
    """The endless order in which training rows are used: position to store row."""

    def __init__(self, sequences: NDArray[np.int64], length: int, *, seed: int, window_chunks: int) -> None:
        self.sequences, self.length = sequences, length
        self.seed, self.window_chunks = seed, window_chunks
        self.n_rows = len(sequences) * length
        self.n_chunks = -(-self.n_rows // CHUNK_ROWS)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def pieces(self, start: int, stop: int) -> list[tuple[tuple[int, int], slice]]:
        """The windows (epoch, number) that positions start to stop fall in, and which part of each."""
        found = []
        while start < stop:
            epoch, offset = divmod(start, self.n_rows)
            bounds = self._epoch(epoch)[1]
            window = int(np.searchsorted(bounds, offset, side="right")) - 1
            end = min(int(bounds[window + 1]), offset + stop - start)
            found.append(((epoch, window), slice(offset - int(bounds[window]), end - int(bounds[window]))))
            start += end - offset
        return found

    def window_rows(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A window's store rows in ascending order, and the order in which they are used."""
        chunks, bounds = self._epoch(epoch)
        chosen = np.sort(chunks[window * self.window_chunks : (window + 1) * self.window_chunks])
        parts = [np.arange(c * CHUNK_ROWS, min((c + 1) * CHUNK_ROWS, self.n_rows)) for c in chosen]
        index = np.concatenate(parts)
        rows = self.sequences[index // self.length] * self.length + index % self.length
        number = epoch * (len(bounds) - 1) + window
        return rows, permutation(self.seed, "clt:rows", number, len(rows))

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of chunks, and the positions at which windows begin and the last one ends."""
        chunks = permutation(self.seed, "clt:chunks", epoch, self.n_chunks)
        sizes = np.minimum((chunks + 1) * CHUNK_ROWS, self.n_rows) - chunks * CHUNK_ROWS
        window_sizes = np.add.reduceat(sizes, np.arange(0, self.n_chunks, self.window_chunks))
        return chunks, np.concatenate([[0], np.cumsum(window_sizes)])


@dataclass(frozen=True)
class Batch:
    """Aligned inputs and targets of some rows."""

    rows: NDArray[np.int64]
    """Rows of the store."""
    x: Float32[Tensor, "layer row d_model"]
    y: Float32[Tensor, "layer row d_model"]


class BatchLoader:
    """Batches by step number; holds the windows that the current batch needs."""

    def __init__(
        self,
        store: RowStore,
        order: RowOrder,
        batch_size: int,
        input_hooks: Sequence[str],
        output_hooks: Sequence[str],
    ) -> None:
        self.store, self.order, self.batch_size = store, order, batch_size
        self.input_hooks, self.output_hooks = list(input_hooks), list(output_hooks)
        self._windows: dict[tuple[int, int], tuple[Batch, NDArray[np.int64]]] = {}
        self._latest: Batch | None = None

    def rows(self, step: int) -> NDArray[np.int64]:
        """The store's rows of a step, without reading them."""
        parts = []
        for key, part in self._pieces(step):
            rows, order = self.order.window_rows(*key)
            parts.append(rows[order[part]])
        return np.concatenate(parts)

    def batch(self, step: int) -> Batch:
        """The activations of a step."""
        pieces = self._pieces(step)
        self._windows = {key: self._windows.get(key) or self._read(key) for key, _ in pieces}
        parts = []
        for key, part in pieces:
            window, order = self._windows[key]
            chosen = torch.from_numpy(order[part])
            parts.append(Batch(window.rows[chosen.numpy()], window.x[:, chosen], window.y[:, chosen]))
        if len(parts) == 1:
            return parts[0]
        return Batch(
            np.concatenate([part.rows for part in parts]),
            torch.cat([part.x for part in parts], 1),
            torch.cat([part.y for part in parts], 1),
        )

    def _pieces(self, step: int) -> list[tuple[tuple[int, int], slice]]:
        return self.order.pieces(step * self.batch_size, (step + 1) * self.batch_size)

    def _read(self, key: tuple[int, int]) -> tuple[Batch, NDArray[np.int64]]:
        rows, order = self.order.window_rows(*key)
        # A store that fits one window has the same rows in every epoch.
        if self._latest is None or not np.array_equal(self._latest.rows, rows):
            self._latest = read_rows(self.store, rows, self.input_hooks, self.output_hooks)
        return self._latest, order


def read_rows(
    store: RowStore, rows: NDArray[np.int64], input_hooks: Sequence[str], output_hooks: Sequence[str]
) -> Batch:
    """Inputs and targets of some rows, layers stacked."""
    read = store.read(rows, list(dict.fromkeys([*input_hooks, *output_hooks])))
    return Batch(
        rows,
        torch.stack([read[name] for name in input_hooks]),
        torch.stack([read[name] for name in output_hooks]),
    )
