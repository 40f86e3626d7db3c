"""How well a transcoder reconstructs held-out rows, apart for masked and unmasked positions.

Sums are taken in float64 over batches of rows, so that the figures are those of all rows together and
not means of batch figures. Variances are about the mean of the rows looked at. A share of a variance
that is hardly there would be rounding over rounding: it is nan, and the reason is kept with it.
"""

# Axes: layer, row, d_model, feature, stratum (unmasked, masked)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.shapes import Bool, Float
from transcoder.model import CrossLayerTranscoder

STRATA = ("all", "unmasked", "masked")

LEAST_VARIANCE = 1e-4
"""Part of the store's variance that rows must have for a share of theirs to be a figure."""


@dataclass(frozen=True)
class LayerMetrics:
    """One layer's reconstruction over one set of rows; nan where `undefined` says why."""

    n_rows: int
    fvu: float
    """Squared error over the targets' total variance: fraction of variance unexplained."""
    explained_variance: float
    """1 - variance of the error over variance of the targets: like 1 - fvu, but a constant error is free."""
    cosine: float
    """Mean cosine between reconstruction and target."""
    l0: float
    """Mean number of active features of this layer."""
    dead: int
    """Features of this layer that are active in none of the rows."""
    undefined: str | None = None
    """Why fvu and explained_variance have no value, or without rows all figures; None if they have."""


class ReconstructionMetrics:
    """Running sums over batches of rows."""

    def __init__(self, clt: CrossLayerTranscoder) -> None:
        config = clt.config
        by_layer = (config.n_layers, 2)
        self.clt = clt
        self.n_rows = torch.zeros(2, dtype=torch.float64)
        self._targets = torch.zeros(*by_layer, config.d_model, dtype=torch.float64)
        self._errors = torch.zeros(*by_layer, config.d_model, dtype=torch.float64)
        self._target_squares = torch.zeros(by_layer, dtype=torch.float64)
        self._error_squares = torch.zeros(by_layer, dtype=torch.float64)
        self._cosines = torch.zeros(by_layer, dtype=torch.float64)
        self._active = torch.zeros(*by_layer, config.n_features, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "layer row d_model"],
        y: Float[Tensor, "layer row d_model"],
        is_masked: Bool[Tensor, " row"],
    ) -> None:
        """Add rows: the model's MLP inputs and outputs."""
        feature_acts = self.clt.encode(x)
        y_hat = self.clt.decode(feature_acts, x)
        cosine = torch.nn.functional.cosine_similarity(y_hat.double(), y.double(), dim=-1)
        for stratum, chosen in enumerate((~is_masked, is_masked)):
            # About the store's mean, which leaves less to cancel in the variance.
            target = y[:, chosen].double() - self.clt.out_mean.double()[:, None]
            error = y_hat[:, chosen].double() - y[:, chosen].double()
            self.n_rows[stratum] += int(chosen.sum())
            self._targets[:, stratum] += target.sum(1).cpu()
            self._errors[:, stratum] += error.sum(1).cpu()
            self._target_squares[:, stratum] += target.square().sum((1, 2)).cpu()
            self._error_squares[:, stratum] += error.square().sum((1, 2)).cpu()
            self._cosines[:, stratum] += cosine[:, chosen].sum(1).cpu()
            self._active[:, stratum] += (feature_acts[:, chosen] > 0).sum(1).cpu()

    def layers(self, stratum: str = "all") -> list[LayerMetrics]:
        """The figures of every layer over one stratum."""
        part = {"all": slice(0, 2), "unmasked": slice(0, 1), "masked": slice(1, 2)}[stratum]
        n = self.n_rows[part].sum()
        targets, errors = self._targets[:, part].sum(1), self._errors[:, part].sum(1)
        target_squares, error_squares = (
            self._target_squares[:, part].sum(1),
            self._error_squares[:, part].sum(1),
        )
        variance = target_squares - targets.square().sum(-1) / n
        error_variance = error_squares - errors.square().sum(-1) / n
        active = self._active[:, part].sum(1)
        # In units of the store's variance, as the transcoder normalises it.
        relative = variance / (n * self.clt.config.d_model) * self.clt.out_scale.double().cpu().square()
        reasons = [_why_undefined(int(n), float(share)) for share in relative]
        variance[[reason is not None for reason in reasons]] = torch.nan
        return [
            LayerMetrics(
                n_rows=int(n),
                fvu=float(error_squares[layer] / variance[layer]),
                explained_variance=float(1 - error_variance[layer] / variance[layer]),
                cosine=float(self._cosines[layer, part].sum() / n),
                l0=float(active[layer].sum() / n),
                dead=int((active[layer] == 0).sum()),
                undefined=reasons[layer],
            )
            for layer in range(active.shape[0])
        ]

    def density(self, stratum: str = "all") -> NDArray[np.float64]:
        """Share of the rows in which each feature is active [layer feature]."""
        part = {"all": slice(0, 2), "unmasked": slice(0, 1), "masked": slice(1, 2)}[stratum]
        share = self._active[:, part].sum(1) / self.n_rows[part].sum()
        return np.asarray(share.numpy())


def _why_undefined(n_rows: int, variance: float) -> str | None:
    """Why a share of this variance, in units of the store's, is no figure; None if it is one."""
    if n_rows == 0:
        return "there are no such positions"
    if variance >= LEAST_VARIANCE:
        return None
    return (
        f"the MLP outputs at these {n_rows} positions hardly vary: by {max(variance, 0.0):.1e} of the "
        f"variance over the store, less than {LEAST_VARIANCE:g}"
    )
