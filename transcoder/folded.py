"""A transcoder's weights without normalisation, in float64, as other formats have them.

x~ = (x - in_mean) * in_scale goes into the encoders and biases, y~ = (y - out_mean) * out_scale into the decoders, the
skip and the bias that a target gets.
"""

# Axes: layer, feature, d_model

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdlm_interp.shapes import Float64

if TYPE_CHECKING:
    from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True)
class FoldedWeights:
    """A transcoder without normalisation: same features, same reconstruction."""

    W_enc: Float64[Tensor, "layer feature d_model"]
    b_enc: Float64[Tensor, "layer feature"]
    W_dec: list[Tensor]
    """Float64 [feature later d_model] of each source layer."""
    b_dec: Float64[Tensor, "layer d_model"]
    threshold: Float64[Tensor, "layer feature"] | None
    """Of pre-activations; None if the activation has none."""
    W_skip: Float64[Tensor, "layer d_model d_model"] | None
    """[layer out in]: from a layer's input to its output; None without a skip."""


@torch.no_grad()
def folded_weights(clt: CrossLayerTranscoder) -> FoldedWeights:
    """The weights with normalisation folded in: they take and give raw activations."""
    in_scale, out_scale = clt.in_scale.double()[:, None], clt.out_scale.double()[:, None]
    shift = torch.einsum("lfd,ld->lf", clt.W_enc.double(), clt.in_mean.double())
    b_dec, skip = clt.b_dec.double() / out_scale + clt.out_mean.double(), None
    if clt.W_skip is not None:
        skip = clt.W_skip.double() * (in_scale / out_scale)[..., None]
        b_dec -= torch.einsum("loi,li->lo", skip, clt.in_mean.double())
    return FoldedWeights(
        W_enc=clt.W_enc.double() * in_scale[..., None],
        b_enc=clt.b_enc.double() - shift * in_scale,
        W_dec=[
            weight.double() / clt.target_scale(source).double()[:, None]
            for source, weight in enumerate(clt.W_dec)
        ],
        b_dec=b_dec,
        threshold=None if clt.log_threshold is None else clt.log_threshold.double().exp(),
        W_skip=skip,
    )
