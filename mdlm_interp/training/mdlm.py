"""The recipe `mdlm`: a masked diffusion language model from scratch, as published.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 5; kuleshov-group/mdlm at commit c112c526.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.model import HookedMDLM
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.text import TextRecipe


class MDLMRecipe(TextRecipe):
    """Upstream's network, schedule and loss."""

    SCHEDULE: ClassVar[LogLinearSchedule] = LogLinearSchedule()

    config: TrainLMConfig

    def build(self) -> HookedMDLM:
        """Upstream's initial weights, each a function of (seed, its name)."""
        return HookedMDLM(self.config.model, NativeArithmetic(fused_attention=False), self.config.seed)

    def averaged(self, module: nn.Module) -> HookedMDLM:
        """The same weights with the fused attention kernel, which evaluation has no reason to avoid."""
        return HookedMDLM(self.config.model, seed=self.config.seed).eval().requires_grad_(False)
