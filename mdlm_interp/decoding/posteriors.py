"""The reverse process as tables: the probability of each token, and of staying masked, after one step.

The samplers never build these tables (they decide first whether to fill, then with what). They are here to be compared
with, and for what needs a whole distribution, such as the divergence between two samplers' steps.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, equation 7; analytic: Lou et al. 2024, arXiv:2310.16834, as used in
    kuleshov-group/mdlm, diffusion.py at c112c526.
"""

# Axes: batch, pos, vocab

from __future__ import annotations

import torch
from torch import Tensor

from mdlm_interp.decoding.schedules import Ancestral, Number
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.shapes import Float64, Int64


def ancestral_posterior(
    probabilities: Float64[Tensor, "batch pos vocab"],
    x_t: Int64[Tensor, "batch pos"],
    grid: Ancestral,
    t: Number,
    s: Number,
    mask_id: int,
) -> Float64[Tensor, "batch pos vocab"]:
    """q(x_s | x_t) of one step of a grid, given SUBS probabilities of the clean tokens."""
    chance = float(grid.chance(t, s))
    table = probabilities * chance
    table[..., mask_id] = 1.0 - chance
    return torch.where((x_t == mask_id)[..., None], table, probabilities)


def analytic_posterior(
    probabilities: Float64[Tensor, "batch pos vocab"],
    x_t: Int64[Tensor, "batch pos"],
    t: float,
    s: float,
    mask_id: int,
) -> Float64[Tensor, "batch pos vocab"]:
    """The same step by way of scores: the score at t, moved to s, times the transition back; log-linear noise.

    Under SUBS it equals `ancestral_posterior`. It is computed here as upstream does, from the definition.
    """
    noise = LogLinearSchedule()
    at, to = (noise.sigma(torch.tensor(time, dtype=torch.float64)) for time in (t, s))
    change = at - to
    is_masked = (x_t == mask_id)[..., None]
    ratio = torch.exp(-at) / -torch.expm1(-at)
    of_mask = probabilities * ratio
    of_mask[..., mask_id] = 1.0
    of_token = probabilities.clone()
    of_token[..., mask_id] = 1.0 / ratio
    score = torch.where(is_masked, of_mask, of_token)
    staggered = score * torch.exp(change)
    staggered[..., mask_id] += -torch.expm1(change) * score.sum(-1)
    back = torch.exp(-change) * torch.nn.functional.one_hot(x_t, probabilities.shape[-1]).double()
    back = back + torch.where(is_masked, -torch.expm1(-change), 0.0)
    return staggered * back
