"""fvu.png and density.png: reconstruction by layer and by t, and how often features are active.

What has no value is marked, not left out.
"""

# Axes: layer, feature, t_bin

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transcoder.eval_tables import UNDEFINED
from transcoder.evaluation import Evaluation
from transcoder.figures import (
    COLOURS,
    drawable,
    grid_of,
    layer_colour,
    mark_gaps,
    mark_undefined,
    middles,
    new_figure,
    panel,
    t_axis,
    which,
    within,
    write_cut_bars,
    write_cut_points,
)
from transcoder.metrics import DENSE, STRATA, LayerMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FVU_END = 1.5
"""The mean alone has FVU 1. What is above this end of the axis, if not most is, would hide all the other values."""


def plot_fvu(evaluation: Evaluation) -> Figure:
    """Fraction of variance unexplained: by layer and stratum, and by t for the strata."""
    figure, grid = grid_of((10.0, 8.0), 2, 2)
    top = panel(figure, grid[0, :])
    _fvu_bars(top, evaluation.layers)
    top.set_title(f"Reconstruction of MLP outputs on {which(evaluation.n_excluded)} positions")
    first = None
    by_t = [layer.fvu for stratum in evaluation.layers_by_t.values() for bins in stratum for layer in bins]
    end = _end(by_t)
    for column, stratum in enumerate(("unmasked", "masked")):
        axes = panel(figure, grid[1, column], sharey=first)
        first = first or axes
        for layer in range(evaluation.n_layers):
            values = drawable(layers[layer].fvu for layers in evaluation.layers_by_t[stratum])
            colour = layer_colour(layer, evaluation.n_layers)
            places = middles(evaluation.t_bins)
            axes.plot(places, within(values, end), "o-", color=colour, label=f"layer {layer}")
        found = [[layer.fvu for layer in layers] for layers in evaluation.layers_by_t[stratum]]
        mark_gaps(axes, middles(evaluation.t_bins), found)
        write_cut_points(axes, middles(evaluation.t_bins), found, end)
        t_axis(axes, evaluation.t_bins)
        axes.set_title(f"{stratum} positions, by t")
        if column == 0:
            axes.set_ylabel("fraction of variance unexplained")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False
            )
    assert first is not None
    # After both panels, whose common scale it fixes; with room for what is written above the end.
    first.set_ylim(0, 1.15 * end if math.isfinite(end) else None)
    return figure


def draw_fvu(layers: Mapping[str, Sequence[LayerMetrics]], title: str) -> Figure:
    """The bars by layer alone, of anything that was measured by stratum and layer."""
    figure, axes = new_figure()
    _fvu_bars(axes, layers)
    axes.set_title(title)
    return figure


def _fvu_bars(axes: Any, layers: Mapping[str, Sequence[LayerMetrics]]) -> None:
    numbers = np.arange(len(layers["all"]))
    end = _end([layer.fvu for stratum in STRATA for layer in layers[stratum]])
    for offset, stratum in enumerate(STRATA):
        values = drawable(layer.fvu for layer in layers[stratum])
        places = numbers + 0.27 * (offset - 1)
        label = f"{stratum} positions"
        axes.bar(places, within(values, end), 0.25, label=label, color=COLOURS[stratum])
        write_cut_bars(axes, places, values, end)
        mark_undefined(axes, places, values)
    axes.set_xticks(numbers)
    axes.set_xlabel("layer")
    axes.set_ylabel("fraction of variance unexplained")
    # The legend's place, and under it that of what is written above the end.
    axes.set_ylim(0, (1.15 if math.isinf(end) else 1.25) * axes.get_ylim()[1])
    axes.legend(ncols=3, loc="upper right", frameon=False)


def _end(fvus: Sequence[float]) -> float:
    """Where an axis of these ends; infinity for where the largest is."""
    known = [value for value in fvus if math.isfinite(value)]
    return FVU_END if known and max(known) > FVU_END >= float(np.median(known)) else math.inf


def plot_density(evaluation: Evaluation) -> Figure:
    """Histogram of how often features are active, by layer, at unmasked and at masked positions."""
    figure, grid = grid_of((11.0, 5.0), 1, 2)
    n_rows = {"masked": evaluation.n_masked, "unmasked": evaluation.n_positions - evaluation.n_masked}
    first = None
    for column, stratum in enumerate(("unmasked", "masked")):
        axes = panel(figure, grid[0, column], sharey=first)
        first = first or axes
        if n_rows[stratum] == 0:
            axes.text(0.5, 0.5, UNDEFINED, transform=axes.transAxes, ha="center")
        else:
            _density_steps(axes, evaluation.density[stratum], n_rows[stratum])
        which = "" if evaluation.n_excluded is None else "held-out "
        axes.set_title(
            f"Feature density on {n_rows[stratum]:,} {which}{stratum} positions", fontsize="medium"
        )
        axes.set_ylabel("features" if column == 0 else "")
    assert first is not None
    first.set_ylim(bottom=0)
    return figure


def draw_density(density: NDArray[np.float64], n_rows: int, title: str) -> Figure:
    """The same of shares of rows [layer feature] in one panel."""
    figure, axes = new_figure()
    _density_steps(axes, density, n_rows)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("features")
    axes.set_title(title)
    return figure


def _density_steps(axes: Any, density: NDArray[np.float64], n_rows: int) -> None:
    # The report's quarters of a decade, from the one that a single row is in.
    first = math.ceil(-4 * math.log10(max(2, n_rows))) - 1
    edges = np.arange(first, 1) / 4
    n_layers = density.shape[0]
    for layer, share in enumerate(density):
        alive = share[share > 0]
        label = f"layer {layer} ({len(share) - len(alive)} dead)"
        numbers = np.searchsorted(edges, np.log10(alive)) - 1
        counts = np.bincount(numbers, minlength=len(edges) - 1)
        axes.stairs(counts, edges, label=label, color=layer_colour(layer, n_layers), linewidth=1.4)
    axes.axvline(math.log10(DENSE), color="#888888", linestyle="--", linewidth=0.9)
    along = axes.get_xaxis_transform()  # data along x, part of the height along y
    axes.text(math.log10(DENSE), 0.98, " dense", transform=along, va="top", fontsize=8, color="#666666")
    axes.set_xlabel("log10 of the share of positions at which a feature is active")
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
