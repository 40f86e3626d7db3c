"""What training minimises: reconstruction, and a term that revives dead features.

Both take activations in normalised units and are means over tokens, so they do not depend on batch size.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdlm_interp.shapes import Bool, Float
from transcoder.activations import topk


def layer_fvu(
    y_hat: Float[Tensor, "layer batch d_model"], y: Float[Tensor, "layer batch d_model"]
) -> Float[Tensor, " layer"]:
    """Squared error of each layer over the store's total variance, which is d_model in normalised units."""
    return (y_hat - y).square().mean((1, 2))


def reconstruction_loss(
    y_hat: Float[Tensor, "layer batch d_model"], y: Float[Tensor, "layer batch d_model"]
) -> Float[Tensor, ""]:
    """Mean over layers of the fraction of variance unexplained."""
    return layer_fvu(y_hat, y).mean()


def auxk_loss(
    residual: Float[Tensor, "layer batch d_model"],
    pre_acts: Float[Tensor, "layer batch feature"],
    is_dead: Bool[Tensor, "layer feature"],
    W_dec: Sequence[Tensor],
    k: int,
) -> Float[Tensor, ""]:
    """Share of the reconstruction's error that the k strongest dead features of each layer leave over.

    Zero when nothing is dead or k is 0. Only dead features get a gradient.

    Args:
        residual: y - y_hat; taken as a constant.
        W_dec: Decoders [feature later d_model] of each source layer.
    Source:
        Gao et al. 2024, arXiv:2406.04093, appendix A.2 (AuxK).
    """
    n_layers, _, d_model = residual.shape
    if k == 0 or not bool(is_dead.any()):
        return residual.new_zeros(())
    target = residual.detach()
    revived: list[list[Tensor]] = [[] for _ in range(n_layers)]
    for source in range(n_layers):
        dead = is_dead[source].nonzero()[:, 0]
        if len(dead) == 0:
            continue
        acts = topk(pre_acts[source].index_select(1, dead), min(k, len(dead)))
        written = acts @ W_dec[source].index_select(0, dead).flatten(1)
        for later, part in enumerate(torch.split(written, d_model, dim=1)):
            revived[source + later].append(part)
    errors = [
        (goal - torch.stack(parts).sum(0) if parts else goal).square().mean()
        for goal, parts in zip(target, revived, strict=True)
    ]
    # A layer without error has nothing left to explain; the floor keeps 0 / 0 out.
    return torch.stack(errors).sum() / target.square().mean((1, 2)).sum().clamp(min=1e-12)
