"""Rows of a store in a shuffled order, batch after batch, that can go on from any step.

1. An epoch permutes the chunks of 256 rows, keyed by (seed, epoch), and deals their rows out to the ranks
   in equal parts, in that order.
2. A rank takes its chunks in windows of `window_chunks` and permutes the rows of each window, keyed by
   (seed, epoch, rank, window).
3. Batch `step` is the step-th piece of that order.

The guarantee: which rows make a batch is a pure function of (seed, epoch, step, rank, world_size), the other
arguments, and which rows the store has; neither of interruptions nor of what was read before. Every selected
row comes exactly once an epoch, on one rank. An epoch reads every chunk once; where two ranks share a chunk,
both read it. So nothing needs saving but (epoch, step), and going on takes the reading of one window.

It is no uniform permutation: rows of a batch come from `window_chunks` chunks at a time, and a chunk is 256
neighbouring rows. More chunks mix better and take more memory.
"""

# Axes: row, then the axes of one row

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.reader import ActivationStore
from capture.row_numbers import shown, whole_number, whole_numbers
from capture.schema import CHUNK_ROWS
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.randomness import permutation
from mdlm_interp.shapes import Int64

SCAN_ROWS = 2**20
"""Rows whose columns are looked at together when the selected ones are counted."""

MOST_EPOCHS = 2**31

Selection: TypeAlias = Literal["all", "masked", "unmasked"]


class Position(NamedTuple):
    """Where an iteration is: what has to be saved to go on."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Some rows of a store."""

    rows: Int64[Tensor, " row"]
    """Their numbers in the store."""
    acts: Mapping[str, Tensor]
    """Float32 activations [row, ...] by hook name."""
    coords: Mapping[str, Tensor]
    """What `ActivationStore.coords` gives: seq, pos, x0, xt, is_masked, doc and t [row]."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What of an epoch is one rank's."""

    chunks: NDArray[np.int64]
    """Numbers of its chunks, in order."""
    skip: int
    """Selected rows of the first chunk that are of the rank before."""
    bounds: NDArray[np.int64]
    """Rows before each window, and all rows."""


