"""Exact likelihood under a deterministic order: the chain rule along the way in which a sampler would reveal a text.

A sampler whose next position is a function of what is revealed already (left to right, given positions, the most
confident one) defines a proper distribution over texts:

1. start with masks, and let the order name the next position, as it does while sampling;
2. add log p(true token there | revealed tokens), reveal the true token, and go on.

The sum is the log-probability with which `Fixed(per_step)` in that order, at temperature 1, writes this text: no
bound, and no noise but that of the model's arithmetic. With several tokens a step their probabilities are multiplied,
as that sampler draws them. The order "random" is a function of (seed, step, number of the sequence); its likelihood
is that of the drawn order. "drawn_confidence" looks at the tokens that are drawn, so no such sum exists for it.

The noise matters to orders by what the model says: before anything is revealed all positions are equally sure (an
MDLM has relative positions only), so the last bits of float32 say which comes first, and they differ between batches.
In exact arithmetic (the oracle's model and draws) the order is a function of the state, and the probabilities of all
texts add up to one.

Source:
    DUEL, arXiv:2603.01367 (likelihood of deterministic-order samplers).
"""

# Axes: batch, pos, vocab

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.decoding.checks import check_choice
from mdlm_interp.decoding.denoiser import as_denoiser, mask_id_of
from mdlm_interp.decoding.draws import (
    MEASURES,
    Draw,
    DrawArithmetic,
    Float64Draws,
    Measured,
    as_uniforms,
    measure,
)
from mdlm_interp.decoding.orders import Order, OrderName, highest, scores
from mdlm_interp.errors import DataError
from mdlm_interp.randomness import random_bits
from mdlm_interp.shapes import Bool, Float64, Int64


@dataclass(frozen=True, kw_only=True)
class OrderLikelihood:
    """Log-likelihood of texts under one order."""

    nats_per_token: float
    """Negative log-likelihood of all texts, by their scored tokens."""
    standard_error: float
    """Of nats_per_token over sequences; nan for one sequence."""
    per_sequence: tuple[float, ...]
    """Negative log-likelihood of each text, in nats."""
    n_sequences: int
    n_tokens: int
    """Scored tokens."""
    order: Order
    per_step: int
    seed: int

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; inf where that is beyond float64."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def estimator(self) -> str:
        """What the figure is, in words."""
        named = f"by {self.order}" if isinstance(self.order, str) else "in the given order"
        return f"exact likelihood {named}, {self.per_step} token{'s' * (self.per_step > 1)} a step"


