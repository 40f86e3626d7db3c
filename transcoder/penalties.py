"""What makes features sparse, and what keeps them from dying: sums over features, means over tokens and layers.

Being means over tokens, they do not depend on batch size. Reconstruction is a mean over layers too, in units of a
layer's variance, so a coefficient is what a feature costs in explained variance. All are sums over the entries of
sparse activations: an entry that is not there has no part in them.

Source:
    Anthropic, Circuits Updates January 2025 (tanh with decoder norms; relu(threshold - h) with decoder norms);
    curt-tigges/crosslayer-coding (relu(-h)).
"""

# Axes: layer, feature; entries of one layer's activations

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdlm_interp.shapes import Float
from transcoder.sparse import SparseActs


def tanh_penalty(
    acts: Sequence[SparseActs], decoder_norms: Float[Tensor, "layer feature"], scale: float
) -> Float[Tensor, ""]:
    """Sum over features of tanh(scale * norm * activation): about the number that are active."""
    return _per_token(acts, [(scale * at * a.values).tanh() for a, at in _aligned(acts, decoder_norms)])


def l1_penalty(
    acts: Sequence[SparseActs], decoder_norms: Float[Tensor, "layer feature"]
) -> Float[Tensor, ""]:
    """Sum over features of norm * activation."""
    return _per_token(acts, [at * a.values for a, at in _aligned(acts, decoder_norms)])


def threshold_penalty(
    pre_acts: Sequence[SparseActs],
    thresholds: Float[Tensor, "layer feature"],
    decoder_norms: Float[Tensor, "layer feature"],
) -> Float[Tensor, ""]:
    """Sum over features of norm * relu(threshold - h): how far each is from being active.

    Args:
        pre_acts: Those of the features that are penalised, at least where they are below their threshold.
    """
    missing = [(at - h.values).relu() for h, at in _aligned(pre_acts, thresholds)]
    norms = [at for _, at in _aligned(pre_acts, decoder_norms)]
    return _per_token(pre_acts, [norm * part for norm, part in zip(norms, missing, strict=True)])


def zero_penalty(pre_acts: Sequence[SparseActs]) -> Float[Tensor, ""]:
    """Sum over features of relu(-h).

    Args:
        pre_acts: Those of the features that are penalised, at least where they are below zero.
    """
    return _per_token(pre_acts, [(-h.values).relu() for h in pre_acts])


def _aligned(
    acts: Sequence[SparseActs], by_feature: Float[Tensor, "layer feature"]
) -> list[tuple[SparseActs, Tensor]]:
    """Each layer's entries with what belongs to their features."""
    return [
        (layer, values.index_select(0, layer.indices.long()))
        for layer, values in zip(acts, by_feature.unbind(), strict=True)
    ]


def _per_token(acts: Sequence[SparseActs], terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([term.sum() for term in terms]).sum() / (len(acts) * acts[0].n_rows)