class ShuffledRows:
    """Batches of a store's rows, shuffled; iterating goes on from `position` to the end of its epoch.

        rows = ShuffledRows(store, batch_size=4096, seed=0)
        rows.position = saved  # or not: then from the beginning
        while rows.position.epoch < 3:
            for batch in rows:
                train(batch.acts)
                save(rows.position)

    Args:
        hooks: Names of the hook points to read; none takes all.
        batch_size: Rows of a batch; the last one of an epoch is shorter unless `drop_last`.
        select: Which rows: all, only those of masked tokens, or only the others.
        sequences: Only rows of these sequences; none takes all.
        window_chunks: Chunks whose rows are shuffled together. At most two windows are in memory, of
            `window_chunks * 256` rows of every hook.
        rank: Which of `world_size` processes this is. All have the same number of steps; with
            `drop_last` all their batches are full.
    Raises:
        ConfigError: If an argument is of another type or out of its range.
        DataError: If `sequences` are not numbers of sequences, or too few rows for one batch are selected.
        StoreError: If a hook is not in the store.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        hooks: str | Sequence[str] | None = None,
        batch_size: int,
        seed: int = 0,
        select: Selection = "all",
        sequences: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        window_chunks: int = 32,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        batch_size, seed, window_chunks, rank, world_size = (
            whole_number(value, name, ConfigError)
            for name, value in (
                ("batch_size", batch_size),
                ("seed", seed),
                ("window_chunks", window_chunks),
                ("rank", rank),
                ("world_size", world_size),
            )
        )
        for name, value in (("batch_size", batch_size), ("window_chunks", window_chunks)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed must be in [0, 2**64), got {seed}; leave it out for 0")
        if not isinstance(drop_last, bool | np.bool_):
            raise ConfigError(f"drop_last must be True or False, got {shown(drop_last)}; pass one of them")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be in [0, world_size {world_size}), got {rank}")
        if select not in ("all", "masked", "unmasked"):
            raise ConfigError(f"select must be 'all', 'masked' or 'unmasked', got {select!r}")
        self.store, self.batch_size, self.seed, self.select = store, batch_size, seed, select
        self.hooks = (hooks,) if isinstance(hooks, str) else store.hooks if hooks is None else tuple(hooks)
        self.window_chunks, self.rank, self.world_size = window_chunks, rank, world_size
        for hook in self.hooks:
            store.row_shape(hook)
        self._wanted = None if sequences is None else _lookup(sequences, store)
        self._filtered = self.select != "all" or self._wanted is not None
        self._counts = self._count()
        self.n_rows = int(self._counts.sum())
        """Rows of an epoch, over all ranks."""
        least, most = self.n_rows // world_size, -(-self.n_rows // world_size)
        self.steps_per_epoch = least // batch_size if drop_last else -(-most // batch_size)
        if not least or not self.steps_per_epoch:
            full = f" full batch of {batch_size}" if least else " batch"
            raise DataError(
                f"{store.name}: {self.n_rows} selected rows over {world_size} ranks make no{full}; select more "
                f"rows or lower batch_size"
            )
        self._share = lru_cache(maxsize=2)(self._draw_share)
        self._windows: dict[tuple[int, int], tuple[RowBatch, NDArray[np.int64]]] = {}
        """The windows of the batch given last, by epoch and number."""
        self._position = Position(0, 0)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch

    @property
    def position(self) -> Position:
        """The (epoch, step) of the next batch that iteration gives; may be set to go on from there.

        Raises:
            ConfigError: If what is set is no position, or one that this iteration does not have.
        """
        return self._position

    @position.setter
    def position(self, position: Sequence[int]) -> None:
        try:
            epoch, step = position
        except (TypeError, ValueError):
            raise ConfigError(
                f"a position must be (epoch, step), got {shown(position)}; pass what `position` was when it was saved"
            ) from None
        self._position = self._check(epoch, step)

    def __iter__(self) -> Iterator[RowBatch]:
        """The batches from `position` to the end of its epoch; `position` is then that of the next one."""
        epoch = self._position.epoch
        while self._position.epoch == epoch:
            batch = self.batch(*self._position)
            self._position = self._after(self._position)
            yield batch

    def rows(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The rows of a batch, without reading their activations.

        Raises:
            ConfigError: If there is no such step.
        """
        epoch, step = self._check(epoch, step)
        parts = [np.empty(0, np.int64)]
        for window, part in self._pieces(epoch, step):
            rows, order = self._window_rows(epoch, window)
            parts.append(rows[order[part]])
        return np.concatenate(parts)

    def batch(self, epoch: int, step: int) -> RowBatch:
        """One batch. The windows that it is from are kept, so that the next ones need not read them again.

        Raises:
            ConfigError: If there is no such step.
        """
        epoch, step = self._check(epoch, step)
        pieces = self._pieces(epoch, step)
        self._windows = {key: self._windows[key] for w, _ in pieces if (key := (epoch, w)) in self._windows}
        parts = []
        for window, part in pieces:
            if (epoch, window) not in self._windows:
                rows, order = self._window_rows(epoch, window)
                self._windows[epoch, window] = self._read(rows), order
                self._prefetch_after(epoch, window)
            whole, order = self._windows[epoch, window]
            parts.append(_chosen(whole, torch.from_numpy(order[part])))
        return _joined(parts) if parts else self._read(np.empty(0, np.int64))

    def _check(self, epoch: Any, step: Any) -> Position:
        epoch, step = whole_number(epoch, "epoch", ConfigError), whole_number(step, "step", ConfigError)
        if not 0 <= epoch < MOST_EPOCHS or not 0 <= step < self.steps_per_epoch:
            raise ConfigError(
                f"an epoch has steps 0 to {self.steps_per_epoch - 1}, got step {step} of epoch {epoch}; was the "
                f"position saved with another store, selection, batch_size or world_size?"
            )
        return Position(epoch, step)

    def _after(self, position: Position) -> Position:
        epoch, step = position
        return Position(epoch, step + 1) if step + 1 < self.steps_per_epoch else Position(epoch + 1, 0)

    def _pieces(self, epoch: int, step: int) -> list[tuple[int, slice]]:
        """The windows that a batch's rows are in, and which part of each."""
        bounds = self._share(epoch).bounds
        start, stop = step * self.batch_size, min((step + 1) * self.batch_size, int(bounds[-1]))
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        found = []
        for window, (low, high) in enumerate(pairwise(bounds[first:].tolist()), start=first):
            if low < stop:
                found.append((window, slice(max(start, low) - low, min(stop, high) - low)))
        return found

    def _draw_share(self, epoch: int) -> _Share:
        chunks = permutation(self.seed, "rows:chunks", epoch, len(self._counts))
        chunks = chunks[self._counts[chunks] > 0]
        ends = np.cumsum(self._counts[chunks])
        start, stop = (self.n_rows * rank // self.world_size for rank in (self.rank, self.rank + 1))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        chunks, ends = chunks[first : last + 1], ends[first : last + 1]
        skip = start - int(ends[0] - self._counts[chunks[0]])
        ends = np.minimum(ends, stop) - start
        bounds = np.unique([0, *ends[self.window_chunks - 1 :: self.window_chunks], stop - start])
        return _Share(chunks=chunks, skip=skip, bounds=bounds)

    def _window_rows(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A window's rows in ascending order, and the order in which they are used."""
        share = self._share(epoch)
        chunks = share.chunks[window * self.window_chunks : (window + 1) * self.window_chunks]
        starts = (chunks * CHUNK_ROWS).tolist()
        rows = np.concatenate(
            [np.arange(start, min(start + CHUNK_ROWS, len(self.store))) for start in starts]
        )
        if self._filtered:
            rows = rows[self._selected(rows)]
        rows = rows[share.skip if window == 0 else 0 :]
        rows = np.sort(rows[: int(share.bounds[window + 1] - share.bounds[window])])
        stream = f"rows:window:{self.rank}/{self.world_size}"
        return rows, permutation(self.seed, stream, epoch << 32 | window, len(rows))

    def _read(self, rows: NDArray[np.int64]) -> RowBatch:
        acts = self.store.read(rows, self.hooks)
        return RowBatch(rows=torch.from_numpy(rows), acts=acts, coords=self.store.coords(rows))

    def _prefetch_after(self, epoch: int, window: int) -> None:
        """Let the disk work on the next window while this one is used."""
        self.store.prefetch(self._window_rows(*self._following(epoch, window))[0], self.hooks)

    def _following(self, epoch: int, window: int) -> tuple[int, int]:
        """Epoch and number of the next window that a batch wants."""
        bounds = self._share(epoch).bounds
        used = min(int(bounds[-1]), self.steps_per_epoch * self.batch_size)
        return (epoch, window + 1) if bounds[window + 1] < used else (epoch + 1, 0)

    def _count(self) -> NDArray[np.int64]:
        """Selected rows of each chunk."""
        rows = len(self.store)
        starts = np.arange(0, rows, CHUNK_ROWS)
        if not self._filtered:
            return np.minimum(CHUNK_ROWS, rows - starts)
        counts = [np.empty(0, np.int64)]
        for start in range(0, rows, SCAN_ROWS):
            stop = min(start + SCAN_ROWS, rows)
            selected = self._selected(slice(start, stop)).astype(np.int64)
            counts.append(np.add.reduceat(selected, np.arange(0, stop - start, CHUNK_ROWS)))
        return np.concatenate(counts)

    def _selected(self, rows: slice | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows are selected."""
        names = [
            *(["is_masked"] if self.select != "all" else []),
            *(["seq"] if self._wanted is not None else []),
        ]
        columns = {name: column.numpy() for name, column in self.store.coords(rows, names).items()}
        selected = np.ones(len(columns[names[0]]), np.bool_)
        if self.select != "all":
            selected &= columns["is_masked"] == (self.select == "masked")
        if self._wanted is not None:
            selected &= self._wanted[columns["seq"]]
        return selected


def _lookup(sequences: Any, store: ActivationStore) -> NDArray[np.bool_]:
    """Whether each sequence is wanted, by its number."""
    numbers = whole_numbers(sequences, "sequences", DataError)
    # The beginning of one more sequence may be committed.
    wanted = np.zeros(store.n_sequences + 1, np.bool_)
    outside = numbers[(numbers < 0) | (numbers >= store.n_sequences)]
    if len(outside):
        raise DataError(f"sequences must be in [0, {store.n_sequences}), got {int(outside[0])}")
    wanted[numbers] = True
    return wanted


def _chosen(window: RowBatch, index: Int64[Tensor, " row"]) -> RowBatch:
    return RowBatch(
        rows=window.rows[index],
        acts={name: values.index_select(0, index) for name, values in window.acts.items()},
        coords={name: values.index_select(0, index) for name, values in window.coords.items()},
    )


def _joined(parts: Sequence[RowBatch]) -> RowBatch:
    if len(parts) == 1:
        return parts[0]
    return RowBatch(
        rows=torch.cat([part.rows for part in parts]),
        acts={name: torch.cat([part.acts[name] for part in parts]) for name in parts[0].acts},
        coords={name: torch.cat([part.coords[name] for part in parts]) for name in parts[0].coords},
    )