def order_likelihood(
    model: Any,
    x_0: Int64[Tensor, "batch pos"],
    order: Order = "left_to_right",
    *,
    per_step: int = 1,
    given: Bool[Tensor, "batch pos"] | None = None,
    seed: int = 0,
    first: int = 0,
    mask_id: int | None = None,
    arithmetic: DrawArithmetic | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> OrderLikelihood:
    """Likelihood of clean sequences under the sampler `Fixed(per_step)` in this order.

    Args:
        model: A HookedMDLM, a transformers model, or any `(tokens, sigma) -> logits`.
        given: Positions that are known from the start, such as a prompt, and not scored; none if none.
        seed: Key of the random order.
        first: Number of the first sequence, in the random order.
        mask_id: The mask's id, if the model does not say it.
        arithmetic: What probabilities are; float64 if none. With the oracle's counts a token that its sampler never
            draws makes the likelihood infinite.
        progress: Show a bar on a terminal.
    Raises:
        ConfigError: If there is no such order.
        DataError: If the order depends on what is drawn, leaves out a position, or an argument is out of range.
    """
    if order == "drawn_confidence":
        raise DataError(
            "order 'drawn_confidence' looks at the tokens that are drawn, so a text has no chain of conditional "
            "probabilities under it; take 'confidence'"
        )
    if isinstance(order, str):
        check_choice("order", order, OrderName)
    if per_step < 1 or batch_size < 1:
        raise DataError(f"per_step and batch_size must be at least 1, got {per_step} and {batch_size}")
    mask = mask_id_of(model, mask_id)
    if x_0.numel() == 0 or bool((x_0 == mask).any()):
        raise DataError(
            f"x_0 must be clean text and not empty: token {mask} is the mask; score text without masks"
        )
    known = torch.zeros_like(x_0, dtype=torch.bool) if given is None else given
    if known.shape != x_0.shape or bool(known.all()):
        raise DataError(
            f"given must mark some positions of {list(x_0.shape)} and leave some to score, got {list(known.shape)}"
        )
    totals: list[float] = []
    chunks = range(0, x_0.shape[0], batch_size)
    for start in tqdm(chunks, desc="likelihood", unit="batch", disable=None if progress else True):
        rows = slice(start, start + batch_size)
        numbers = range(first + start, first + min(start + batch_size, x_0.shape[0]))
        way = _Way(model, order, per_step, seed, mask, arithmetic or Float64Draws())
        totals += way.nats(x_0[rows], known[rows], numbers).tolist()
    scored = (~known).sum(1).tolist()
    mean = sum(totals) / sum(scored)
    return OrderLikelihood(
        nats_per_token=mean,
        standard_error=ratio_error(totals, scored),
        per_sequence=tuple(totals),
        n_sequences=len(totals),
        n_tokens=sum(scored),
        order=order,
        per_step=per_step,
        seed=seed,
    )


def ratio_error(totals: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of sum(totals) / sum(counts) over sequences, by the linearised ratio; nan for one."""
    n = len(totals)
    if n < 2:
        return math.nan
    mean = sum(totals) / sum(counts)
    squares = sum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(counts)


@dataclass(frozen=True)
class _Way:
    """How texts are revealed."""

    model: Any
    order: Order
    per_step: int
    seed: int
    mask_id: int
    arithmetic: DrawArithmetic

    @torch.no_grad()
    def nats(self, x_0: Tensor, known: Tensor, numbers: Sequence[int]) -> Float64[Tensor, " batch"]:
        """Negative log-likelihood of each sequence."""
        denoiser, device = as_denoiser(self.model), torch.device(getattr(self.model, "device", "cpu"))
        clean = x_0.cpu()
        x = torch.where(known.cpu(), clean, self.mask_id)
        total = torch.zeros(len(clean), dtype=torch.float64)
        for step in range(-(-clean.shape[1] // self.per_step)):
            is_open = x == self.mask_id
            if not bool(is_open.any()):
                break
            sigma = self.arithmetic.sigma(is_open.sum(1), x.shape[1])
            logits = denoiser(x.to(device), sigma.to(device))
            rows = logits[is_open.to(logits.device)]
            chosen = self._chosen(rows, is_open, step, numbers)
            of_truth = torch.zeros(x.shape, dtype=torch.float64)
            of_truth[is_open] = self._log_probs(rows, clean[is_open].to(rows.device)).cpu()
            # Not a product with `chosen`: an impossible token elsewhere would give 0 * -inf.
            total -= of_truth.masked_fill(~chosen, 0.0).sum(1)
            x = torch.where(chosen, clean, x)
        return total

    def _chosen(self, rows: Tensor, is_open: Tensor, step: int, numbers: Sequence[int]) -> Tensor:
        """Positions [batch pos] that this step reveals, as `Fixed` has it."""
        chance = torch.zeros(is_open.shape, dtype=torch.float64)
        if self.order == "random":
            words = [random_bits(self.seed, f"order:{step}", number, is_open.shape[1]) for number in numbers]
            chance = torch.from_numpy(as_uniforms(np.stack(words)))
        # No token is drawn, so the words do not matter.
        nothing = np.zeros(len(rows), np.uint64)
        found = measure(rows, nothing, Draw(temperature=0.0), self.arithmetic, self._allowed(rows))
        spread = {}
        for name in MEASURES:
            values = getattr(found, name).cpu()
            empty = -1 if name == "tokens" else torch.nan
            filled = torch.full(is_open.shape, empty, dtype=values.dtype)
            spread[name] = filled.masked_scatter(is_open, values)
        score = scores(self.order, Measured(**spread), is_open, chance)
        return highest(score, is_open.sum(1).clamp(max=self.per_step))

    def _log_probs(self, rows: Tensor, tokens: Tensor) -> Float64[Tensor, " row"]:
        """Log-probability of one token in each row, the mask left out."""
        allowed = self._allowed(rows)
        column = torch.searchsorted(allowed, tokens)[:, None]
        logits = rows[:, allowed]
        if isinstance(self.arithmetic, Float64Draws):
            return logits.double().log_softmax(-1).gather(-1, column)[:, 0]
        weights = self.arithmetic.weights(logits, 1.0)
        return (weights.gather(-1, column)[:, 0].double() / weights.sum(-1).double()).log()

    def _allowed(self, rows: Tensor) -> Tensor:
        ids = torch.arange(rows.shape[-1], device=rows.device)
        return ids[ids != self.mask_id]
