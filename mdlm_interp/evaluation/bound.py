"""Perplexity of a masked diffusion model: its bound (the NELBO), estimated and with its error.

Estimator: each sequence is corrupted at `times_per_sequence` times that are stratified over [1e-3, 1], and
the mean over all positions of -log p(x_0 | x_t) / t is averaged over sequences. It is an upper bound in
expectation; the standard error is that of the mean over sequences.

With `n_steps` each time is first moved up to its point of a grid of that many steps: the bound of the model that
denoises in so many steps, which is higher. Figures of two estimators are not comparable, so each names its own.

With `given` positions, such as a prompt, the bound is that of the others' likelihood given these: they are never
noised and not scored.
"""

# Axes: batch, pos

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.diffusion import MIN_TIME, LogLinearSchedule, corrupt, nelbo_per_token, sequence_times
from mdlm_interp.errors import DataError
from mdlm_interp.evaluation.likelihood import ratio_error
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool, Float64, Int64

N_TIME_BINS = 10

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t, sigma) to raw logits."""


@dataclass(frozen=True)
class Nelbo:
    """An estimated bound on the negative log-likelihood."""

    nats_per_token: float
    standard_error: float
    """Of nats_per_token, over sequences; nan for one sequence, which has no spread."""
    n_sequences: int
    n_tokens: int
    """Scored tokens."""
    by_time: tuple[float, ...]
    """Mean cross-entropy in nats per masked token, in ten equal bins of t; nan where a bin is empty."""
    masked_by_time: tuple[int, ...] = ()
    """Masked tokens that each of those means is over."""
    n_steps: int | None = None
    """Steps of the discrete-time bound; none for the continuous-time one."""
    times_per_sequence: int = 1
    """Noise levels for each sequence."""
    n_given: int = 0
    """Tokens that were given: neither noised nor scored."""

    @property
    def estimator(self) -> str:
        """What the figure is, in words."""
        kind = (
            "continuous-time bound"
            if self.n_steps is None
            else f"discrete-time bound in {self.n_steps} steps"
        )
        named = f"{kind}, {self.times_per_sequence} stratified times a sequence, t in [{MIN_TIME:g}, 1]"
        return f"{named}, of the tokens that are not given" if self.n_given else named

    @property
    def perplexity(self) -> float:
        """exp of the bound per token; inf where that is beyond float64."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, n_bytes: int) -> float:
        """Bits per byte of text, for the bytes that the evaluated tokens stand for."""
        return self.nats_per_token * self.n_tokens / n_bytes / math.log(2)


