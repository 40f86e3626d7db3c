"""Sparse activation functions of a transcoder's features.

Source:
    Gao et al. 2024, arXiv:2406.04093, section 2.3 (TopK); there, too, a kept value passes a ReLU.
"""

# Axes: feature; all others are leading

from __future__ import annotations

import torch
from torch import Tensor

from mdlm_interp.shapes import Bool, Float


def topk_mask(pre_acts: Float[Tensor, "*rows feature"], k: int) -> Bool[Tensor, "*rows feature"]:
    """Which features are among the k largest of their row: exactly k; ties go to the lowest index.

    A NaN counts as largest, so it stays visible in what follows.
    """
    if k >= pre_acts.shape[-1]:
        return torch.ones_like(pre_acts, dtype=torch.bool)
    threshold = pre_acts.topk(k, dim=-1).values[..., -1:]
    # Not `>=`: against a NaN every comparison is false, and the row must be kept rather than cleared.
    kept = ~(pre_acts < threshold)
    if int(kept.count_nonzero()) > k * kept[..., 0].numel():
        above = (pre_acts > threshold) | pre_acts.isnan()
        tied = kept & ~above
        room = k - above.sum(-1, keepdim=True)
        kept = above | (tied & (tied.cumsum(-1) <= room))
    return kept


def topk(pre_acts: Float[Tensor, "*rows feature"], k: int) -> Float[Tensor, "*rows feature"]:
    """The k largest values of each row, negative ones as zero, and zero everywhere else.

    The gradient reaches only the values that are kept and positive.
    """
    return torch.where(topk_mask(pre_acts.detach(), k), pre_acts.relu(), 0.0)
