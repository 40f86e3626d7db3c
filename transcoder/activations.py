"""Sparse activation functions of a transcoder's features, and what stands for the gradient at their jumps.

ReLU, TopK and BatchTopK have the gradient of what they keep. JumpReLU, a(h) = h where h > theta and 0 elsewhere, is
flat in theta but for a jump of height theta; three pseudo-gradients with a rectangular window of width eps, of
w = 1 where |h - theta| < eps / 2 and 0 elsewhere:

    ste                 active where   da/dh                     da/dtheta
    gdm                 h > theta      1[h > theta]              -theta / eps * w
    anthropic           h > theta      1[h > theta] + theta / eps * w   -theta / eps * w
    crosslayer-coding   h >= theta     1[h >= theta]             -h / eps * w

The parameter is log theta, so its gradient has one more factor theta. The term that anthropic adds lets the loss
move pre-activations across the threshold too: "gradients flow through the estimator to all parameters".

Source:
    Gao et al. 2024, arXiv:2406.04093, section 2.3 (TopK; there, too, a kept value passes a ReLU).
    Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK).
    Rajamanoharan et al. 2024, arXiv:2407.14435, equations 11 and 12 (gdm).
    Anthropic, Circuits Updates January 2025, dictionary learning optimization techniques (anthropic).
    curt-tigges/crosslayer-coding, July 2025 (crosslayer-coding).
"""

# Axes: layer, batch, feature; rows are any leading axes

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.shapes import Bool, Float
from transcoder.config import Ste


def topk_mask(pre_acts: Float[Tensor, "*rows feature"], k: int) -> Bool[Tensor, "*rows feature"]:
    """Which features are among the k largest of their row: exactly k; ties go to the lowest index.

    NaNs count as equal and larger than all, so that they stay visible in what follows.
    """
    if k >= pre_acts.shape[-1]:
        return torch.ones_like(pre_acts, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(pre_acts, dtype=torch.bool)
    threshold = pre_acts.topk(k, dim=-1).values[..., -1:]
    # Against a NaN every comparison is false.
    tied = (pre_acts == threshold) | (pre_acts.isnan() & threshold.isnan())
    above = (pre_acts > threshold) | (pre_acts.isnan() & ~threshold.isnan())
    if int(tied.count_nonzero()) + int(above.count_nonzero()) == k * tied[..., 0].numel():
        return tied | above
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def topk(pre_acts: Float[Tensor, "*rows feature"], k: int) -> Float[Tensor, "*rows feature"]:
    """The k largest values of each row, negative ones as zero, and zero everywhere else.

    The gradient reaches only the values that are kept and positive.
    """
    return torch.where(topk_mask(pre_acts.detach(), k), pre_acts.relu(), 0.0)


def batch_topk_mask(
    pre_acts: Float[Tensor, "layer batch feature"], k: int
) -> Bool[Tensor, "layer batch feature"]:
    """Which features are among the k * batch largest of their layer; ties go to the first row, then feature.

    For training only: what a row keeps depends on the others. `calibration` makes it a JumpReLU.
    """
    return topk_mask(pre_acts.flatten(1), k * pre_acts.shape[1]).view_as(pre_acts)


def jumprelu(
    pre_acts: Float[Tensor, "*rows feature"],
    log_threshold: Float[Tensor, "*broadcast feature"],
    ste: Ste,
    width: float,
) -> Float[Tensor, "*rows feature"]:
    """h where it passes its threshold, else zero; see the module for the gradients.

    A NaN stays visible.

    Args:
        log_threshold: Logarithm of the thresholds; broadcast over rows.
        width: eps.
    """
    found: Tensor = _JumpReLU.apply(pre_acts, log_threshold, ste, width)  # type: ignore[no-untyped-call]
    return found


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, log_threshold: Tensor, ste: Ste, width: float) -> Tensor:
        ctx.save_for_backward(pre_acts, log_threshold)
        ctx.ste, ctx.width = ste, width
        return torch.where(_is_inactive(pre_acts, log_threshold.exp(), ste), 0.0, pre_acts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        pre_acts, log_threshold = ctx.saved_tensors
        threshold = log_threshold.exp()
        in_window = (pre_acts - threshold).abs() < ctx.width / 2
        jump = pre_acts if ctx.ste == "crosslayer-coding" else threshold
        of_window = torch.where(in_window, gradient * (jump / ctx.width), 0.0)
        by_pre_acts = torch.where(_is_inactive(pre_acts, threshold, ctx.ste), 0.0, gradient)
        if ctx.ste == "anthropic":
            by_pre_acts = by_pre_acts + of_window
        by_log_threshold = -(of_window * threshold).sum_to_size(log_threshold.shape)
        return by_pre_acts, by_log_threshold, None, None


def _is_inactive(pre_acts: Tensor, threshold: Tensor, ste: Ste) -> Tensor:
    # False for NaN, which is then kept.
    return pre_acts < threshold if ste == "crosslayer-coding" else pre_acts <= threshold


def log_of(threshold: float) -> float:
    """Logarithm of a threshold, which must be above zero to have one; the smallest float32 for zero."""
    return math.log(max(threshold, torch.finfo(torch.float32).tiny))
