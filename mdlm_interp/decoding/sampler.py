"""Sampling from a masked diffusion model: a schedule, an order and a draw.

    sampler = Sampler(schedule=Fixed(per_step=2), order="confidence", draw=Draw(temperature=0.7, top_p=0.9))
    trajectory = sample(model, start_tokens(model, length=64), sampler, seed=1)

In each step:
1. one forward pass on the tokens x gives, for every position that may be written, a token drawn from its
   probabilities, and how sure the model is;
2. the order gives each of them a score; the schedule says which are written;
3. with remasking, some of those written before become masks again, if this is not the last step.

Tokens that are not masks at the start are given: a prompt, or fixed points of an infilling, anywhere. All draws are
functions of (seed, step, sequence's number, position), so neither the batch nor a change elsewhere shifts any of them.
(Of the model's float32 logits that holds to the last bits; of the oracle's, altogether.)
"""

# Axes: batch, pos

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.decoding.denoiser import Passes, mask_id_of
from mdlm_interp.decoding.draws import (
    MEASURES,
    Draw,
    DrawArithmetic,
    Float64Draws,
    Measured,
    Words,
    as_uniforms,
    measure,
)
from mdlm_interp.decoding.interventions import Intervention
from mdlm_interp.decoding.orders import scores
from mdlm_interp.decoding.remasking import ReMDM
from mdlm_interp.decoding.rewriting import Rewrite, random_tokens
from mdlm_interp.decoding.schedules import Ancestral, FirstHitting, Step
from mdlm_interp.decoding.settings import Record, Sampler
from mdlm_interp.decoding.trajectory import Recorder, Seen, Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.randomness import random_bits
from mdlm_interp.shapes import Int64


