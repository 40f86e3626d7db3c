"""How well a transcoder reconstructs held-out rows, by layer, masked or not, and part of [0, 1] in t.

1. Each row belongs to one group: unmasked or masked, in one t-bin (the store's, `capture.schema.T_BINS`).
2. Sums over the rows of each group are taken in float64, so that figures are those of all rows together and not
   means of batch figures, and any union of groups has its figures from the sums of its groups.
3. Variances are about the mean of the rows looked at, in training those of a batch (`fvu_of`). A share of a variance
   that is hardly there would be rounding over rounding: it is nan, and the reason is kept with it.

Explained variance has two definitions in use, and both are given; they differ wherever dimensions do:
- pooled: 1 - sum over dimensions of var(error) / sum over dimensions of var(target);
- by dimension: mean over dimensions of 1 - var(error) / var(target), each dimension counting alike.
FVU is neither's complement: its numerator is the squared error, in which a constant error counts too.

Source:
    1 - FVU is SAELens' explained_variance; pooled is dictionary_learning's frac_variance_explained; by dimension is
    the uniform average of scikit-learn's and torchmetrics' explained variance.
"""

# Axes: layer, row, d_model, feature, group (is_masked, t_bin), bin (of densities)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mdlm_interp.shapes import Bool, Float, Float64, Int64
from transcoder.model import CrossLayerTranscoder
from transcoder.normalisation import Normalisation

STRATA = ("all", "unmasked", "masked")
_GROUPS_OF = {"all": slice(0, 2), "unmasked": slice(0, 1), "masked": slice(1, 2)}

LEAST_VARIANCE = 1e-4
"""Part of the store's variance that rows must have for a share of theirs to be a figure."""
LEAST_DIMENSION_VARIANCE = 1e-6
"""Part of the mean dimension's variance that a dimension must have to count in the mean by dimension."""
DENSE = 0.1
"""A feature that is active in more than this share of the rows is dense."""
DENSITY_EDGES = (0.0, *(10.0 ** (exponent / 4) for exponent in range(-24, 1)))
"""Edges of the density histogram: from 10^-6 to 1 by quarters of a decade, and one bin below."""


@dataclass(frozen=True)
class LayerMetrics:
    """One layer's reconstruction over one set of rows; nan or None where `undefined` says why."""

    n_rows: int
    fvu: float
    """Squared error over the targets' total variance: fraction of variance unexplained."""
    nmse: float
    """Mean squared error in the transcoder's normalised units: of the variance over its training store. Unlike
    fvu, the figure of a union of rows is the mean of its parts' by their numbers of rows."""
    explained_variance: float
    """Pooled, see above: like 1 - fvu, but a constant error is free."""
    explained_variance_by_dimension: float
    """Mean over dimensions, see above."""
    dimensions_left_out: int | None
    """Dimensions that hardly vary, which that mean leaves out."""
    cosine: float
    """Mean cosine between reconstruction and target."""
    l0: float
    """Mean number of active features of this layer."""
    dead: int | None
    """Features of this layer that are active in none of the rows."""
    dense: float
    """Share of the layer's features that are active in more than `DENSE` of the rows."""
    density_histogram: tuple[int, ...] | None
    """Features by the share of rows in which they are active, in (edge, next edge] of `DENSITY_EDGES`; not the
    dead ones."""
    undefined: str | None = None
    """Why fvu and the explained variances have no value, or without rows all figures; None if they have."""


