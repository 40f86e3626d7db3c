"""Masked diffusion: noise schedule, corruption, the SUBS parameterisation and the training bound.

Time t runs from 0 (clean) to 1 (all masked). Each token independently becomes the mask with probability
1 - exp(-sigma(t)). With the log-linear schedule the continuous-time bound weighs the cross-entropy of
each masked position by exactly 1 / t.

Source:
    Sahoo et al. 2024, arXiv:2406.07524; kuleshov-group/mdlm, diffusion.py and noise_schedule.py at c112c526.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Bool, Float, Float64, Int64

MIN_TIME = 1e-3
"""Smallest t that is sampled in training and evaluation; the bound leaves out [0, MIN_TIME]."""


@dataclass(frozen=True)
class LogLinearSchedule:
    """sigma(t) = -log(1 - (1 - eps) t), so that the share of masked tokens is (1 - eps) t."""

    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise; what a time-conditioned model takes as `timesteps`."""
        return -torch.log1p(-(1 - self.eps) * t)

    def dsigma(self, t: Tensor) -> Tensor:
        """Rate of the total noise."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def move_chance(self, t: Tensor) -> Tensor:
        """Probability that a token is masked at time t."""
        return (1 - self.eps) * t

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still unmasked at time t."""
        return 1 - (1 - self.eps) * t

    def loss_weight(self, t: Tensor) -> Tensor:
        """dsigma / expm1(sigma), which is 1 / t for any eps."""
        return 1 / t


def stratified_times(u: Float[Tensor, " n"], min_time: float = MIN_TIME) -> Float[Tensor, " n"]:
    """Low-discrepancy times for one batch: sample i falls in the i-th of n equal parts.

    Args:
        u: One uniform in [0, 1) a sample (not one shared offset).
    """
    n = u.shape[0]
    return (1 - min_time) * ((u / n + torch.arange(n, dtype=u.dtype, device=u.device) / n) % 1) + min_time


def sequence_times(
    seed: int, indices: Sequence[int], *, stream: str = "t", min_time: float = MIN_TIME
) -> Float64[Tensor, " batch"]:
    """Times in [min_time, 1] for numbered sequences, evenly spread over any run of consecutive indices.

    A shifted golden-ratio sequence: a pure function of (seed, index), and of lower discrepancy than
    independent draws whatever the batch size.
    """
    start = int(uniforms(seed, stream, 0, 1)[0] * 2**53)
    # 2**64 / golden ratio; integer arithmetic keeps large indices exact.
    step = 0x9E3779B97F4A7C15
    fractions = [((start << 11) + step * (int(index) + 1)) % 2**64 / 2**64 for index in indices]
    return (1 - min_time) * torch.tensor(fractions, dtype=torch.float64) + min_time


def corrupt(
    x_0: Int64[Tensor, "batch pos"],
    move_chance: Float[Tensor, " batch"],
    mask_id: int,
    *,
    seed: int,
    indices: Sequence[int],
    stream: str = "mask",
) -> Int64[Tensor, "batch pos"]:
    """Mask each token with its sequence's probability; a pure function of (seed, index of the sequence).

    Args:
        move_chance: `LogLinearSchedule.move_chance(t)` of each sequence.
        indices: The number of each sequence in its data; equal numbers draw equal masks in any batch.
    """
    if len(indices) != x_0.shape[0]:
        raise DataError(
            f"corrupt needs one index a sequence: got {len(indices)} for a batch of {x_0.shape[0]}"
        )
    draws = np.stack([uniforms(seed, stream, int(index), x_0.shape[1]) for index in indices])
    moved = torch.from_numpy(draws).to(x_0.device) < move_chance.to(x_0.device, torch.float64)[:, None]
    return torch.where(moved, mask_id, x_0)


def subs_log_probs(
    logits: Float[Tensor, "batch pos vocab"], x_t: Int64[Tensor, "batch pos"], mask_id: int
) -> Float[Tensor, "batch pos vocab"]:
    """Log-probability of the clean token at each position, in nats; impossible tokens are -inf.

    A masked position never predicts the mask; an unmasked one keeps its token with probability 1.
    Upstream writes -1e6 for impossible, in place on the logits; here the logits are not modified.
    """
    is_masked = (x_t == mask_id)[..., None]
    index = torch.arange(logits.shape[-1], device=logits.device)
    log_probs = logits.masked_fill(index == mask_id, -torch.inf).log_softmax(-1)
    kept = torch.zeros_like(log_probs).masked_fill(index != x_t[..., None], -torch.inf)
    return torch.where(is_masked, log_probs, kept)


def nelbo_per_token(
    logits: Float[Tensor, "batch pos vocab"],
    x_0: Int64[Tensor, "batch pos"],
    x_t: Int64[Tensor, "batch pos"],
    t: Float[Tensor, " batch"],
    mask_id: int,
) -> Float[Tensor, "batch pos"]:
    """Continuous-time bound at each position, in nats: -log p(x_0 | x_t) / t, zero where unmasked.

    The mean over all positions (not only masked ones) estimates the bound on the negative log-likelihood
    per token; its exponential is the perplexity that the paper reports.
    """
    is_masked = x_t == mask_id
    return masked_cross_entropy(logits, x_0, is_masked, mask_id) * (is_masked / t[:, None])


def nelbo_per_token_discrete(
    logits: Float[Tensor, "batch pos vocab"],
    x_0: Int64[Tensor, "batch pos"],
    x_t: Int64[Tensor, "batch pos"],
    t: Float[Tensor, " batch"],
    mask_id: int,
    n_steps: int,
) -> Float[Tensor, "batch pos"]:
    """The n_steps-step form: t is first moved up to its grid point (floor(T t) + 1) / T."""
    grid = (torch.floor(n_steps * t) + 1) / n_steps
    return nelbo_per_token(logits, x_0, x_t, grid, mask_id)


def masked_cross_entropy(
    logits: Float[Tensor, "batch pos vocab"],
    x_0: Int64[Tensor, "batch pos"],
    is_masked: Bool[Tensor, "batch pos"],
    mask_id: int,
) -> Float[Tensor, "batch pos"]:
    """-log p(x_0 | x_t) in nats at masked positions under SUBS, and 0 elsewhere."""
    chosen = logits[is_masked]
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen = chosen.float()
    losses = chosen.new_zeros(is_masked.shape)
    index = torch.arange(logits.shape[-1], device=logits.device)
    log_probs = chosen.masked_fill(index == mask_id, -torch.inf).log_softmax(-1)
    losses[is_masked] = -log_probs.gather(-1, x_0[is_masked][:, None])[:, 0]
    return losses
