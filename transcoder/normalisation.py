"""Centring and scaling of activations: per layer one mean vector and one scalar.

The scale makes the mean square of a centred row's entries 1, so a mean squared error in normalised units
is the fraction of variance unexplained. It is one scalar a layer, not one per dimension, which would
change the metric. Statistics are the store's, in float64, over all its rows.
"""

# Axes: layer, d_model

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float64


@dataclass(frozen=True)
class Normalisation:
    """x to (x - mean) * scale, for each layer."""

    mean: Float64[Tensor, "layer d_model"]
    scale: Float64[Tensor, " layer"]

    @classmethod
    def identity(cls, n_layers: int, d_model: int) -> Normalisation:
        """The normalisation that changes nothing."""
        return cls(
            torch.zeros(n_layers, d_model, dtype=torch.float64), torch.ones(n_layers, dtype=torch.float64)
        )


def normalisation_from_moments(
    moments: Sequence[tuple[Float64[Tensor, " d_model"], float]], names: Sequence[str]
) -> Normalisation:
    """Build from each layer's moments.

    Args:
        moments: Mean row, and mean square over rows and dimensions, of each layer.
        names: What to call each layer in errors.
    Raises:
        DataError: If a layer's activation does not vary, or its moments are not finite.
    """
    scales = []
    for (mean, mean_square), name in zip(moments, names, strict=True):
        variance = mean_square - float(mean.square().mean())
        # Below the rounding of mean_square nothing is left of the variance.
        if not variance > 1e-12 * mean_square:
            raise DataError(
                f"{name} has variance {variance:.3g} over the store: there is nothing to reconstruct; "
                f"are the model's gates still zero (untrained)?"
            )
        scales.append(1.0 / math.sqrt(variance))
    return Normalisation(
        torch.stack([mean for mean, _ in moments]), torch.tensor(scales, dtype=torch.float64)
    )