class ReconstructionMetrics:
    """Running sums over batches of rows.

    Args:
        t_bins: Equal parts of [0, 1] in t to tell apart.
        outputs: Normalisation of the outputs, whose variance is the unit of nmse; none takes the transcoder's.
    """

    def __init__(
        self, clt: CrossLayerTranscoder, t_bins: int = 1, *, outputs: Normalisation | None = None
    ) -> None:
        config = clt.config
        self.outputs = outputs or Normalisation(clt.out_mean.double(), clt.out_scale.double())
        by_group = (config.n_layers, 2, t_bins)
        self.clt, self.t_bins = clt, t_bins
        self.n_rows = torch.zeros(2, t_bins, dtype=torch.float64)
        self._targets = torch.zeros(*by_group, config.d_model, dtype=torch.float64)
        self._errors = torch.zeros(*by_group, config.d_model, dtype=torch.float64)
        self._target_squares = torch.zeros(*by_group, config.d_model, dtype=torch.float64)
        self._error_squares = torch.zeros(*by_group, config.d_model, dtype=torch.float64)
        self._cosines = torch.zeros(by_group, dtype=torch.float64)
        self._active = torch.zeros(*by_group, config.n_features, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "layer row d_model"],
        y: Float[Tensor, "layer row d_model"],
        is_masked: Bool[Tensor, " row"],
        t_bin: Int64[Tensor, " row"] | None = None,
    ) -> None:
        """Add rows: the model's MLP inputs and outputs.

        Args:
            t_bin: Of each row; none puts all into the first.
        """
        feature_acts = self.clt.encode(x)
        y_hat = self.clt.decode(feature_acts, x)
        members = self.add_rows(is_masked, t_bin)
        for layer in range(self.clt.config.n_layers):
            self.add_layer(layer, members, feature_acts[layer], y[layer], y_hat[layer])

    def add_rows(
        self, is_masked: Bool[Tensor, " row"], t_bin: Int64[Tensor, " row"] | None = None
    ) -> Float64[Tensor, "group row"]:
        """Count rows whose layers `add_layer` then adds; returns which group each is of, as ones and zeros."""
        group = is_masked.long() * self.t_bins
        if t_bin is not None:
            group = group + t_bin.to(group.device)
        numbers = torch.arange(2 * self.t_bins, device=group.device)
        members = (group == numbers[:, None]).double()
        self.n_rows += members.sum(1).reshape(2, -1).cpu()
        return members

    @torch.no_grad()
    def add_layer(
        self,
        layer: int,
        members: Float64[Tensor, "group row"],
        feature_acts: Float[Tensor, "row feature"],
        y: Float[Tensor, "row d_model"],
        y_hat: Float[Tensor, "row d_model"],
    ) -> None:
        """Add one layer of the rows that `add_rows` counted."""
        # About the store's mean, which leaves less to cancel in the variance.
        target = y.double() - self.outputs.mean[layer].to(y.device)
        error = y_hat.double() - y.double()
        cosine = cosine_similarity(y_hat.double(), y.double(), dim=-1)
        # Counts of a batch are exact in float32, whose products are faster.
        active = members.float() @ (feature_acts > 0).float()
        for sums, of_rows in (
            (self._targets, members @ target),
            (self._errors, members @ error),
            (self._target_squares, members @ target.square()),
            (self._error_squares, members @ error.square()),
            (self._cosines, members @ cosine),
            (self._active, active.double()),
        ):
            sums[layer] += of_rows.reshape(sums.shape[1:]).cpu()

    def layers(self, stratum: str = "all", t_bin: int | None = None) -> list[LayerMetrics]:
        """The figures of every layer over one stratum, in one t-bin or in all."""
        n = int(self._pooled(self.n_rows[None], stratum, t_bin)[0])
        # All that is left of groups is the layer and what was summed.
        targets, errors, target_squares, error_squares, cosines, active = (
            self._pooled(sums, stratum, t_bin)
            for sums in (
                self._targets,
                self._errors,
                self._target_squares,
                self._error_squares,
                self._cosines,
                self._active,
            )
        )
        if n == 0:
            return [_without_rows()] * targets.shape[0]
        variance = (target_squares - targets.square() / n) / n
        error_variance = (error_squares - errors.square() / n) / n
        mean_square = error_squares / n
        # In units of the store's variance, as the transcoder normalises it.
        unit = self.outputs.scale.cpu().square()
        fvu = fvu_of(
            mean_square.mean(1) * unit,
            (target_squares / n).mean(1) * unit,
            targets / n * unit.sqrt()[:, None],
        )
        found = []
        for layer in range(targets.shape[0]):
            reason = _why_undefined(
                n, float(variance[layer].mean() * unit[layer]), float(mean_square[layer].sum())
            )
            varied = variance[layer].clone()
            if reason is not None:
                varied[:] = torch.nan
            counted = ~(varied < LEAST_DIMENSION_VARIANCE * varied.mean())
            by_dimension = 1 - error_variance[layer][counted] / varied[counted]
            density = (active[layer] / n).numpy()
            found.append(
                LayerMetrics(
                    n_rows=n,
                    fvu=float(fvu[layer]) if reason is None else float("nan"),
                    nmse=float(mean_square[layer].mean() * unit[layer]),
                    explained_variance=float(1 - error_variance[layer].sum() / varied.sum()),
                    explained_variance_by_dimension=float(by_dimension.mean()),
                    dimensions_left_out=None if reason is not None else int((~counted).sum()),
                    cosine=float(cosines[layer] / n),
                    l0=float(active[layer].sum() / n),
                    dead=int((active[layer] == 0).sum()),
                    dense=float((density > DENSE).mean()),
                    density_histogram=_histogram(density),
                    undefined=reason,
                )
            )
        return found

    def density(self, stratum: str = "all") -> NDArray[np.float64]:
        """Share of the rows in which each feature is active [layer feature]; nan without rows."""
        rows = self._pooled(self.n_rows[None], stratum, None)
        return np.asarray((self._pooled(self._active, stratum, None) / rows).numpy())

    def _pooled(self, sums: Tensor, stratum: str, t_bin: int | None) -> Tensor:
        bins = slice(None) if t_bin is None else slice(t_bin, t_bin + 1)
        return sums[:, _GROUPS_OF[stratum], bins].sum((1, 2))