def nelbo(
    model: HookedMDLM,
    x_0: Int64[Tensor, "batch pos"],
    *,
    seed: int = 0,
    first: int = 0,
    times_per_sequence: int = 4,
    n_steps: int | None = None,
    given: Bool[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
    predict: Predict | None = None,
    progress: bool = False,
) -> Nelbo:
    """Estimate the bound on token blocks.

    Args:
        x_0: Clean sequences; every position counts that is not given.
        seed: Key of times and masks: the same seed corrupts the same way for every model compared.
        first: Number of the first sequence, where these continue others: each number draws its own times and
            masks, so that the errors of estimates which are pooled are independent.
        n_steps: Steps of the discrete-time bound; the continuous-time one if none.
        given: Positions that are known at all times, such as a prompt, and not scored; none if none. The mean is then
            over all scored tokens, and its error that of a ratio, as sequences may have different numbers of them.
        predict: What gives the logits, if not the model itself: a replacement model, say.
        progress: Show a bar on a terminal.
    Raises:
        DataError: If x_0 is empty or has masks, there is no step, time or row in a batch, or given marks everything
            or is of another shape.
    """
    _check_numbers(times_per_sequence=times_per_sequence, batch_size=batch_size)
    _check_text(x_0, given, model.config.mask_id)
    predict = predict or model
    schedule, mask_id = LogLinearSchedule(), model.config.mask_id
    rows = [row for row in range(x_0.shape[0]) for _ in range(times_per_sequence)]
    draws = range(first * times_per_sequence, (first + x_0.shape[0]) * times_per_sequence)
    # Consecutive draws spread evenly over t, so a sequence's own times are stratified too.
    times = sequence_times(seed, draws)
    if n_steps is not None:
        times = moved_to_grid(times, n_steps)
    per_draw: list[Tensor] = []
    entropy_sum = torch.zeros(N_TIME_BINS)
    masked_count = torch.zeros(N_TIME_BINS, dtype=torch.int64)
    with (
        torch.inference_mode(),
        tqdm(total=len(draws), desc="bound", unit="seq", disable=None if progress else True) as bar,
    ):
        for start in range(0, len(draws), batch_size):
            chosen = draws[start : start + batch_size]
            t = times[start : start + batch_size]
            clean = x_0[rows[start : start + batch_size]]
            noised = corrupt(clean, schedule.move_chance(t), mask_id, seed=seed, indices=chosen)
            if given is not None:
                noised = torch.where(given[rows[start : start + batch_size]], clean, noised)
            logits = predict(noised.to(model.device), schedule.sigma(t).float().to(model.device)).cpu()
            losses = nelbo_per_token(logits.float(), clean, noised, t, mask_id).double()
            per_draw.append(losses.mean(1) if given is None else losses.sum(1))
            bins = (t * N_TIME_BINS).long().clamp(max=N_TIME_BINS - 1)
            entropy_sum.index_add_(0, bins, (losses.sum(1) * t).float())
            masked_count.index_add_(0, bins, (noised == mask_id).sum(1))
            bar.update(len(chosen))
    per_sequence = torch.cat(per_draw).reshape(x_0.shape[0], times_per_sequence).mean(1)
    if given is None:
        nats, counts = float(per_sequence.mean()), [x_0.shape[1]] * x_0.shape[0]
        spread = float(per_sequence.std()) / math.sqrt(len(counts)) if len(counts) > 1 else math.nan
    else:
        totals, counts = per_sequence.tolist(), (~given).sum(1).tolist()
        nats, spread = sum(totals) / sum(counts), ratio_error(totals, counts)
    return Nelbo(
        nats_per_token=nats,
        standard_error=spread,
        n_sequences=x_0.shape[0],
        n_tokens=sum(counts),
        by_time=tuple((entropy_sum / masked_count).tolist()),
        masked_by_time=tuple(masked_count.tolist()),
        n_steps=n_steps,
        times_per_sequence=times_per_sequence,
        n_given=0 if given is None else int(given.sum()),
    )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")


def _check_text(x_0: Tensor, given: Tensor | None, mask_id: int) -> None:
    if x_0.dim() != 2 or x_0.numel() == 0:
        raise DataError(
            f"x_0 must be [batch pos] and not empty, got {list(x_0.shape)}; add an axis for one text"
        )
    if bool((x_0 == mask_id).any()):
        raise DataError(
            f"x_0 must be clean text: token {mask_id} is the mask, which has no likelihood; score text "
            f"without masks"
        )
    if given is not None and (given.shape != x_0.shape or bool(given.all())):
        raise DataError(
            f"given must mark some positions of {list(x_0.shape)} and leave some to score, got {list(given.shape)}; "
            f"leave it out to score all"
        )


def moved_to_grid(t: Float64[Tensor, " draw"], n_steps: int) -> Float64[Tensor, " draw"]:
    """Times moved up to (floor(T t) + 1) / T, the grid of T steps, and at most to 1.

    Raises:
        DataError: If there is no step.
    Source:
        Sahoo et al. 2024, arXiv:2406.07524; see `diffusion.nelbo_per_token_discrete`.
    """
    if n_steps < 1:
        raise DataError(f"n_steps must be at least 1, or none for continuous time; got {n_steps}")
    return ((torch.floor(n_steps * t) + 1) / n_steps).clamp(max=1.0)


def pooled(bounds: Sequence[Nelbo]) -> Nelbo:
    """The bound over the sequences of several estimates together.

    The sequences all have the same length, and their own numbers (see `nelbo`'s `first`).

    Raises:
        DataError: If the estimates are of different estimators, or of sequences with given tokens.
    """
    if any(bound.n_given for bound in bounds):
        raise DataError(
            "estimates of sequences with given tokens cannot be pooled, as their numbers of scored tokens differ; "
            "give all sequences to one nelbo"
        )
    kinds = sorted({bound.estimator for bound in bounds})
    if len(kinds) > 1:
        raise DataError(
            f"estimates of one estimator can be pooled, got {' and '.join(kinds)}; estimate again"
        )
    count = sum(bound.n_sequences for bound in bounds)
    mean = sum(bound.n_sequences * bound.nats_per_token for bound in bounds) / count
    squares = 0.0  # of each sequence's distance from the mean of all
    for bound in bounds:
        n = bound.n_sequences
        squares += n * (bound.nats_per_token - mean) ** 2
        if n > 1:
            squares += n * (n - 1) * bound.standard_error**2
    masked = [sum(counts) for counts in zip(*(bound.masked_by_time for bound in bounds), strict=True)]
    by_time = [math.nan] * len(masked)
    for i, total in enumerate(masked):
        if total:
            shares = [(bound.masked_by_time[i] / total, bound.by_time[i]) for bound in bounds]
            by_time[i] = sum(share * value for share, value in shares if share)
    return Nelbo(
        nats_per_token=mean,
        standard_error=math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan,
        n_sequences=count,
        n_tokens=sum(bound.n_tokens for bound in bounds),
        by_time=tuple(by_time),
        masked_by_time=tuple(masked),
        n_steps=bounds[0].n_steps,
        times_per_sequence=bounds[0].times_per_sequence,
    )
