"""What features write, from the weights alone.

Promoted and suppressed tokens: a feature's decoders to all its targets, in the model's units, added up: what one unit
of it adds to the residual stream at the end if no later block answers. This direction is centred, multiplied by the
final norm's weight and by 1 + the final adaLN's scale, and unembedded. The final norm's division by the residual's
standard deviation is left out: it is one positive factor for all tokens, so the order of the tokens is that of the
direct effect with the norm frozen. Effects are about their mean over the vocabulary without the mask.

Nearest features: cosine of the decoders to all targets, in normalised units, zero where a feature does not write.
"""

# Axes: layer (source), feature, later (target minus source layer), rank, vocab, d_model

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float
from transcoder.identity import check_model
from transcoder.model import CrossLayerTranscoder

ADDED, UNGATED = "blocks.{layer}.hook_mlp_out", "blocks.{layer}.mlp.hook_out"
"""Output hook points whose values reach the residual stream: as they are, or times adaLN's gate."""
TIME = 0.5
"""t at which the modulation of a time-conditioned model is taken."""
BLOCK_VALUES = 2**24
"""Values of a block of effects or cosines that are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What every feature writes."""

    norms: list[NDArray[np.float32]]
    """By source layer, [feature later]: norm of the decoder to each target, in the model's units."""
    promoted: NDArray[np.int64]
    """[layer feature rank] tokens that a feature makes most likely."""
    promoted_by: NDArray[np.float32]
    """[layer feature rank] effect of one unit on their logits, times the residual's standard deviation."""
    suppressed: NDArray[np.int64]
    """[layer feature rank] tokens that a feature makes least likely."""
    suppressed_by: NDArray[np.float32]
    """[layer feature rank] likewise."""
    nearest: NDArray[np.int64]
    """[layer feature rank 2] layer and number of the features with the largest cosine; none has rank 0 axis."""
    cosines: NDArray[np.float32]
    """[layer feature rank] these cosines."""


@torch.no_grad()
def read_decoders(
    clt: CrossLayerTranscoder, model: HookedMDLM, *, n_tokens: int = 10, n_nearest: int = 8
) -> Written:
    """Read off a transcoder's decoders.

    Args:
        model: That it was trained on.
        n_tokens: Promoted and suppressed tokens of a feature, so many of each.
        n_nearest: Nearest features; 0 leaves out the search, whose time grows with the square of the features.
    Raises:
        CheckpointError: If the model is another.
        DataError: If a number is out of range, or the output hook does not add to the residual stream.
    """
    check_model(clt, model)
    if not 1 <= n_tokens < model.config.vocab_size:
        raise DataError(f"n_tokens must be in [1, {model.config.vocab_size}), got {n_tokens}")
    others = clt.config.n_layers * clt.config.n_features - 1
    if n_nearest < 0:
        raise DataError(f"n_nearest must be at least 0, got {n_nearest}")
    tokens = [_tokens(directions, readout(model), model, n_tokens) for directions in _directions(clt, model)]
    high, high_by, low, low_by = (
        np.stack([part.numpy() for part in parts]) for parts in zip(*tokens, strict=True)
    )
    nearest, cosines = _nearest(clt, min(n_nearest, others))
    return Written(
        norms=[
            (weight / clt.target_scale(source)[None, :, None]).norm(dim=2).cpu().numpy()
            for source, weight in enumerate(clt.W_dec)
        ],
        promoted=high,
        promoted_by=high_by,
        suppressed=low,
        suppressed_by=low_by,
        nearest=nearest,
        cosines=cosines,
    )


def readout(model: HookedMDLM) -> Float[Tensor, "vocab d_model"]:
    """The final norm's weight, the modulation's scale and the unembedding as one matrix, without the centring."""
    sigma = LogLinearSchedule().sigma(torch.tensor([TIME], dtype=torch.float64)).float().to(model.device)
    token = torch.tensor([[model.config.mask_id]], device=model.device)
    _, cache = model.run_with_cache(token, ["adaln_final.hook_scale"], timesteps=sigma)
    output = model.backbone.output_layer
    scale = output.norm_final.weight * (1 + cache["adaln_final.hook_scale"][0, 0])
    weight: Tensor = output.linear.weight * scale
    return weight


