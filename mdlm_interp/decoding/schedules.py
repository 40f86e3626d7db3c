"""The schedule: how many positions are filled in which step.

| schedule | fills |
|---|---|
| `Ancestral(steps)` | each masked position by itself, with the reverse process's probability (t - s) / t |
| `FirstHitting()` | one position at random a step, at the time when the reverse process would reach it |
| `Even(steps)` | the same number in each step, the first ones by the order |
| `Fixed(per_step)` | k positions a step, the first ones by the order |
| `Threshold(probability)` | every position that is sure enough, and at least one a step |

Times run from t = 1 (all masked) to 0. With the log-linear noise of MDLM a share (1 - eps) t is masked at t, with the
linear one a share t; eps cancels in (t - s) / t. Probabilities are exact fractions that random 64-bit words are
compared with, so rounding never decides what is filled.

Source:
    Sahoo et al. 2024, arXiv:2406.07524 (ancestral, analytic); Zheng et al. 2024, arXiv:2409.02908 (first hitting);
    Nie et al. 2025, arXiv:2502.09992 (even); Wu et al. 2025, arXiv:2505.22618 (threshold).
"""

# Axes: batch, pos, vocab

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.decoding.checks import check_choice, check_count
from mdlm_interp.decoding.draws import Measured, Words
from mdlm_interp.decoding.orders import highest
from mdlm_interp.errors import ConfigError
from mdlm_interp.shapes import Bool, Float64, Int64

LOG_LINEAR_EPS = Fraction(1, 1000)
WORD_BITS = 64

Number = Fraction | float
Noise = Literal["linear", "log_linear"]
Finish = Literal["draw", "argmax"]
Rounding = Literal["up", "down"]


@dataclass(frozen=True)
class Step:
    """What a schedule knows when it decides what to fill."""

    number: int
    """Of the step, over all blocks; with the sequence and the position the key of the draws."""
    in_block: int
    """Of the step within its block."""
    x: Int64[Tensor, "batch pos"]
    """Tokens at the start of the step."""
    is_open: Bool[Tensor, "batch pos"]
    """Positions that may be filled."""
    revocable: Bool[Tensor, "batch pos"]
    """Positions that an earlier step filled and this one may take back."""
    measured: Measured
    """What the model says of the open positions; undefined elsewhere."""
    score: Float64[Tensor, "batch pos"]
    """The order's; the highest comes first, -inf where not open."""
    committed: Float64[Tensor, "batch pos"]
    """Probability that a filled position's token had when it was drawn; NaN if it is masked or given."""
    words: Callable[[str], Words]
    """Random words [batch pos] of a stream, keyed by seed, step, sequence and position."""


def below(words: Words, chance: Number) -> Bool[Tensor, "..."]:
    """Whether each word, as a number in [0, 1), is below the chance: exact, by integers."""
    limit = math.ceil(Fraction(chance) * 2**WORD_BITS)
    if limit >= 2**WORD_BITS:
        return torch.ones(words.shape, dtype=torch.bool)
    return torch.from_numpy(words < np.uint64(max(limit, 0)))


def reveal_chance(alpha_t: Fraction, alpha_s: Fraction, sigma: Fraction = Fraction(0)) -> Fraction:
    """Probability that a position masked at t is filled by time s < t, remasking with probability sigma.

    Args:
        alpha_t, alpha_s: Share of unmasked tokens at both times.
    Source:
        Wang et al. 2025 (ReMDM), arXiv:2503.00307, equation 5; with sigma = 0 it is MDLM's.
    """
    if alpha_t == 1:
        return Fraction(1)
    return min(max((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t), Fraction(0)), Fraction(1))


