"""What readers and writers of all formats hand over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mdlm_interp.shapes import Float32
from transcoder.interchange.form import Form, single


@dataclass(frozen=True)
class About:
    """What is written beside the weights."""

    model_name: str
    """What the other tool calls the model."""
    place: Path
    """Where the files will be when they are complete."""


@dataclass(frozen=True)
class Hooks:
    """Hook points that the user names, in place of those in the files."""

    input: str | None = None
    output: str | None = None

    def over(self, form: Form) -> Form:
        """A form with these hook points where they are given."""
        config = replace(
            form.config,
            input_hook=self.input or form.config.input_hook,
            output_hook=self.output or form.config.output_hook,
        )
        return Form(config, form.weights)


@dataclass(frozen=True)
class Reading:
    """A transcoder from other files."""

    form: Form
    notes: list[str] = field(default_factory=list)
    """What to know about it, one sentence each."""


def strict_thresholds(form: Form) -> Float32[Tensor, "layer feature"] | None:
    """Thresholds for readers that test h > theta, so that in float32 the same values pass."""
    if form.weights.threshold is None:
        return None
    rounded = single(form.weights.threshold, "threshold")
    if form.config.ste == "crosslayer-coding":  # which tests h >= theta
        rounded = torch.nextafter(rounded, torch.tensor(-torch.inf)).clamp(min=0.0)
    return rounded
