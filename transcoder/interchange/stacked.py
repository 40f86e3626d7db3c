"""Tensors that a format keeps layer by layer, as one transcoder."""

# Axes: layer, feature, d_model

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.config import TranscoderConfig
from transcoder.folded import FoldedWeights
from transcoder.interchange.form import Form
from transcoder.interchange.stored import thresholds_or_none


def no_layers() -> dict[str, list[Tensor]]:
    """An empty list of layers for each tensor that is stacked."""
    return {name: [] for name in ("W_enc", "b_enc", "b_dec", "threshold", "W_skip")}


def stacked_form(
    parts: Mapping[str, Sequence[Tensor]], W_dec: list[Tensor], path: Path, **config: Any
) -> Form:
    """The transcoder of some layers: a jumprelu if there are thresholds, else a relu.

    Args:
        parts: Of each layer, by the names of `no_layers`; nothing for what the layers do not have.
        path: That errors name.
        config: What the tensors do not say: connectivity and hook points.
    Raises:
        CheckpointError: If thresholds are negative or not finite.
    """
    stacked = {name: torch.stack(list(of_layers)) for name, of_layers in parts.items() if of_layers}
    threshold = stacked.get("threshold")
    if threshold is not None:
        threshold = thresholds_or_none(threshold, path)
    weights = FoldedWeights(
        W_enc=stacked["W_enc"],
        b_enc=stacked["b_enc"],
        W_dec=W_dec,
        b_dec=stacked["b_dec"],
        threshold=threshold,
        W_skip=stacked.get("W_skip"),
    )
    n_layers, n_features, d_model = weights.W_enc.shape
    shape = TranscoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        activation="relu" if threshold is None else "jumprelu",
        skip=weights.W_skip is not None,
        **config,
    )
    return Form(shape, weights)
