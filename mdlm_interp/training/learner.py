"""The recipe `learner`: the learner's network from scratch.

The published recipe draws t independently for each sequence and stops it at 0.001; here times are spread evenly
over the window by default, which has the same mean and less noise, and the published form is an option. A token
is masked with probability t, so the bound's weight is exactly 1 / t.

Source:
    scottstts/Learning-Diffusion-LM at commit 72a8358, train_model.ipynb.
"""

# Axes: batch, pos

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.diffusion import MIN_TIME, LogLinearSchedule
from mdlm_interp.learner import HookedLearner
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float
from mdlm_interp.training.config import TextConfig
from mdlm_interp.training.text import TextRecipe


@dataclass(frozen=True, kw_only=True)
class TrainLearnerConfig(TextConfig):
    """Train the learner's masked diffusion language model on text files."""

    recipe: Literal["learner"] = "learner"
    """The learner's network: RMSNorm, SwiGLU, FiLM by time, tied embeddings."""
    model: LearnerConfig
    """Shape of the network."""
    times: Literal["stratified", "independent"] = "stratified"
    """Times of a window: spread evenly over it, or drawn for each sequence by itself, as published."""


class LearnerRecipe(TextRecipe):
    """The learner's network under the bound with masking probability t."""

    SCHEDULE: ClassVar[LogLinearSchedule] = LogLinearSchedule(eps=0.0)

    config: TrainLearnerConfig

    def build(self) -> HookedLearner:
        """Initial weights by model.init_std, each a function of (seed, its name)."""
        return HookedLearner(self.config.model, NativeArithmetic(fused_attention=False), self.config.seed)

    def averaged(self, module: nn.Module) -> HookedLearner:
        """The same weights with the fused attention kernel, which evaluation has no reason to avoid."""
        return HookedLearner(self.config.model, seed=self.config.seed).eval().requires_grad_(False)

    def times(self, step: int, rows: int) -> Float[Tensor, " batch"]:
        """t of each sequence of a window."""
        if self.config.times == "stratified":
            return super().times(step, rows)
        return torch.from_numpy(uniforms(self.config.seed, "train:t", step, rows)).clamp(min=MIN_TIME)
