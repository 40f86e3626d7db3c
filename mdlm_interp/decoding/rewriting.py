"""Starting from random tokens: every position that was not given may be written again and again.

Two published versions. "least_confident" (FlowLM) rewrites the positions whose best token is below a threshold, the
least confident first, and stops when none is left. "most_confident" (the dllm notebook) always writes the most
confident position. Published, the threshold is 0.5, and a position where the model is sure of another token than it
holds keeps what it holds; here it is 1 unless given. As published both may choose a position that holds its best token
already, and then nothing changes any more while others wait; so by default positions that hold what was drawn for them
are passed over.

A masked diffusion model is trained to predict at masks only; this is meant for models trained on random tokens.

Source:
    github.com/tom-pollak/FlowLM at 3168765, src/flowlm/inference.py; github.com/tom-pollak/dllm at 43ea9ff.
"""

# Axes: batch, pos

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.decoding.checks import check_choice, check_count
from mdlm_interp.decoding.draws import Words
from mdlm_interp.decoding.orders import highest
from mdlm_interp.decoding.schedules import WORD_BITS, Step
from mdlm_interp.errors import ConfigError
from mdlm_interp.shapes import Bool, Int64

Version = Literal["least_confident", "most_confident"]


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """A schedule without masks: which positions are written again in each step."""

    version: Version = "least_confident"
    """Which positions come first."""
    steps: int = 64
    """At most this many; it ends earlier when there is nothing to write."""
    per_step: int = 1
    """Positions written in a step."""
    threshold: float = 1.0
    """least_confident: positions whose best token is at least this probable stay as they are; published: 0.5."""
    as_published: bool = False
    """Also write positions that hold the drawn token already."""

    def __post_init__(self) -> None:
        check_choice("version", self.version, Version)
        for name in ("steps", "per_step"):
            check_count(name, getattr(self, name))
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold must be a probability in [0, 1], got {self.threshold}")
        if self.version == "most_confident" and self.threshold != 1.0:
            raise ConfigError(
                f"most_confident rewrites whatever the confidence, got the threshold {self.threshold}; leave it out, "
                f"or take least_confident"
            )

    @property
    def n_steps(self) -> int:
        """Steps at most."""
        return self.steps

    def choose(self, at: Step) -> Bool[Tensor, "batch pos"]:
        """Open positions that this step writes."""
        wanted = at.is_open if self.as_published else at.is_open & (at.measured.tokens != at.x)
        score = at.measured.confidence
        if self.version == "least_confident":
            wanted, score = wanted & (score < self.threshold), -score
        score = score.masked_fill(~wanted, -torch.inf)
        return highest(score, wanted.sum(1).clamp(max=min(self.per_step, wanted.shape[1])))


def random_tokens(words: Words, allowed: Int64[Tensor, " allowed"]) -> Int64[Tensor, "batch pos"]:
    """A uniformly random allowed token for each word: floor(word n / 2^64), to within 2^-64 of uniform."""
    n = len(allowed)
    column = np.array([int(word) * n >> WORD_BITS for word in words.flat], np.int64).reshape(words.shape)
    return allowed[torch.from_numpy(column)]
