"""From text to numbered sequences: which block, at which time, noised how, and which of its tokens are rows.

1. Blocks of tokens are numbered in the order of the text. Each becomes one candidate, or one for each of
   the fixed times.
2. Time, masks and positions of a candidate are functions of (seed, number of the block, time): at several
   times the masks of a block are nested, since they come from the same draws.
3. Candidates of which some row is recorded are the sequences, numbered from 0; `batch_size` consecutive
   ones make a batch. So any process can make any batch, whoever made the ones before.
"""

# Axes: pos, row

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capture.config import CaptureConfig
from capture.manifest import ResumePoint
from mdlm_interp.diffusion import MIN_TIME, LogLinearSchedule, corrupt, sequence_times
from mdlm_interp.documents import (
    StreamPosition,
    TokenBlock,
    document_blocks,
    read_documents,
    token_blocks,
)
from mdlm_interp.randomness import permutation, uniforms
from mdlm_interp.shapes import Float64
from mdlm_interp.tokenizers import Tokenizer

SCHEDULE = LogLinearSchedule()
START = StreamPosition(0, 0)


@dataclass(frozen=True, kw_only=True)
class PlannedSequence:
    """A sequence as the model reads it, and its rows."""

    number: int
    row: int
    """Its first row."""
    block: TokenBlock
    block_number: int
    candidate: int
    """Block number times the number of times of a block, plus which of them."""
    t: float
    xt: NDArray[np.int64]
    """Noised token ids [pos]."""
    positions: NDArray[np.int64]
    """Positions that are recorded, ascending [row]; not empty."""
    told: float | None = None
    """Sigma that a sampler told the model; the schedule's at t if none."""
    sampled: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Of a sampler's sequence: every column of `schema.SAMPLER_COLUMNS` [pos]."""

    @property
    def stop(self) -> int:
        """One past its last row."""
        return self.row + len(self.positions)


def sigmas(sequences: Sequence[PlannedSequence]) -> Float64[torch.Tensor, " sequence"]:
    """Total noise of sequences of one source, which a time-conditioned model reads."""
    told = [sequence.told for sequence in sequences if sequence.told is not None]
    if told:
        return torch.tensor(told, dtype=torch.float64)
    return SCHEDULE.sigma(torch.tensor([sequence.t for sequence in sequences], dtype=torch.float64))


class Batch:
    """Consecutive sequences that the model reads together."""

    def __init__(self, sequences: Sequence[PlannedSequence], length: int, seed: int) -> None:
        self.sequences = sequences
        self.start, self.stop = sequences[0].row, sequences[-1].stop
        """First row, and one past the last."""
        self._length, self._seed = length, seed

    @property
    def most_rows(self) -> int:
        """Rows of as many sequences of full length."""
        return len(self.sequences) * self._length

    @property
    def resume(self) -> ResumePoint:
        """Where the text has to be read from to make this batch again."""
        first = self.sequences[0]
        place = first.block.start
        return ResumePoint(
            documents=place.documents,
            blocks=place.blocks,
            candidate=first.candidate,
            sequence=first.number,
            row=first.row,
        )

    def times(self) -> NDArray[np.float64]:
        """Diffusion time of each row."""
        return np.repeat([sequence.t for sequence in self.sequences], self._counts())

    def row_columns(self, mask_id: int) -> dict[str, NDArray[Any]]:
        """Every column of `schema.ROW_COLUMNS` [row], and of a sampler's sequences those of SAMPLER_COLUMNS."""
        at = [(sequence, sequence.positions) for sequence in self.sequences]
        xt = np.concatenate([sequence.xt[positions] for sequence, positions in at])
        return {
            "seq": np.repeat([sequence.number for sequence in self.sequences], self._counts()),
            "pos": np.concatenate([positions for _, positions in at]),
            "x0": np.concatenate([sequence.block.ids[positions] for sequence, positions in at]),
            "xt": xt,
            "is_masked": xt == mask_id,
            "doc": np.concatenate([sequence.block.documents[positions] for sequence, positions in at]),
            **{
                name: np.concatenate([sequence.sampled[name][positions] for sequence, positions in at])
                for name in self.sequences[0].sampled
            },
        }

    def sequence_columns(self) -> dict[str, NDArray[Any]]:
        """Every column of `schema.SEQUENCE_COLUMNS`: [sequence], or [sequence, pos]."""
        rows = self.sequences
        return {
            "row": np.array([sequence.row for sequence in rows]),
            "length": np.array([len(sequence.xt) for sequence in rows]),
            "t": np.array([sequence.t for sequence in rows]),
            "sigma": sigmas(rows).numpy(),
            "seed": np.full(len(rows), self._seed, np.uint64),
            "block": np.array([sequence.block_number for sequence in rows]),
            "source": np.array([sequence.block.source for sequence in rows]),
            "offset": np.array([sequence.block.offset for sequence in rows]),
            "x0": self._padded([sequence.block.ids for sequence in rows], np.int32),
            "xt": self._padded([sequence.xt for sequence in rows], np.int32),
            "doc": self._padded([sequence.block.documents for sequence in rows], np.int64),
        }

    def _counts(self) -> list[int]:
        return [len(sequence.positions) for sequence in self.sequences]

    def _padded(self, values: Sequence[NDArray[np.int64]], dtype: type) -> NDArray[Any]:
        table: NDArray[Any] = np.full((len(values), self._length), -1, dtype)
        for row, value in zip(table, values, strict=True):
            row[: len(value)] = value
        return table