def start_tokens(
    model: Any, length: int, prompt: Sequence[int] = (), *, n: int = 1, mask_id: int | None = None
) -> Int64[Tensor, "batch pos"]:
    """n sequences of masks that begin with a prompt; masks in the prompt are filled too.

    Raises:
        DataError: If the prompt does not fit.
    """
    if len(prompt) > length:
        raise DataError(f"the prompt has {len(prompt)} tokens, a sample {length}; raise length")
    start = torch.full((n, length), mask_id_of(model, mask_id))
    start[:, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
    return start


def sample(
    model: Any,
    start: Int64[Tensor, "batch pos"],
    sampler: Sampler | None = None,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    mask_id: int | None = None,
    arithmetic: DrawArithmetic | None = None,
    interventions: Sequence[Intervention] = (),
    record: Record | None = None,
    watch: Callable[[Seen], None] | None = None,
    progress: bool = False,
) -> Trajectory:
    """Fill the masks of `start` and return every state on the way; `.final` is the result.

    Args:
        model: A HookedMDLM, a transformers model with its `mask_id`, or any `(tokens, sigma) -> logits`.
        sampler: Ancestral sampling in 64 steps if none.
        indices: Number of each sequence, the key of its draws; by default its row.
        arithmetic: What probabilities are; float64 if none. Integer counts make a draw exact.
        watch: Called after each step with what happened in it, as a live view or a capture wants.
        progress: Show a bar where there is a terminal.
    Raises:
        DataError: If tokens, indices or seed are outside their range.
        HookError: If an intervention or a recorded hook matches nothing.
    """
    run = _Run(model, start, sampler or Sampler(), seed, indices, mask_id_of(model, mask_id), arithmetic)
    record = record or Record()
    passes = run.passes(model, interventions, record)
    recorder = Recorder(run.x, record.keep)
    for number in _shown(run.steps(), run.n_steps if progress else None, progress):
        seen = run.step(number, passes, record)
        recorder.add(seen)
        if watch is not None:
            watch(seen)
    return recorder.finish(
        seed=seed,
        indices=tuple(run.numbers),
        mask_id=run.mask_id,
        n_forwards=passes.n_forwards,
        sampler=run.sampler.to_mapping(),
    )


class _Run:
    """One batch on its way: the tokens, and what the steps need to know of those before."""

    def __init__(
        self,
        model: Any,
        start: Tensor,
        sampler: Sampler,
        seed: int,
        indices: Sequence[int] | None,
        mask_id: int,
        arithmetic: DrawArithmetic | None,
    ) -> None:
        if start.dim() != 2 or start.dtype != torch.int64 or start.numel() == 0:
            raise DataError(
                f"start must be int64 [batch pos] and not empty, "
                f"got {str(start.dtype).removeprefix('torch.')} {list(start.shape)}"
            )
        if not isinstance(seed, SupportsIndex):  # a fraction would be cut off, and give another seed's draws
            raise DataError(f"seed must be a whole number, got {seed!r}")
        self.sampler, self.seed, self.mask_id = sampler, seed, mask_id
        self.numbers = list(indices) if indices is not None else list(range(start.shape[0]))
        if len(self.numbers) != start.shape[0]:
            raise DataError(
                f"indices must number each of the {start.shape[0]} sequences, got {len(self.numbers)}; "
                f"none for 0, 1, ..."
            )
        for number in self.numbers:
            random_bits(seed, "range", number, 0)  # refuses a seed or number that is none
        self.arithmetic: DrawArithmetic = arithmetic if arithmetic is not None else Float64Draws()
        self.x = start.detach().cpu().clone()
        self.free = self.x == mask_id
        self.committed = torch.full(self.x.shape, torch.nan, dtype=torch.float64)
        self.time = torch.ones(self.x.shape[0], dtype=torch.float64)
        self.block, self.active = self._blocks(), torch.zeros(self.x.shape[0], dtype=torch.int64)
        self.settled = False
        self.rewriting = isinstance(sampler.schedule, Rewrite)
        config = getattr(model, "config", None)
        self.vocab_size: int | None = getattr(config, "vocab_size", None)
        if self.rewriting:
            if self.vocab_size is None:
                raise DataError(
                    "starting from random tokens needs a model that says its vocab_size in config"
                )
            words = self.words("start", 0)
            self.x = torch.where(self.free, random_tokens(words, self.allowed(self.vocab_size)), self.x)

    def passes(self, model: Any, interventions: Sequence[Intervention], record: Record) -> Passes:
        """The model's passes for this batch."""
        return Passes(
            model,
            ~self.free,
            mask_id=self.mask_id,
            arithmetic=self.arithmetic,
            guidance=self.sampler.guidance,
            cache=self.sampler.cache,
            interventions=interventions,
            record=record.hooks,
        )

    @property
    def n_steps(self) -> int | None:
        """Steps of the whole run at most, where that is known beforehand."""
        per_block = self.sampler.schedule.n_steps
        if per_block is not None:
            return per_block * (int(self.block.max()) + 1)
        return int(self.free.sum(1).max())

    def steps(self) -> Iterator[int]:
        """Step numbers until nothing is left to write."""
        number = 0
        per_block = self.sampler.schedule.n_steps
        while not self.settled:
            masked = self.free & (self.x == self.mask_id)
            starts = per_block is None or number % per_block == 0
            if not self.rewriting and starts:
                if not bool(masked.any()):
                    return
                # Of each sequence the first block that has a mask; of a finished one the last of all.
                last = self.block.amax(1, keepdim=True)
                self.active = torch.where(masked, self.block, last + 1).amin(1)
            elif not self.rewriting and not self.sampler.revises and not bool(masked.any()):
                return
            if self.rewriting and number == per_block:
                return
            yield number
            number += 1

    def step(self, number: int, passes: Passes, record: Record) -> Seen:
        """One forward pass, the draws, and the tokens that they leave."""
        schedule, sampler = self.sampler.schedule, self.sampler
        in_block = number % schedule.n_steps if schedule.n_steps is not None else 0
        masked = self.free & (self.x == self.mask_id)
        here = self.block == self.active[:, None]
        is_open = self.free if self.rewriting else masked & here
        self._set_time(number, in_block, is_open)
        told = self.time if sampler.sigma == "time" else None
        logits, kept = passes.logits(self.x, number, told, record.wants(number))
        words = self.words("token", number)
        if isinstance(schedule, Ancestral):
            words = schedule.token_words(in_block, words)
        rows = logits[is_open.to(logits.device)]
        measured = self._measure(rows, is_open, words, in_block)
        top_tokens, top_probabilities = self._alternatives(rows, is_open, record.alternatives)
        order = "confidence" if sampler.order is None else sampler.order
        chance = torch.zeros_like(measured.drawn)
        if order == "random":
            chance = torch.from_numpy(as_uniforms(self.words("order", number)))
        at = Step(
            number=number,
            in_block=in_block,
            x=self.x,
            is_open=is_open,
            revocable=self.free & ~masked & here,
            measured=measured,
            score=scores(order, measured, is_open, chance),
            committed=self.committed,
            words=lambda stream: self.words(stream, number),
        )
        chosen = schedule.choose(at)
        # Without a number of steps only this ends the run.
        assert schedule.n_steps is not None or bool(chosen.any()), f"{schedule} filled nothing"
        taken = self._taken_back(at)
        self.settled = self.rewriting and not bool(chosen.any())
        before = self.x
        self.x = torch.where(chosen, measured.tokens, self.x).masked_fill(taken, self.mask_id)
        self.committed = torch.where(chosen, measured.drawn, self.committed).masked_fill(taken, torch.nan)
        return Seen(
            number=number,
            n_steps=self.n_steps,
            t=self.time.clone(),
            before=before,
            after=self.x,
            is_open=is_open,
            written=chosen,
            taken_back=taken,
            measured=measured,
            top_tokens=top_tokens,
            top_probabilities=top_probabilities,
            activations=kept,
        )

    def words(self, stream: str, number: int) -> Words:
        """Random words [batch pos] of a stream in one step."""
        length = self.x.shape[1]
        return np.stack([random_bits(self.seed, f"{stream}:{number}", n, length) for n in self.numbers])

    def allowed(self, vocab_size: int) -> Tensor:
        """Ids that may be drawn."""
        may = torch.ones(vocab_size, dtype=torch.bool)
        unwanted = [self.mask_id, *self.sampler.draw.suppress]
        if max(unwanted) >= vocab_size:
            raise DataError(
                f"mask and suppressed tokens must be in [0, {vocab_size}), got {max(unwanted)}; "
                f"are they another tokenizer's?"
            )
        may[unwanted] = False
        if not bool(may.any()):
            raise DataError("every token is suppressed; leave at least one to draw")
        return may.nonzero()[:, 0]

    def _measure(self, rows: Tensor, is_open: Tensor, words: Words, in_block: int) -> Measured:
        """What the logits of the open positions say, put where they are; NaN and -1 elsewhere."""
        allowed = self.allowed(rows.shape[-1]).to(rows.device)
        draw = self.sampler.draw
        grid = (
            self.sampler.schedule.grid if isinstance(self.sampler.schedule, ReMDM) else self.sampler.schedule
        )
        if isinstance(grid, Ancestral) and grid.finish == "argmax" and in_block == grid.steps:
            draw = Draw(temperature=0.0, suppress=draw.suppress)
        found = measure(rows, words[is_open.numpy()], draw, self.arithmetic, allowed)
        if not bool(found.confidence.isfinite().all()):
            raise DataError(
                "the model's logits give no probabilities (NaN, +infinity, or -infinity for every token that may be "
                "drawn); check the weights, the hooks and the suppressed tokens"
            )
        spread = {}
        for name in MEASURES:
            values = getattr(found, name).cpu()
            empty = -1 if name == "tokens" else torch.nan
            spread[name] = torch.full(is_open.shape, empty, dtype=values.dtype).masked_scatter(
                is_open, values
            )
        return Measured(**spread)

    def _alternatives(self, rows: Tensor, is_open: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """The most probable tokens of the open positions and their probabilities; -1 and NaN elsewhere."""
        allowed = self.allowed(rows.shape[-1]).to(rows.device)
        count = min(wanted, len(allowed))
        tokens = torch.full((*is_open.shape, count), -1)
        chances = torch.full((*is_open.shape, count), torch.nan, dtype=torch.float64)
        if count:
            top = rows[:, allowed].double().softmax(-1).topk(count, -1)
            tokens[is_open], chances[is_open] = allowed[top.indices].cpu(), top.values.cpu()
        return tokens, chances

    def _taken_back(self, at: Step) -> Tensor:
        """Positions that become masks again; none in a block's last step."""
        taken = torch.zeros_like(at.is_open)
        schedule, take_back = self.sampler.schedule, self.sampler.take_back
        if schedule.n_steps is None or at.in_block == schedule.n_steps - 1:
            return taken
        if isinstance(schedule, ReMDM):
            taken = taken | schedule.take_back(at, self.arithmetic)
        if take_back is not None:
            taken = taken | take_back.take_back(at)
        return taken

    def _set_time(self, number: int, in_block: int, is_open: Tensor) -> None:
        """The schedule's time at the start of the step; where it has none, the share of masks."""
        schedule = self.sampler.schedule
        grid = schedule.grid if isinstance(schedule, ReMDM) else schedule
        if isinstance(grid, Ancestral):
            self.time = torch.full_like(self.time, float(grid.times(in_block)[0]))
        elif isinstance(schedule, FirstHitting):
            first = as_uniforms(self.words("time", number))[:, 0]
            self.time = schedule.next_time(self.time, is_open.sum(1), first)
        else:
            self.time = (self.x == self.mask_id).double().mean(1)

    def _blocks(self) -> Tensor:
        """Number of each position's block; one block if they are not asked for."""
        length = self.sampler.block_length
        if length is None:
            return torch.zeros_like(self.x)
        first = self.free.int().argmax(1, keepdim=True)
        return ((torch.arange(self.x.shape[1]) - first) // length).clamp(min=0)


def _shown(steps: Iterator[int], total: int | None, progress: bool) -> Iterator[int]:
    """The steps, with a progress bar if one is wanted; the library for it is loaded only then."""
    if not progress:
        yield from steps
        return
    from tqdm import tqdm

    yield from tqdm(steps, total=total, desc="denoise", unit="step", disable=None)
