"""FlowLM's corruption: one-hots mixed with Gaussian noise, sharpened by a softmax into soft tokens.

    w = a onehot + s noise,    soft token = softmax(w / temperature)

| mixing | a | s | published in |
|---|---|---|---|
| variance_preserving | 1 - t | sqrt(1 - a^2) | train_flowlm.py, t in [0.03, 0.15], temperature from 1e-3 to 0 |
| linear | 1 - t | t | the blog, t in [0.25, 0.5], temperature 1 |

A token is flipped when the largest entry of w is another one's. How often depends on a / s and violently on the
vocabulary's size V: t = 0.03 of the first mixing flips 59 % of the tokens at V = 50,000 and 0.7 % at V = 4. So the
flip probability is the parameter here, and t follows:

    P(keep) = integral of phi(z) Phi(a / s + z)^(V - 1) dz

Source:
    github.com/tom-pollak/dllm at 43ea9ff, train_flowlm.py and README.md.
"""

# Axes: row, pos, vocab

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.randomness import random_bits
from mdlm_interp.shapes import Float, Float32, Float64, Int64

Mixing = Literal["variance_preserving", "linear"]

TEMPERATURE_FLOOR = 1e-8
"""Published: what the falling temperature ends at, so that nothing is divided by zero."""

HALF_WIDTH = 9.0
NODES = 1201
"""The integral over z in [-9, 9] by the trapezoid rule, which converges faster than any power for such integrands."""

LARGEST_RATIO = 40.0
"""a / s at which no vocabulary of under 10^9 tokens flips one in 10^9."""

BISECTIONS = 48


def keep_probability(ratio: Float64[Tensor, " n"], vocab_size: int) -> Float64[Tensor, " n"]:
    """Probability that a token stays the largest entry of w.

    Args:
        ratio: a / s of the mixing, at least 0; at 0 every token is equally probable.
        vocab_size: Entries of w, at least 2.
    """
    z = torch.linspace(-HALF_WIDTH, HALF_WIDTH, NODES, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    others_below = torch.exp((vocab_size - 1) * torch.special.log_ndtr(ratio[:, None] + z))
    # Where it is 1 the sum's rounding may carry it above.
    return torch.trapezoid(density * others_below, z, dim=-1).clamp(max=1.0)


def ratio_for_flip(flip: Float64[Tensor, " n"], vocab_size: int) -> Float64[Tensor, " n"]:
    """The a / s at which a token is flipped with this probability, by bisection.

    Raises:
        DataError: If a probability is outside (0, 1 - 1 / vocab_size): even pure noise keeps one in vocab_size.
    """
    most = 1 - 1 / vocab_size
    if not bool(((flip > 0) & (flip < most)).all()):
        raise DataError(
            f"flip probabilities must be between 0 and 1 - 1/{vocab_size} = {most:.6g}, got {float(flip.min())} to "
            f"{float(flip.max())}; no noise keeps fewer tokens of {vocab_size} than chance"
        )
    low, high = torch.zeros_like(flip), torch.full_like(flip, LARGEST_RATIO)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        flips_more = 1 - keep_probability(middle, vocab_size) > flip
        low, high = torch.where(flips_more, middle, low), torch.where(flips_more, high, middle)
    return (low + high) / 2


def shares(t: Float64[Tensor, " n"], mixing: Mixing) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Shares a of the token and s of the noise at noise level t in [0, 1]."""
    a = 1 - t
    return a, t.clone() if mixing == "linear" else torch.sqrt(1 - a**2)


def flip_probability(t: Float64[Tensor, " n"], vocab_size: int, mixing: Mixing) -> Float64[Tensor, " n"]:
    """Probability that a token is flipped at noise level t in (0, 1]."""
    a, s = shares(t, mixing)
    return 1 - keep_probability(a / s, vocab_size)


def level_for_flip(flip: Float64[Tensor, " n"], vocab_size: int, mixing: Mixing) -> Float64[Tensor, " n"]:
    """The noise level t that flips tokens with this probability.

    Raises:
        DataError: As `ratio_for_flip`.
    """
    ratio = ratio_for_flip(flip, vocab_size)
    return 1 - ratio / torch.sqrt(1 + ratio**2) if mixing == "variance_preserving" else 1 / (1 + ratio)


def temperature_at(step: int, start: float, anneal_steps: int | None) -> float:
    """The softmax's temperature: falling linearly from `start` to the floor, or constant if anneal_steps is none."""
    if anneal_steps is None:
        return start
    return max(start * (1 - step / anneal_steps), 0.0) + TEMPERATURE_FLOOR


def gaussian_noise(seed: int, stream: str, index: int, *shape: int) -> Float32[Tensor, "..."]:
    """Standard normal noise, a pure function of (seed, stream, index) for one version of torch.

    Drawn by torch on the CPU, since a row of a long vocabulary has tens of millions of numbers.
    """
    generator = torch.Generator().manual_seed(int(random_bits(seed, stream, index, 1)[0] >> 1))
    return torch.randn(*shape, generator=generator)


def soft_tokens(
    ids: Int64[Tensor, "row pos"],
    noise: Float32[Tensor, "row pos vocab"],
    t: Float64[Tensor, " row"],
    mixing: Mixing,
    temperature: float,
) -> Float32[Tensor, "row pos vocab"]:
    """Probabilities of the tokens after the noise; at a low temperature all but one-hot again.

    Args:
        t: Noise level of each row.
        temperature: Above 0.
    """
    a, s = (share.float()[:, None, None] for share in shares(t, mixing))
    mixed = s * noise
    mixed = mixed.scatter_add(-1, ids[..., None], a.expand(*ids.shape, 1))
    return F.softmax(mixed / temperature, dim=-1)


def view_scale(t: Float[Tensor, " row"], vocab_size: int) -> Float[Tensor, " row"]:
    """The published weight of a row's loss: t / (V (1 - t) + t), which tends to 1 as the noise does, not before.

    It is about t / V unless t is within 1 / V of 1: 6e-7 at t = 0.03 and V = 50,368.
    """
    return t / (vocab_size * (1 - t) + t)
