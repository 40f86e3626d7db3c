"""Which entries of the pre-activations a training step goes through: the active ones, and those that could be.

Everything here is without gradient; `kernels.encode_selected` gives the chosen entries theirs.
"""

# Axes: layer, batch, feature

from __future__ import annotations

import torch
from torch import Tensor

from mdlm_interp.shapes import Bool, Float
from transcoder.config import TranscoderConfig
from transcoder.kernels import select_batch_topk, select_topk
from transcoder.sparse import SparseActs, from_mask, offsets_of


def selected_entries(
    config: TranscoderConfig,
    pre_acts: Float[Tensor, "layer batch feature"],
    thresholds: Float[Tensor, "layer feature"],
    k: int | None,
) -> list[SparseActs]:
    """Entries that are active or, with JumpReLU, within the window in which the threshold has a gradient.

    Args:
        k: Of this step; None for activations that do not select.
    """
    if config.selects:
        assert k is not None
        select = select_topk if config.activation == "topk" else select_batch_topk
        return [select(of_layer, k) for of_layer in pre_acts.unbind()]
    # Not `> 0`: a NaN stays visible.
    if config.activation == "jumprelu":
        chosen = ~(pre_acts <= (thresholds - config.ste_width / 2)[:, None])
    else:
        chosen = ~(pre_acts <= 0)
    return [from_mask(*of_layer) for of_layer in zip(pre_acts.unbind(), chosen.unbind(), strict=True)]


def strongest_dead(
    pre_acts: Float[Tensor, "layer batch feature"], is_dead: Bool[Tensor, "layer feature"], k: int
) -> list[SparseActs]:
    """The k largest positive pre-activations among each layer's dead features."""
    found = []
    for of_layer, dead_of_layer in zip(pre_acts.unbind(), is_dead.unbind(), strict=True):
        dead = dead_of_layer.nonzero()[:, 0]
        if len(dead) == 0:
            found.append(_empty(of_layer))
            continue
        among = select_topk(of_layer.index_select(1, dead), min(k, len(dead)))
        features = dead[among.indices.long()].to(among.indices.dtype)
        found.append(SparseActs(among.values, features, among.offsets))
    return found


def below(
    pre_acts: Float[Tensor, "layer batch feature"],
    limits: Float[Tensor, "layer feature"],
    chosen: Bool[Tensor, "layer feature"] | None,
) -> list[SparseActs]:
    """Entries below a limit, of the chosen features or of all."""
    is_below = pre_acts < limits[:, None]
    if chosen is not None:
        is_below &= chosen[:, None]
    return [from_mask(*of_layer) for of_layer in zip(pre_acts.unbind(), is_below.unbind(), strict=True)]


def _empty(of_layer: Tensor) -> SparseActs:
    nothing = torch.zeros(len(of_layer), dtype=torch.int64, device=of_layer.device)
    indices = torch.empty(0, dtype=torch.int32, device=of_layer.device)
    return SparseActs(of_layer.new_empty(0), indices, offsets_of(nothing))
