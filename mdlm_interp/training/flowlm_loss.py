"""The symmetric KL divergence between a token's one-hot q and the model's distribution p, in nats.

    corrected    KL(q || p) + KL(p || q) = -log p[x] + sum p (log p - log(q + 1e-8))
    as published KL(q || p) + sum exp(p) (p - log(q + 1e-8))

The published second term hands p to `F.kl_div(..., log_target=True)` where log p belongs. Each of the V entries then
adds exp(p) (p + 18.4), about 18.4, whatever the model says: at V = 1000 it is above 18,400 for every p, where the
intended term is at most 18.4.

Source:
    github.com/tom-pollak/dllm at 43ea9ff, train_flowlm.py, compute_loss.
"""

# Axes: row, pos, vocab

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Float32, Int64

SMOOTHING = 1e-8
"""Added to the one-hot before its logarithm is taken."""


def symmetric_kl(
    logits: Float[Tensor, "row pos vocab"], ids: Int64[Tensor, "row pos"], *, as_published: bool = False
) -> Float32[Tensor, "row pos"]:
    """Both divergences added up, at each position."""
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, ids[..., None])[..., 0]
    reverse = published_reverse(log_p, chosen) if as_published else reverse_kl(log_p, chosen)
    return reverse - chosen


def reverse_kl(
    log_p: Float32[Tensor, "row pos vocab"], chosen: Float32[Tensor, "row pos"]
) -> Float32[Tensor, "row pos"]:
    """sum p (log p - log(q + 1e-8)), without a table of q: its logarithm has two values.

    Args:
        chosen: log p of the token itself.
    """
    p = chosen.exp()
    return (log_p.exp() * log_p).sum(-1) - (1 - p) * math.log(SMOOTHING) - p * math.log1p(SMOOTHING)


def published_reverse(
    log_p: Float32[Tensor, "row pos vocab"], chosen: Float32[Tensor, "row pos"]
) -> Float32[Tensor, "row pos"]:
    """sum exp(p) (p - log(q + 1e-8)): the published second term."""
    p = log_p.exp()
    everywhere = (p.exp() * (p - math.log(SMOOTHING))).sum(-1)
    return everywhere + torch.exp(chosen.exp()) * (math.log(SMOOTHING) - math.log1p(SMOOTHING))
