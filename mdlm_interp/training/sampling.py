"""Training sequences out of a stream of tokens, in an order that is a pure function of (seed, index).

A sampler numbers its sequences: step s trains on `indices(s)`, and the sequence of a number depends on the seed
and that number alone, not on batch size, earlier steps or interruptions. The stream is only sliced, so it may
be a memory map.
"""

# Axes: batch, pos

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.randomness import permutation, uniforms
from mdlm_interp.shapes import Int64
from mdlm_interp.training.config import SHORTEST, TextConfig


@runtime_checkable
class Sampler(Protocol):
    """Numbered sequences, a window of them a step."""

    def indices(self, step: int) -> range:
        """Numbers of the sequences of a step."""
        ...

    def batch(self, step: int) -> Int64[Tensor, "batch pos"]:
        """Token ids of a step's sequences."""
        ...


def sampler_of(config: TextConfig, stream: NDArray[np.uint16], eos_id: int) -> Sampler:
    """The sampler that a config asks for.

    Raises:
        DataError: If the stream is shorter than one sequence.
    """
    length = config.shape.model_length
    if config.order == "packed":
        return PackedSampler(
            stream=stream,
            length=length,
            batch_size=config.batch_size,
            seed=config.seed,
            wrap_with=eos_id if config.wrap_share == 1.0 else None,
        )
    return WindowSampler(
        stream=stream,
        length=length,
        batch_size=config.batch_size,
        eos_id=eos_id,
        seed=config.seed,
        wrap_share=config.wrap_share,
        short_share=config.short_share,
    )


@dataclass(frozen=True)
class WindowSampler:
    """Random windows (crops) of a token stream; batch `step` is a pure function of (seed, step)."""

    stream: NDArray[np.uint16]
    length: int
    batch_size: int
    eos_id: int
    seed: int
    wrap_share: float
    short_share: float

    def __post_init__(self) -> None:
        _refuse_short(self.stream, self.length)

    def indices(self, step: int) -> range:
        """Numbers of the sequences of a step."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def batch(self, step: int) -> Int64[Tensor, "batch pos"]:
        """Token ids of a step's sequences."""
        length = self.length
        is_short, where = uniforms(self.seed, "length", step, 2)
        if is_short < self.short_share and length > SHORTEST:
            shorter = [size for k in range(16) if (size := SHORTEST << k) < length]
            length = shorter[int(where * len(shorter))]
        rows = [self._window(index, length) for index in self.indices(step)]
        return torch.from_numpy(np.stack(rows))

    def _window(self, index: int, length: int) -> NDArray[np.int64]:
        where, wrapped = uniforms(self.seed, "window", index, 2)
        if wrapped >= self.wrap_share:
            start = int(where * (len(self.stream) - length + 1))
            return self.stream[start : start + length].astype(np.int64)
        start = int(where * (len(self.stream) - length + 3))
        inner = self.stream[start : start + length - 2].astype(np.int64)
        return np.concatenate([[self.eos_id], inner, [self.eos_id]])


@dataclass(frozen=True)
class PackedSampler:
    """Consecutive blocks of a stream, each once an epoch, in an order drawn anew for each epoch.

    An epoch ends with its last block: the window that it falls in has only the blocks that are left. The few
    tokens after the last whole block are never seen.
    """

    stream: NDArray[np.uint16]
    length: int
    batch_size: int
    seed: int
    wrap_with: int | None = None
    """Id before and after the length - 2 tokens of each block; none for bare blocks."""

    def __post_init__(self) -> None:
        _refuse_short(self.stream, self._inner)

    @property
    def _inner(self) -> int:
        return self.length if self.wrap_with is None else self.length - 2

    @property
    def n_blocks(self) -> int:
        """Sequences in an epoch."""
        return len(self.stream) // self._inner

    @property
    def steps_per_epoch(self) -> int:
        """Windows in an epoch, the last one perhaps smaller."""
        return -(-self.n_blocks // self.batch_size)

    def indices(self, step: int) -> range:
        """Numbers of the sequences of a step; those of epoch e are e * n_blocks and the following."""
        epoch, window = divmod(step, self.steps_per_epoch)
        first, end = epoch * self.n_blocks, (epoch + 1) * self.n_blocks
        return range(first + window * self.batch_size, min(first + (window + 1) * self.batch_size, end))

    def block(self, index: int) -> int:
        """Which block of the stream the sequence of that number is."""
        epoch, place = divmod(index, self.n_blocks)
        return int(_order(self.seed, epoch, self.n_blocks)[place])

    def batch(self, step: int) -> Int64[Tensor, "batch pos"]:
        """Token ids of a step's sequences."""
        starts = [self.block(index) * self._inner for index in self.indices(step)]
        rows = np.stack([self.stream[start : start + self._inner] for start in starts]).astype(np.int64)
        if self.wrap_with is not None:
            rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=self.wrap_with)
        return torch.from_numpy(rows)


# An epoch's order takes a while to draw for millions of blocks; of a pure function, keeping it changes nothing.
@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n_blocks: int) -> NDArray[np.int64]:
    return permutation(seed, "packed", epoch, n_blocks)


def _refuse_short(stream: NDArray[np.uint16], length: int) -> None:
    if len(stream) < length:
        raise DataError(
            f"the training text has {len(stream)} tokens, fewer than one window of {length}; "
            f"give more text or lower model.model_length"
        )