@dataclass(frozen=True, kw_only=True)
class Ancestral:
    """The reverse process on a grid of equal steps in t. With `joint`, filling and token come of one word.

    The reference's own form is `Ancestral(noise="log_linear", end=1e-5, finish="argmax")`; its analytic sampler is
    `Ancestral(noise="log_linear", end=1e-5, joint=True)`, whose table equals the posterior under SUBS.
    """

    steps: int = 64
    """Steps of the grid; with more of them fewer tokens are drawn at once."""
    noise: Noise = "linear"
    """Share of masks: t, or (1 - 1/1000) t as in MDLM. It matters to remasking only."""
    end: float = 0.0
    """Time at which the grid ends; above 0 one more step fills what is left."""
    finish: Finish = "draw"
    """How that last step takes its tokens; MDLM's noise removal is argmax, which is not a draw."""
    joint: bool = False
    """Draw "stay masked" and the tokens as one categorical, as the analytic sampler does."""

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_choice("noise", self.noise, Noise)
        check_choice("finish", self.finish, Finish)
        if not 0.0 <= self.end < 1.0:
            raise ConfigError(f"end must be a time in [0, 1), got {self.end}")

    @property
    def n_steps(self) -> int:
        """Steps of a block, the last one included that fills what the grid leaves."""
        return self.steps + (self.end > 0)

    def times(self, in_block: int) -> tuple[Fraction, Fraction]:
        """Times t and s at which a step begins and ends."""
        if in_block == self.steps:
            return Fraction(self.end), Fraction(0)
        width = (1 - Fraction(self.end)) / self.steps
        return 1 - in_block * width, 1 - (in_block + 1) * width

    def alpha(self, t: Number) -> Fraction:
        """Share of tokens that are not masked at time t."""
        return 1 - (1 if self.noise == "linear" else 1 - LOG_LINEAR_EPS) * Fraction(t)

    def chance(self, t: Number, s: Number) -> Fraction:
        """Probability that a position masked at t is filled by s: (t - s) / t under either noise."""
        if s == 0:
            return Fraction(1)
        return reveal_chance(self.alpha(t), self.alpha(s))

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step fills."""
        stream = "token" if self.joint else "reveal"
        return at.is_open & below(at.words(stream), self.chance(*self.times(at.in_block)))

    def token_words(self, in_block: int, words: Words) -> Words:
        """The words that tokens are drawn with; given that one is below the chance, it is uniform below it."""
        chance = self.chance(*self.times(in_block))
        if not self.joint or chance in (0, 1):
            return words
        stretched = [min(int(int(word) / chance), 2**WORD_BITS - 1) for word in words.flat]
        return np.array(stretched, np.uint64).reshape(words.shape)


@dataclass(frozen=True, kw_only=True)
class Even:
    """The same number of positions in each step, chosen by the order; the last step fills what is left."""

    steps: int = 64
    """Steps of a block."""
    rounding: Rounding = "up"
    """Of m masks with n steps to go, ceil(m / n) as LLaDA (its first steps take one more), or floor as Dream."""

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_choice("rounding", self.rounding, Rounding)

    @property
    def n_steps(self) -> int:
        """Steps of a block."""
        return self.steps

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step fills."""
        masks, left = at.is_open.sum(1), self.steps - at.in_block
        return highest(at.score, -(-masks // left) if self.rounding == "up" else masks // left)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """k positions a step, chosen by the order, until none is masked."""

    per_step: int = 1
    """Positions filled in a step; 1 is greedy decoding, and the only number that is exact."""

    n_steps = None

    def __post_init__(self) -> None:
        check_count("per_step", self.per_step)

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step fills."""
        return highest(at.score, at.is_open.sum(1).clamp(max=min(self.per_step, at.is_open.shape[1])))


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Every position whose best token has at least this probability, and at least the order's first."""

    probability: float = 0.9
    """Confidence that is enough; of the drawn token if the order is by drawn_confidence."""
    of_drawn: bool = False
    """Compare the drawn token's probability, as published, instead of the best token's."""

    n_steps = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ConfigError(f"threshold must be a probability in [0, 1], got {self.probability}")

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step fills."""
        sure = at.measured.drawn if self.of_drawn else at.measured.confidence
        first = highest(at.score, torch.ones(at.is_open.shape[0], dtype=torch.int64))
        return first | (at.is_open & (sure >= self.probability))


@dataclass(frozen=True)
class FirstHitting:
    """One position a step, uniformly at random; t is the time at which the reverse process would fill it."""

    n_steps = None

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step fills: of each sequence the one with the highest word."""
        word = torch.from_numpy((at.words("reveal") >> np.uint64(1)).astype(np.int64))
        word = word.masked_fill(~at.is_open, -1)
        first = word == word.amax(1, keepdim=True)
        return at.is_open & first & (first.cumsum(1) == 1)

    def next_time(
        self, t: Float64[Tensor, " batch"], masks: Int64[Tensor, " batch"], uniform: NDArray[np.float64]
    ) -> Float64[Tensor, " batch"]:
        """Time of the next filling: t u^(1 / masks), the largest of `masks` uniforms below t."""
        return torch.where(masks > 0, t * torch.from_numpy(uniform) ** (1.0 / masks.clamp(min=1)), t)
