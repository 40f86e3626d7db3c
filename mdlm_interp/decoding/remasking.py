"""Remasking: filled positions become masks again, so that mistakes can be corrected.

ReMDM's reverse step from t to s, with alpha the share of unmasked tokens and sigma the chance of remasking:
- a filled position becomes a mask with probability sigma, else it keeps its token;
- a mask is filled with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
For sigma up to sigma_max = min(1, (1 - alpha_s) / alpha_t) the share of masks stays that of MDLM. Given tokens are
never touched.

Source:
    Wang et al. 2025, Remasking Discrete Diffusion Models with Inference-Time Scaling, arXiv:2503.00307, section 4.
"""

# Axes: batch, pos

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.decoding.checks import check_choice
from mdlm_interp.decoding.draws import DrawArithmetic, as_uniforms
from mdlm_interp.decoding.orders import highest
from mdlm_interp.decoding.schedules import Ancestral, Number, Step, below, reveal_chance
from mdlm_interp.errors import ConfigError
from mdlm_interp.shapes import Bool

Strategy = Literal["cap", "rescale", "conf", "loop"]
TakenBack = Literal["low_confidence", "random"]


@dataclass(frozen=True, kw_only=True)
class ReMDM:
    """A schedule that fills like `Ancestral` and takes back with probability sigma."""

    grid: Ancestral = field(default_factory=Ancestral)
    """Times, steps and noise."""
    strategy: Strategy = "rescale"
    """Sigma is min(eta, sigma_max); eta sigma_max; shared out by softmax(-confidence at commit); eta in a loop."""
    eta: float = 0.02
    """Strength; 0 is ancestral sampling, bit for bit. conf as published has 1."""
    t_on: float = 0.55
    """loop: begins when t has come down to this, with alpha_on unmasked."""
    t_off: float = 0.05
    """loop: ends when t has come down to this."""
    alpha_on: float = 0.9
    """loop: share of unmasked tokens throughout."""
    as_published: bool = False
    """loop: let the phase of t alone choose the noise of a step that leaves its phase, and do not cap sigma."""

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, Strategy)
        if not 0.0 <= self.eta <= 1.0:
            raise ConfigError(f"eta must be in [0, 1], got {self.eta}")
        if not 0.0 < self.t_off < self.t_on < 1.0:
            raise ConfigError(f"the loop needs 0 < t_off < t_on < 1, got {self.t_off} and {self.t_on}")
        if not 0.0 < self.alpha_on < 1.0:
            raise ConfigError(f"alpha_on must be in (0, 1), got {self.alpha_on}")
        if self.grid.joint:
            raise ConfigError("remasking needs fillings and tokens of their own words; leave joint off")

    @property
    def n_steps(self) -> int:
        """Steps of a block."""
        return self.grid.n_steps

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step fills."""
        t, s = self.grid.times(at.in_block)
        alpha_t, alpha_s = self.alphas(t, s)
        # As published, "conf" gives masks no sigma of their own: what is remasked comes on top.
        sigma = Fraction(0) if self.strategy == "conf" else self.sigma(t, s)
        chance = Fraction(1) if s == 0 else reveal_chance(alpha_t, alpha_s, sigma)
        return at.is_open & below(at.words("reveal"), chance)

    def take_back(self, at: Step, arithmetic: DrawArithmetic) -> Bool[Tensor, "batch pos"]:
        """Filled positions that become masks again."""
        t, s = self.grid.times(at.in_block)
        sigma, words = self.sigma(t, s), at.words("remask")
        if self.strategy != "conf":
            return at.revocable & below(words, sigma)
        shares = torch.zeros_like(at.committed)
        for row, mine in enumerate(at.revocable):
            if bool(mine.any()):
                weights = arithmetic.weights(-at.committed[row, mine].float()[None], 1.0)[0]
                shares[row, mine] = weights.double() / weights.sum().double()
        return at.revocable & (torch.from_numpy(as_uniforms(words)) < shares * float(sigma))

    def sigma(self, t: Number, s: Number) -> Fraction:
        """Chance of remasking in a step from t to s; for conf that of a position with all of the softmax."""
        if s == 0:
            return Fraction(0)
        alpha_t, alpha_s = self.alphas(t, s)
        eta = Fraction(self.eta)
        largest = min(Fraction(1), (1 - alpha_s) / alpha_t) if alpha_t > 0 else Fraction(1)
        if self.strategy == "cap":
            return min(eta, largest)
        if self.strategy == "loop":
            if self.phase(t) != "loop":
                return Fraction(0)
            return eta if self.as_published else min(eta, largest)
        return eta * largest

    def alphas(self, t: Number, s: Number) -> tuple[Fraction, Fraction]:
        """Share of unmasked tokens at both ends of a step."""
        if self.strategy != "loop":
            return self.grid.alpha(t), self.grid.alpha(s)
        late = self.phase(t) if self.as_published else self.phase(s)
        return self._loop_alpha(t, self.phase(t)), self._loop_alpha(s, late)

    def phase(self, t: Number) -> Literal["draft", "loop", "finish"]:
        """Which part of the loop strategy a time belongs to."""
        if t > Fraction(self.t_on):
            return "draft"
        return "loop" if t > Fraction(self.t_off) else "finish"

    def _loop_alpha(self, time: Number, phase: str) -> Fraction:
        t, t_on, t_off, alpha_on = (Fraction(value) for value in (time, self.t_on, self.t_off, self.alpha_on))
        if phase == "draft":
            return (1 - t) * alpha_on / (1 - t_on)
        return alpha_on if phase == "loop" else 1 - t * (1 - alpha_on) / t_off


@dataclass(frozen=True, kw_only=True)
class TakeBack:
    """Revision beside any schedule with a number of steps: some filled positions of each step but the last.

    (LLaDA's "low-confidence remasking" never takes back what it kept: it is `Even` in the order of confidence,
    and its random remasking `Even` in random order.)
    """

    by: TakenBack = "low_confidence"
    """Which: those whose tokens were least probable when drawn, or any."""
    per_step: int = 1
    """How many in a step."""

    def __post_init__(self) -> None:
        check_choice("by", self.by, TakenBack)
        if self.per_step < 1:
            raise ConfigError(f"per_step must be at least 1, got {self.per_step}; leave remasking off for 0")

    def take_back(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Filled positions that become masks again."""
        if self.by == "random":
            score = torch.from_numpy(as_uniforms(at.words("remask")).astype(np.float64))
        else:
            score = -at.committed
        score = score.masked_fill(~at.revocable, -torch.inf)
        return highest(score, at.revocable.sum(1).clamp(max=min(self.per_step, at.revocable.shape[1])))
