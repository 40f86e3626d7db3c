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
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float
from transcoder.activations import log_of
from transcoder.config import InitConfig

if TYPE_CHECKING:
    from transcoder.model import CrossLayerTranscoder


def initialise(clt: CrossLayerTranscoder, init: InitConfig, seed: int) -> None:
    """Set every parameter in place."""
    initialise_blocks([clt], [slice(None)], init, seed)


@torch.no_grad()
def initialise_blocks(
    blocks: Sequence[CrossLayerTranscoder], features: Sequence[slice], init: InitConfig, seed: int
) -> None:
    """Set every parameter of blocks of a transcoder's features: each gets its part of what the whole one would.

    Args:
        features: That each block has. The whole of one tensor at a time is drawn, whatever they are.
    """
    config = blocks[0].config
    for block in blocks:
        for parameter in (block.b_enc, block.b_dec, *([block.W_skip] if block.W_skip is not None else [])):
            parameter.zero_()
        if block.log_threshold is not None:
            block.log_threshold.fill_(log_of(init.threshold))
    n, d_model = config.n_features, config.d_model
    fan = {"n_features": n, "d_model": d_model}[init.encoder]
    parts = [block.W_enc.transpose(0, 1) for block in blocks]
    _draw(parts, features, "W_enc", (config.n_layers, n, d_model), 1.0 / math.sqrt(fan), seed)
    bound = 1.0 / math.sqrt(config.reach * d_model)
    for source in range(config.n_layers):
        parts = [block.W_dec[source].detach() for block in blocks]
        if init.decoder == "zeros":
            for part in parts:
                part.zero_()
            continue
        shape = n, len(config.targets(source)), d_model
        _draw(parts, features, f"W_dec.{source}", shape, bound, seed)
        if init.decoder == "own_layer":
            for part in parts:
                part[:, 1:] = 0.0


def _draw(
    parts: Sequence[Tensor],
    features: Sequence[slice],
    name: str,
    shape: tuple[int, int, int],
    bound: float,
    seed: int,
) -> None:
    """Fill blocks [feature ...] of a tensor of this shape, whose axis of features may be the second."""
    draws = torch.from_numpy(uniforms(seed, f"clt:{name}", 0, math.prod(shape)))
    values = ((2.0 * draws - 1.0) * bound).reshape(shape)
    by_feature = values.transpose(0, 1) if name == "W_enc" else values
    for part, own in zip(parts, features, strict=True):
        part.copy_(by_feature[own])


@torch.no_grad()
def set_firing_rates(
    clt: CrossLayerTranscoder, x: Float[Tensor, "layer batch d_model"], active_features: float
) -> None:
    """Set b_enc so that each feature passes its threshold in the same number of these rows.

    That is the largest number, but at least one, that lets at most `active_features` of a layer be active per row,
    on average; exact by quantile, and all features at once. For activations that select, the threshold is 0.

    Args:
        clt: The transcoder, or a block of its features.
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