def batches(
    config: CaptureConfig, tokenizer: Tokenizer, resume: ResumePoint | None = None
) -> Iterator[Batch]:
    """The batches of a resolved config, from the one that begins at `resume`."""
    assert config.length is not None
    sequences = planned(config, tokenizer, resume or ResumePoint())
    while taken := list(islice(sequences, config.batch_size)):
        yield Batch(taken, config.length, config.seed)


def planned(config: CaptureConfig, tokenizer: Tokenizer, resume: ResumePoint) -> Iterator[PlannedSequence]:
    """The sequences of a resolved config, from the one at `resume`, up to its budget."""
    number, row = resume.sequence, resume.row
    n_times = len(config.time) if config.times == "fixed" else 1
    start = StreamPosition(resume.documents, resume.blocks)
    for block_number, block in enumerate(read_blocks(config, tokenizer, start), start=resume.blocks):
        for which in range(n_times):
            candidate = block_number * n_times + which
            if candidate < resume.candidate:
                continue
            t = time_of(config, block_number, which)
            xt = noised(block.ids, t, tokenizer.mask_id, seed=config.seed, block_number=block_number)
            positions = recorded_positions(config, xt == tokenizer.mask_id, block_number)
            if not len(positions):
                continue
            if number == config.max_sequences:
                return
            if config.max_rows is not None and row + len(positions) > config.max_rows:
                return
            yield PlannedSequence(
                number=number,
                row=row,
                block=block,
                block_number=block_number,
                candidate=candidate,
                t=t,
                xt=xt,
                positions=positions,
            )
            number, row = number + 1, row + len(positions)


def read_blocks(
    config: CaptureConfig, tokenizer: Tokenizer, start: StreamPosition = START
) -> Iterator[TokenBlock]:
    """The blocks of text of a resolved config, from a place in it."""
    assert config.length is not None
    cut = document_blocks if config.pack == "documents" else token_blocks
    documents = read_documents(config.files, tokenizer)
    return cut(documents, tokenizer, config.length, wrap=config.wrap, start=start)


def time_of(config: CaptureConfig, block_number: int, which: int) -> float:
    """Diffusion time of a block, the `which`-th if it has several."""
    if config.times == "fixed":
        return config.time[which]
    if config.times == "unmasked":
        return 0.0
    if config.times == "uniform":
        return float((1 - MIN_TIME) * uniforms(config.seed, "t", block_number, 1)[0] + MIN_TIME)
    return float(sequence_times(config.seed, [block_number])[0])


def noised(
    ids: NDArray[np.int64], t: float, mask_id: int, *, seed: int, block_number: int
) -> NDArray[np.int64]:
    """A block at time t [pos]."""
    move_chance = SCHEDULE.move_chance(torch.tensor([t], dtype=torch.float64))
    x0 = torch.from_numpy(ids)[None]
    return corrupt(x0, move_chance, mask_id, seed=seed, indices=[block_number])[0].numpy()


def recorded_positions(
    config: CaptureConfig, is_masked: NDArray[np.bool_], block_number: int
) -> NDArray[np.int64]:
    """Positions of a sequence that become rows, ascending."""
    if config.positions == "masked":
        return np.flatnonzero(is_masked)
    if config.positions == "unmasked":
        return np.flatnonzero(~is_masked)
    everything = np.arange(len(is_masked))
    if config.positions == "every":
        return everything[:: config.every]
    if config.positions == "random":
        order = permutation(config.seed, "positions", block_number, len(is_masked))
        return np.sort(order[: config.per_sequence])
    return everything


def expected_share(config: CaptureConfig, length: int) -> float:
    """Rows for each token that the model reads, on average over sequences of that length."""
    if config.positions in ("masked", "unmasked"):
        # Times other than the fixed ones are uniform over (0, 1).
        times = torch.tensor(config.time if config.times == "fixed" else [0.5], dtype=torch.float64)
        masked = 0.0 if config.times == "unmasked" else float(SCHEDULE.move_chance(times).mean())
        return masked if config.positions == "masked" else 1 - masked
    if config.positions == "every":
        return -(-length // (config.every or 1)) / length
    if config.positions == "random":
        return min(config.per_sequence or 0, length) / length
    return 1.0
