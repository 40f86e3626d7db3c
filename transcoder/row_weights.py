"""Weights of rows that know what the model's loss sees.

Under SUBS an unmasked position's prediction is its own token whatever the logits say, and the loss has no term
there. The last layer's MLP writes only to its own position's logits, so what it writes at unmasked positions moves
neither the loss nor a sampled text: weight 0. Earlier layers' outputs there matter through later attention.

The continuous-time bound weighs a sequence's terms by 1 / t. With `nelbo` so are all rows of a sequence, divided
by the mean of 1 / t over uniform t, which makes the average weight about 1.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 3.2.3 (SUBS) and equation 10.
"""

# Axes: layer, batch

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mdlm_interp.diffusion import MIN_TIME
from mdlm_interp.shapes import Bool, Float, Float64

MEAN_NELBO_WEIGHT = -math.log(MIN_TIME) / (1.0 - MIN_TIME)
"""Mean of 1 / t over t uniform in (MIN_TIME, 1)."""


def row_weights(
    kind: Literal["equal", "subs", "nelbo"],
    is_masked: Bool[Tensor, " batch"],
    t: Float64[Tensor, " batch"],
    n_layers: int,
) -> Float[Tensor, "layer batch"] | None:
    """The weight of each layer's rows; None for all equal."""
    if kind == "equal":
        return None
    weights = torch.ones(n_layers, len(is_masked), dtype=torch.float32, device=is_masked.device)
    weights[-1] = is_masked.float()
    if kind == "nelbo":
        # A clean sequence has no term; what is captured below MIN_TIME counts as at it.
        weights = weights * (1.0 / t.clamp(min=MIN_TIME) / MEAN_NELBO_WEIGHT).float()
    return weights
