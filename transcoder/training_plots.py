"""training.png and l0.png: FVU, dead features and active features over the training rows."""

# Axes: layer

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transcoder.eval_tables import UNDEFINED
from transcoder.figures import layer_colour, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAT = 0.01
"""Part of k by which an L0 may differ and be called k."""


def plot_training(log: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU of the batches and dead features over the training run; where no batch has an FVU, that is written."""
    figure, axes = new_figure()
    rows = [entry["rows"] for entry in log]
    n_layers = len(log[0]["fvu_by_layer"])
    for layer in range(n_layers):
        values = _defined(entry["fvu_by_layer"][layer] for entry in log)
        colour = layer_colour(layer, n_layers)
        axes.plot(rows, values, label=f"layer {layer}", color=colour, linewidth=1.0)
    means = _defined(entry["fvu"] for entry in log)
    axes.plot(rows, means, color="black", linewidth=2.0, label="mean")
    axes.set_yscale("log")
    axes.set_xlabel("training rows (tokens)")
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("Training: reconstruction of the batches, and dead features")
    if not np.isfinite(means).any():
        axes.text(0.5, 0.5, UNDEFINED, transform=axes.transAxes, ha="center")
    # Beside the panel, since lines may be anywhere in it.
    figure.legend(loc="outside right upper", fontsize="small", ncols=1 + n_layers // 9)
    right = axes.twinx()
    right.plot(rows, [entry["dead"] for entry in log], color="#bbbbbb", linestyle="--")
    right.set_ylabel("dead features, all layers (dashed)")
    right.set_ylim(bottom=0)
    return figure


def _defined(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def draw_l0(log: Sequence[Mapping[str, Any]], k: int | None = None) -> Figure:
    """Active features per row of each layer over the training run.

    Args:
        k: Features that the activation keeps; none if it does not select. Where L0 is k throughout, that is written,
            as it says nothing of the training.
    """
    figure, axes = new_figure()
    rows = [entry["rows"] for entry in log]
    by_layer = np.array([entry["l0_by_layer"] for entry in log])
    for layer, values in enumerate(by_layer.T):
        axes.plot(
            rows, values, label=f"layer {layer}", color=layer_colour(layer, by_layer.shape[1]), linewidth=1.0
        )
    axes.plot(rows, by_layer.mean(1), color="black", linewidth=2.0, label="mean")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_xlabel("training rows (tokens)")
    axes.set_ylabel("active features per row")
    axes.set_title("Training: L0 of the batches")
    if k is not None and bool((np.abs(by_layer - k) <= FLAT * k).all()):
        note = f"flat by design: the activation keeps the k = {k} largest"
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color="#666666")
    figure.legend(loc="outside right upper", fontsize="small", ncols=1 + by_layer.shape[1] // 9)
    return figure
