"""Training batches from an activation store, each a pure function of (seed, step).

The order is that of `capture.iteration.ShuffledRows`: a keyed permutation of chunks and of the rows in a window, so
that nothing but the step has to be saved. Epochs follow each other; rows that do not fill a batch at the end of one
are left out of it, others in each. With `t_bins` the sequences are dealt into equal parts of (0, 1) in diffusion
time, each has its own epochs, and every batch has the same number of rows from each.
"""

# Axes: layer, row, d_model

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.iteration import RowBatch, ShuffledRows
from capture.reader import ActivationStore
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Float32, Float64
from transcoder.train_config import TrainConfig
from transcoder.windows import OwnRows

WHERE = ("seq", "pos", "x0", "xt")
"""Coordinates that a batch keeps of its rows."""


@dataclass(frozen=True)
class Batch:
    """Aligned inputs and targets of some rows."""

    rows: NDArray[np.int64]
    """Rows of the store; of rows from the running model, their numbers in the epoch."""
    x: Float32[Tensor, "layer row d_model"]
    y: Float32[Tensor, "layer row d_model"]
    is_masked: Bool[Tensor, " row"]
    t: Float64[Tensor, " row"]
    where: Mapping[str, Tensor]
    """Coordinates of each row: sequence, position, token ids."""


@runtime_checkable
class Batches(Protocol):
    """Batches by step number."""

    def batch(self, step: int, own: range | None = None) -> Batch:
        """The batch of a step, the same whenever it is asked for.

        Args:
            own: Which of its rows; none gives all.
        """
        ...

    def cursor(self, step: int) -> dict[str, int]:
        """Where in the data a step is, for the record."""
        ...


class StoreBatches:
    """Batches of a store's rows.

    Args:
        sequences: Numbers of the sequences to use.
    Raises:
        DataError: If they have too few rows for one batch, or a part of (0, 1) in time has none.
    """

    def __init__(
        self,
        store: ActivationStore,
        sequences: NDArray[np.int64],
        config: TrainConfig,
        input_hooks: Sequence[str],
        output_hooks: Sequence[str],
    ) -> None:
        self._hooks = tuple(input_hooks), tuple(output_hooks)
        self._size = config.batch_size
        self._row = store.row_shape(input_hooks[0])
        parts = [sequences] if config.t_bins is None else by_time(store, sequences, config.t_bins)
        self._parts = [
            OwnRows(
                store,
                hooks=list(dict.fromkeys([*input_hooks, *output_hooks])),
                batch_size=config.batch_size // len(parts),
                seed=config.seed,
                select=config.select,
                sequences=part,
                window_chunks=max(1, config.window_chunks // len(parts)),
                drop_last=True,
            )
            for part in parts
        ]

    def rows(self, step: int) -> NDArray[np.int64]:
        """The store's rows of a step, without reading them."""
        return np.concatenate([part.rows(*_place(part, step)) for part in self._parts])

    def batch(self, step: int, own: range | None = None) -> Batch:
        """The activations of a step, of whose rows only those asked for are read."""
        own = range(self._size) if own is None else own
        x, y = (torch.empty(len(hooks), len(own), *self._row) for hooks in self._hooks)
        named = [*zip(self._hooks[0], x, strict=True), *zip(self._hooks[1], y, strict=True)]
        found, filled = [], 0
        for number, part in enumerate(self._parts):
            of_part = _within(own, number * part.batch_size, part.batch_size)
            if not of_part:
                continue
            stop = filled + len(of_part)
            acts = [(name, out[filled:stop]) for name, out in named]
            found.append(part.part(*_place(part, step), of_part, acts))
            filled = stop
        coords = {name: torch.cat([part.coords[name] for part in found]) for name in found[0].coords}
        return Batch(
            rows=torch.cat([part.rows for part in found]).numpy(),
            x=x,
            y=y,
            is_masked=coords["is_masked"],
            t=coords["t"],
            where={name: coords[name] for name in WHERE},
        )

    def cursor(self, step: int) -> dict[str, int]:
        """The epoch and step in it; of several parts, of the first."""
        epoch, within = _place(self._parts[0], step)
        return {"epoch": epoch, "step_of_epoch": within, "steps_per_epoch": self._parts[0].steps_per_epoch}


def _within(own: range, start: int, size: int) -> range:
    """Those of some rows that are among `size` rows from `start`, counted from there.

    >>> [_within(range(3, 9), start, 4) for start in (0, 4, 8, 12)]
    [range(3, 4), range(0, 4), range(0, 1), range(0, 0)]
    """
    found = range(max(own.start - start, 0), min(own.stop - start, size))
    return found or range(0)


def _place(part: ShuffledRows, step: int) -> tuple[int, int]:
    return divmod(step, part.steps_per_epoch)


def by_time(store: ActivationStore, sequences: NDArray[np.int64], n_bins: int) -> list[NDArray[np.int64]]:
    """The sequences in each of n equal parts of (0, 1) in diffusion time.

    Raises:
        DataError: If a part has none.
    """
    times = store.times().numpy()[sequences]
    bins = np.minimum((times * n_bins).astype(np.int64), n_bins - 1)
    parts = [sequences[bins == number] for number in range(n_bins)]
    for number, part in enumerate(parts):
        if len(part) == 0:
            raise DataError(
                f"no training sequence has t in [{number / n_bins:g}, {(number + 1) / n_bins:g}), one of t_bins "
                f"{n_bins}; lower t_bins or capture more times"
            )
    return parts


def held_out_batches(
    store: ActivationStore,
    sequences: NDArray[np.int64],
    config: TrainConfig,
    input_hooks: Sequence[str],
    output_hooks: Sequence[str],
) -> list[Batch]:
    """Batches of up to `calibration_rows` rows of sequences that training leaves out; none if they have no row."""
    try:
        rows = ShuffledRows(
            store,
            hooks=list(dict.fromkeys([*input_hooks, *output_hooks])),
            batch_size=min(1024, config.calibration_rows),
            seed=config.seed,
            select=config.select,
            sequences=sequences,
        )
    except DataError:  # of what is selected, nothing is held out
        return []
    steps = min(len(rows), config.calibration_rows // rows.batch_size)
    return [as_batch(rows.batch(0, step), input_hooks, output_hooks) for step in range(steps)]


def as_batch(rows: RowBatch, input_hooks: Sequence[str], output_hooks: Sequence[str]) -> Batch:
    """Rows of a store with layers stacked."""
    return Batch(
        rows=rows.rows.numpy(),
        x=torch.stack([rows.acts[name] for name in input_hooks]),
        y=torch.stack([rows.acts[name] for name in output_hooks]),
        is_masked=rows.coords["is_masked"],
        t=rows.coords["t"],
        where={name: rows.coords[name] for name in WHERE},
    )