def fvu_of(
    square: Float64[Tensor, " layer"],
    target_square: Float64[Tensor, " layer"],
    target_mean: Float64[Tensor, "layer d_model"],
) -> Float64[Tensor, " layer"]:
    """Fraction of variance unexplained: mean squared error over the variance of the same rows about their mean.

    That mean is what the best constant would predict, whose FVU is 1. It is the one definition, for the batches of
    training and for rows held out.

    Args:
        square: Mean over rows and dimensions of the squared error, in normalised units, as all of these.
        target_square: Mean over rows and dimensions of the squared target.
        target_mean: Mean row of the targets.
    Returns:
        nan where the rows' variance is below `LEAST_VARIANCE`.
    """
    variance = target_square - target_mean.square().mean(1)
    return torch.where(variance >= LEAST_VARIANCE, square / variance, torch.nan)


def t_bin_of(t: Float64[Tensor, " seq"], t_bins: int) -> Int64[Tensor, " seq"]:
    """The part of [0, 1] that each time is in; 1 is in the last.

    >>> t_bin_of(torch.tensor([0.0, 0.1, 0.55, 1.0], dtype=torch.float64), 10).tolist()
    [0, 1, 5, 9]
    """
    return (t * t_bins).long().clamp(max=t_bins - 1)


def _histogram(density: NDArray[np.float64]) -> tuple[int, ...]:
    """Counts of those above zero in (edge, next edge]."""
    numbers = np.searchsorted(DENSITY_EDGES, density[density > 0], side="left") - 1
    return tuple(np.bincount(numbers, minlength=len(DENSITY_EDGES) - 1).tolist())


def _without_rows() -> LayerMetrics:
    nan = float("nan")
    return LayerMetrics(
        n_rows=0,
        fvu=nan,
        nmse=nan,
        explained_variance=nan,
        explained_variance_by_dimension=nan,
        dimensions_left_out=None,
        cosine=nan,
        l0=nan,
        dead=None,
        dense=nan,
        density_histogram=None,
        undefined="there are no such positions",
    )


def _why_undefined(n_rows: int, variance: float, square: float) -> str | None:
    """Why a share of this variance, in units of the store's, is no figure; None if it is one."""
    if not np.isfinite([variance, square]).all():
        return "the targets or their reconstruction are not finite"
    if variance >= LEAST_VARIANCE:
        return None
    return (
        f"the MLP outputs at these {n_rows} positions hardly vary: by {max(variance, 0.0):.1e} of the "
        f"variance over the store, less than {LEAST_VARIANCE:g}"
    )