def _directions(clt: CrossLayerTranscoder, model: HookedMDLM) -> list[Float[Tensor, "feature d_model"]]:
    """What one unit of each feature of a layer adds to the residual stream, over all its targets."""
    hook = clt.config.output_hook
    if hook not in (ADDED, UNGATED):
        raise DataError(
            f"promoted tokens need decoders that write to {ADDED!r} or {UNGATED!r}, which reach the residual "
            f"stream; this transcoder's write to {hook!r}"
        )
    gates = _gates(model, clt.config.n_layers) if hook == UNGATED else None
    directions = []
    for source, weight in enumerate(clt.W_dec):
        rows = weight / clt.target_scale(source)[None, :, None]
        if gates is not None:
            rows = rows * gates[list(clt.config.targets(source))]
        directions.append(rows.sum(1).to(model.device))
    return directions


def _gates(model: HookedMDLM, n_layers: int) -> Float[Tensor, "layer d_model"]:
    names = [f"blocks.{layer}.adaln.hook_gate_mlp" for layer in range(n_layers)]
    sigma = LogLinearSchedule().sigma(torch.tensor([TIME], dtype=torch.float64)).float().to(model.device)
    token = torch.tensor([[model.config.mask_id]], device=model.device)
    _, cache = model.run_with_cache(token, names, timesteps=sigma)
    return torch.stack([cache[name][0, 0] for name in names])


def _tokens(
    directions: Float[Tensor, "feature d_model"],
    weight: Float[Tensor, "vocab d_model"],
    model: HookedMDLM,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and effects [feature rank]: the largest, then the smallest."""
    mask = model.config.mask_id
    size = max(1, BLOCK_VALUES // len(weight))
    parts = []
    for block in torch.split(directions, size):
        effects = functional.linear(block - block.mean(1, keepdim=True), weight)
        is_token = torch.arange(len(weight), device=effects.device) != mask
        effects = effects - effects[:, is_token].mean(1, keepdim=True)
        effects[:, mask] = -torch.inf
        high = effects.topk(count, dim=1)
        effects[:, mask] = torch.inf
        low = effects.topk(count, dim=1, largest=False)
        parts.append((high.indices, high.values, low.indices, low.values))
    found = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    return found[0], found[1], found[2], found[3]


def _nearest(clt: CrossLayerTranscoder, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Layer and number [layer feature rank 2] of the nearest features, and their cosines [layer feature rank]."""
    n_layers, n_features = clt.config.n_layers, clt.config.n_features
    numbers = np.zeros((n_layers, n_features, count, 2), np.int64)
    cosines = np.zeros((n_layers, n_features, count), np.float32)
    if not count:
        return numbers, cosines
    units = [weight / weight.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None] for weight in clt.W_dec]
    size = max(1, BLOCK_VALUES // (n_layers * n_features))
    for layer in range(n_layers):
        for start in range(0, n_features, size):
            block = slice(start, min(start + size, n_features))
            found = torch.cat([_cosines(clt, units, layer, block, other) for other in range(n_layers)], dim=1)
            own = torch.arange(block.start, block.stop)
            found[own - start, layer * n_features + own] = -torch.inf
            best = found.topk(count, dim=1)
            numbers[layer, block, :, 0] = (best.indices // n_features).cpu().numpy()
            numbers[layer, block, :, 1] = (best.indices % n_features).cpu().numpy()
            cosines[layer, block] = best.values.cpu().numpy()
    return numbers, cosines


def _cosines(
    clt: CrossLayerTranscoder, units: list[Tensor], layer: int, block: slice, other: int
) -> Float[Tensor, "block feature"]:
    """Of some features of one layer with all of another, over the targets that both write to."""
    mine, theirs = clt.config.targets(layer), clt.config.targets(other)
    first, last = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
    here = units[layer][block]
    if first >= last:
        return here.new_zeros(len(here), clt.config.n_features)
    left = here[:, first - layer : last - layer].flatten(1)
    right = units[other][:, first - other : last - other].flatten(1)
    return left @ right.T
