"""From a sampler to numbered sequences: the states that the model read while it decoded.

1. Decodings are numbered from 0 and sampled `together` at a time, in whole groups: decoding 17 is the same however
   many are asked for, whatever the batches of the capture, and after any interruption. (In exact arithmetic it is so
   for any `together` and on any machine; of native arithmetic the last bits of the logits enter its draws.)
2. Of a decoding the states count up to its last step that wrote or took back a token. Companions in its group that
   take longer add none.
3. Each state of a recorded step is a sequence: x_t is what the model read, x_0 the text at the end. Which of its
   positions are rows is decided as for text.

The states are run through the model once more to be recorded: when the rows of a step are written it has to be known
which tokens will stand, and the activations of all steps would not fit in memory.
"""

# Axes: step, group (decodings sampled together), pos

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.config import CaptureConfig
from capture.manifest import ResumePoint
from capture.plan import Batch, PlannedSequence, recorded_positions
from mdlm_interp.decoding.draws import DrawArithmetic, Float64Draws
from mdlm_interp.decoding.sampler import sample, start_tokens
from mdlm_interp.decoding.trajectory import Seen, Trajectory
from mdlm_interp.documents import StreamPosition, TokenBlock
from mdlm_interp.errors import DataError
from mdlm_interp.filling import encode_prompt
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some decodings from their start to their end."""

    first: int
    """Number of the first decoding."""
    trajectory: Trajectory
    drawn: NDArray[np.int64]
    """Token drawn at each position in each step [step group pos], kept or not; -1 where none could be written."""
    sigma: NDArray[np.float64]
    """What a time-conditioned model was told [step group]."""


class Decodings:
    """The decodings of a resolved config.

    Args:
        model: What draws and is recorded, in the arithmetic that the config names.
    """

    def __init__(self, config: CaptureConfig, model: HookedMDLM, tokenizer: Tokenizer) -> None:
        assert config.sampler is not None
        assert config.length is not None
        self._config, self._source, self._model = config, config.sampler, model
        self._length = config.length
        self._mask_id = tokenizer.mask_id
        self._sampler = config.sampler.sampler()
        self._arithmetic = arithmetic_of(config, model)
        prompt: list[int] = []
        if self._source.prompt:
            prompt = encode_prompt(model, tokenizer, self._source.prompt)[0].tolist()
        self._start = start_tokens(model, self._length, prompt)
        if not bool((self._start == self._mask_id).any()):
            raise DataError(
                f"the prompt fills all {self._length} tokens and leaves nothing to decode; raise --length"
            )
        self._last: Group | None = None

    def batches(self, resume: ResumePoint | None = None) -> Iterator[Batch]:
        """The batches of the capture, from the one that begins at `resume`."""
        sequences = self.planned(resume or ResumePoint())
        while taken := list(islice(sequences, self._config.batch_size)):
            yield Batch(taken, self._length, self._config.seed)

    def planned(self, resume: ResumePoint) -> Iterator[PlannedSequence]:
        """The sequences from the one at `resume`, up to the budget."""
        config, number, row = self._config, resume.sequence, resume.row
        for decoding in range(resume.blocks, self._source.n):
            for step in self.steps_of(decoding):
                if decoding == resume.blocks and step < resume.candidate:
                    continue
                state = self.state(decoding, step)
                positions = recorded_positions(config, state.xt == self._mask_id, decoding)
                if not len(positions):
                    continue
                if number == config.max_sequences:
                    return
                if config.max_rows is not None and row + len(positions) > config.max_rows:
                    return
                yield PlannedSequence(
                    number=number,
                    row=row,
                    block=state.block,
                    block_number=decoding,
                    candidate=step,
                    t=state.t,
                    xt=state.xt,
                    positions=positions,
                    told=state.sigma,
                    sampled=state.columns,
                )
                number, row = number + 1, row + len(positions)

    def steps_of(self, decoding: int) -> range:
        """Recorded steps of a decoding."""
        group = self.group(decoding // self._source.together)
        return range(0, own_steps(group.trajectory, decoding - group.first), self._source.every_step)

    def state(self, decoding: int, step: int) -> State:
        """What the model read in one step of a decoding, and what came of it."""
        group = self.group(decoding // self._source.together)
        trajectory, which = group.trajectory, decoding - group.first
        length = self._length
        columns: dict[str, NDArray[Any]] = {
            "step": np.full(length, step),
            "t": np.full(length, float(trajectory.t[step, which])),
            "reveal_step": trajectory.revealed_at[which].numpy(),
            "token": group.drawn[step, which],
            "confidence": trajectory.confidence[step, which].numpy(),
        }
        block = TokenBlock(
            ids=trajectory.final[which].numpy(),
            documents=np.full(length, decoding),
            source=-1,
            offset=-1,
            start=StreamPosition(0, decoding),
        )
        return State(
            xt=trajectory.states[step, which].numpy(),
            t=float(trajectory.t[step, which]),
            sigma=float(group.sigma[step, which]),
            block=block,
            columns=columns,
        )

    def group(self, number: int) -> Group:
        """A group of decodings; the last one is kept."""
        first = number * self._source.together
        if self._last is None or self._last.first != first:
            self._last = None  # its memory, before that of the next
            self._last = self._sampled(first)
        return self._last

    def _sampled(self, first: int) -> Group:
        numbers = range(first, first + self._source.together)
        drawn: list[Tensor] = []
        sigma: list[Tensor] = []

        def see(seen: Seen) -> None:
            drawn.append(seen.measured.tokens)
            sigma.append(self._arithmetic.sigma((seen.before == self._mask_id).sum(1), self._length))

        trajectory = sample(
            self._model,
            self._start.expand(len(numbers), -1),
            self._sampler,
            seed=self._config.seed,
            indices=numbers,
            arithmetic=self._arithmetic,
            watch=see,
        )
        return Group(
            first=first,
            trajectory=trajectory,
            drawn=torch.stack(drawn).numpy(),
            sigma=torch.stack(sigma).double().numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """One step of one decoding."""

    xt: NDArray[np.int64]
    """Tokens that the model read [pos]."""
    t: float
    sigma: float
    block: TokenBlock
    """The text at the end; its document is the decoding."""
    columns: dict[str, NDArray[Any]]
    """`schema.SAMPLER_COLUMNS` [pos]."""


def own_steps(trajectory: Trajectory, which: int) -> int:
    """Steps of one sequence of a trajectory up to the last one that wrote or took back a token of its own."""
    changed = (trajectory.states[1:, which] != trajectory.states[:-1, which]).any(1).nonzero()
    last = max(int(changed[-1]) if len(changed) else -1, int(trajectory.revealed_at[which].max()))
    return last + 1


def arithmetic_of(config: CaptureConfig, model: HookedMDLM) -> DrawArithmetic:
    """What probabilities are: float64, or the oracle's counts."""
    assert config.sampler is not None
    if config.arithmetic == "native":
        return Float64Draws()
    from oracle.decoding import ExactDraws, check_exact

    check_exact(config.sampler.sampler(), time_conditioning=model.config.time_conditioning)
    return ExactDraws()


def expected_steps(config: CaptureConfig) -> int:
    """Recorded steps of a decoding at most: what the schedule says, or one for each token."""
    assert config.sampler is not None
    assert config.length is not None
    schedule = config.sampler.sampler().schedule
    steps = config.length
    if schedule.n_steps is not None:
        blocks = -(-config.length // (config.sampler.block_length or config.length))
        steps = schedule.n_steps * blocks
    elif config.sampler.per_step is not None:
        steps = -(-config.length // config.sampler.per_step)
    return -(-steps // config.sampler.every_step)
