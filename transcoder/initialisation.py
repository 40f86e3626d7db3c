"""The initial weights, as the published recipes have them.

Weights are uniform draws, each tensor a pure function of (seed, its name). Biases of the decoders and the skip are
zero: activations are centred with the store's mean, so zero is what "the mean output" is elsewhere.

Source:
    reference/transcoders.md 2.3: Anthropic's CLT and its re-implementations; EleutherAI/clt-training (zeros);
    OpenMOSS/Language-Model-SAEs (own_layer). Anthropic, Circuits Updates January 2025 (b_enc from a firing rate).
"""

# Axes: layer, batch, feature

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float
from transcoder.activations import log_of
from transcoder.config import InitConfig

if TYPE_CHECKING:
    from transcoder.model import CrossLayerTranscoder


@torch.no_grad()
def initialise(clt: CrossLayerTranscoder, init: InitConfig, seed: int) -> None:
    """Set every parameter in place."""
    config = clt.config
    for parameter in (clt.b_enc, clt.b_dec, *([clt.W_skip] if clt.W_skip is not None else [])):
        parameter.zero_()
    if clt.log_threshold is not None:
        clt.log_threshold.fill_(log_of(init.threshold))
    fan = {"n_features": config.n_features, "d_model": config.d_model}[init.encoder]
    _draw(clt.W_enc, "W_enc", 1.0 / math.sqrt(fan), seed)
    for source, weight in enumerate(clt.W_dec):
        if init.decoder == "zeros":
            weight.zero_()
            continue
        _draw(weight, f"W_dec.{source}", 1.0 / math.sqrt(config.reach * config.d_model), seed)
        if init.decoder == "own_layer":
            weight[:, 1:] = 0.0


def _draw(parameter: Tensor, name: str, bound: float, seed: int) -> None:
    draws = torch.from_numpy(uniforms(seed, f"clt:{name}", 0, parameter.numel()))
    parameter.copy_(((2.0 * draws - 1.0) * bound).reshape(parameter.shape))


@torch.no_grad()
def set_firing_rates(
    clt: CrossLayerTranscoder, x: Float[Tensor, "layer batch d_model"], active_features: float
) -> None:
    """Set b_enc so that each feature passes its threshold in the same number of these rows.

    That is the largest number, but at least one, that lets at most `active_features` of a layer be active per row,
    on average; exact by quantile, and all features at once. For activations that select, the threshold is 0.

    Args:
        x: Inputs of at least two rows, as the model has them.
    """
    n_rows = x.shape[1]
    rank = max(1, min(n_rows - 1, math.floor(active_features * n_rows / clt.config.n_features)))
    for layer in range(clt.config.n_layers):
        projected = clt.pre_acts(x[layer], layer) - clt.b_enc[layer]
        # Between the last row that is to be active and the first that is not.
        largest = projected.topk(rank + 1, dim=0).values
        edge = (largest[rank - 1] + largest[rank]) / 2.0
        clt.b_enc[layer] = clt.thresholds()[layer] - edge
