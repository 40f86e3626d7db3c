"""Training rows straight from the running model, without a disk.

1. The text is cut into blocks once. An epoch permutes the training blocks and noises each anew: its time and masks
   are functions of (seed, place in the epochs laid end to end), times evenly spread over consecutive places.
2. `window_sequences` of them at a time run through the model; the rows of a window are permuted, and make as many
   batches as they fill.

Any batch is a pure function of (config, step): going on from a step runs the model over one window. On one machine
the activations are the same bits each time, since the same sequences always make one forward pass.
"""

# Axes: layer, row, d_model; pos

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from capture.forward import Forward
from capture.iteration import RowBatch
from capture.plan import SCHEDULE, PlannedSequence
from capture.plan import Batch as ForwardBatch
from mdlm_interp.diffusion import corrupt, sequence_times
from mdlm_interp.documents import TokenBlock
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.randomness import permutation
from transcoder.batches import Batch, as_batch
from transcoder.live_config import LiveConfig
from transcoder.train_config import TrainConfig


@dataclass(frozen=True)
class LiveText:
    """Blocks of equal length and the model that reads them."""

    blocks: Sequence[TokenBlock]
    forward: Forward
    hooks: tuple[Sequence[str], Sequence[str]]
    """Names of the input and of the output hook points."""
    mask_id: int
    seed: int
    select: str
    """Which rows: all, masked or unmasked."""

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return len(self.blocks[0].ids)

    def noised(self, numbers: Sequence[int], first_place: int, stream: str) -> list[PlannedSequence]:
        """Blocks with the noise of consecutive places in a stream; those without a selected row are left out."""
        places = range(first_place, first_place + len(numbers))
        t = sequence_times(self.seed, places, stream=f"{stream}:t")
        x_0 = torch.from_numpy(np.stack([self.blocks[number].ids for number in numbers]))
        x_t = corrupt(
            x_0,
            SCHEDULE.move_chance(t),
            self.mask_id,
            seed=self.seed,
            indices=places,
            stream=f"{stream}:mask",
        ).numpy()
        found: list[PlannedSequence] = []
        for number, time, ids in zip(numbers, t.tolist(), x_t, strict=True):
            positions = self._positions(ids == self.mask_id)
            if not len(positions):
                continue
            found.append(
                PlannedSequence(
                    number=number,
                    row=found[-1].stop if found else 0,
                    block=self.blocks[number],
                    block_number=number,
                    candidate=number,
                    t=time,
                    xt=ids,
                    positions=positions,
                )
            )
        return found

    def rows(self, sequences: Sequence[PlannedSequence], batch_sequences: int) -> Batch:
        """Run the model over sequences; their rows in order."""
        acts, columns, times = [], [], []
        for start in range(0, len(sequences), batch_sequences):
            part = ForwardBatch(sequences[start : start + batch_sequences], self.length, self.seed)
            acts.append(self.forward(part, check=False))
            columns.append(part.row_columns(self.mask_id))
            times.append(part.times())
        whole = {name: torch.from_numpy(np.concatenate([c[name] for c in columns])) for name in columns[0]}
        whole["t"] = torch.from_numpy(np.concatenate(times))
        numbers = whole["seq"] * self.length + whole["pos"]
        joined = {name: torch.cat([part[name] for part in acts]) for name in acts[0]}
        return as_batch(RowBatch(rows=numbers, acts=joined, coords=whole), *self.hooks)

    def _positions(self, is_masked: NDArray[np.bool_]) -> NDArray[np.int64]:
        if self.select == "all":
            return np.arange(len(is_masked))
        return np.flatnonzero(is_masked == (self.select == "masked"))


class LiveBatches:
    """Batches of rows that the model makes as they are needed.

    Args:
        sequences: Numbers of the blocks to use.
    Raises:
        ConfigError: If batches are to be stratified in time, which rows of the running model are anyway.
        DataError: If a window has too few rows for one batch.
    """

    def __init__(
        self, text: LiveText, sequences: NDArray[np.int64], config: TrainConfig, live: LiveConfig
    ) -> None:
        if config.t_bins is not None:
            raise ConfigError(
                f"t_bins must be none for rows from the running model, whose times are evenly spread, got "
                f"{config.t_bins}; leave it out for none"
            )
        self._text, self._sequences, self._config, self._live = text, sequences, config, live
        self._steps = lru_cache(maxsize=None)(self._count_steps)
        self._window = lru_cache(maxsize=1)(self._run_window)
        if not sum(self._steps(0)):
            raise DataError(
                f"no window of {live.window_sequences} sequences has {config.batch_size} rows, one batch; raise "
                f"live.window_sequences or lower train.batch_size"
            )

    def batch(self, step: int, own: range | None = None) -> Batch:
        """The activations of a step. The model runs over whole windows, whatever is asked for of the batch."""
        epoch, window, piece = self._place(step)
        rows, order = self._window(epoch, window)
        size = self._config.batch_size
        chosen = torch.from_numpy(order[piece * size : (piece + 1) * size])
        chosen = chosen if own is None else chosen[own.start : own.stop]
        return Batch(
            rows=rows.rows[chosen.numpy()],
            x=rows.x[:, chosen],
            y=rows.y[:, chosen],
            is_masked=rows.is_masked[chosen],
            t=rows.t[chosen],
            where={name: values[chosen] for name, values in rows.where.items()},
        )

    def cursor(self, step: int) -> dict[str, int]:
        """The epoch, the window in it, and the batch of that."""
        return dict(zip(("epoch", "window", "batch_of_window"), self._place(step), strict=True))

    def _place(self, step: int) -> tuple[int, int, int]:
        epoch = 0
        while step >= sum(self._steps(epoch)):
            step -= sum(self._steps(epoch))
            epoch += 1
        window = 0
        while step >= self._steps(epoch)[window]:
            step -= self._steps(epoch)[window]
            window += 1
        return epoch, window, step

    def _count_steps(self, epoch: int) -> tuple[int, ...]:
        """Batches of each window of an epoch; masks are drawn for it, and the model is not run."""
        n_windows = -(-len(self._sequences) // self._live.window_sequences)
        counts = [sum(len(s.positions) for s in self._planned(epoch, window)) for window in range(n_windows)]
        return tuple(count // self._config.batch_size for count in counts)

    def _planned(self, epoch: int, window: int) -> list[PlannedSequence]:
        total, size = len(self._sequences), self._live.window_sequences
        order = self._sequences[permutation(self._config.seed, "clt:live:sequences", epoch, total)]
        chosen = order[window * size : (window + 1) * size].tolist()
        return self._text.noised(chosen, epoch * total + window * size, "clt:live")

    def _run_window(self, epoch: int, window: int) -> tuple[Batch, NDArray[np.int64]]:
        rows = self._text.rows(self._planned(epoch, window), self._live.batch_sequences)
        order = permutation(self._config.seed, "clt:live:rows", epoch << 32 | window, len(rows.rows))
        return rows, order
