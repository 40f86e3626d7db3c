"""The plots of an evaluation.

fvu.png (reconstruction by layer, and by t), nelbo.png (what each replacement costs the model, by layer and by t),
density.png (how often features are active) and training.png. What has no value is marked, not left out.
"""

# Axes: layer, feature, t_bin

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transcoder.eval_passes import KINDS
from transcoder.eval_scores import REPLACED, Condition, Estimate, Kind
from transcoder.eval_tables import UNDEFINED
from transcoder.evaluation import Evaluation
from transcoder.metrics import DENSE, STRATA, LayerMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
COLOURS = {"all": "#333333", "unmasked": "#4477aa", "masked": "#ee6677"}
KIND_COLOURS: dict[Kind, str] = {"replaced": "#228833", "zero": "#ccbb44", "mean": "#aa3377"}
KIND_LABELS: dict[Kind, str] = {
    "replaced": "replaced by the transcoder",
    "zero": "ablated to zero",
    "mean": "ablated to the mean",
}
LINEAR_BELOW = 0.01
"""Nats per token under which the logarithmic axis of costs is linear, as they may be below zero."""


def plot_fvu(evaluation: Evaluation) -> Figure:
    """Fraction of variance unexplained: by layer and stratum, and by t for the strata."""
    figure, grid = _new_figure((10.0, 8.0), 2, 2)
    top = _panel(figure, grid[0, :])
    _fvu_bars(top, evaluation.layers)
    top.set_title(f"Reconstruction of MLP outputs on {_which(evaluation)} positions")
    first = None
    for column, stratum in enumerate(("unmasked", "masked")):
        axes = _panel(figure, grid[1, column], sharey=first)
        first = first or axes
        for layer in range(evaluation.n_layers):
            values = [layers[layer].fvu for layers in evaluation.layers_by_t[stratum]]
            colour = layer_colour(layer, evaluation.n_layers)
            axes.plot(_middles(evaluation), _drawable(values), "o-", color=colour, label=f"layer {layer}")
        gaps = [[layer.fvu for layer in layers] for layers in evaluation.layers_by_t[stratum]]
        _mark_gaps(axes, _middles(evaluation), gaps)
        _t_axis(axes, evaluation)
        axes.set_title(f"{stratum} positions, by t")
        if column == 0:
            axes.set_ylabel("fraction of variance unexplained")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False
            )
    assert first is not None
    first.set_ylim(bottom=0)  # after both panels, whose common scale it fixes
    return figure


def draw_fvu(layers: Mapping[str, Sequence[LayerMetrics]], title: str) -> Figure:
    """The bars by layer alone, of anything that was measured by stratum and layer."""
    figure, axes = new_figure()
    _fvu_bars(axes, layers)
    axes.set_title(title)
    return figure


def _fvu_bars(axes: Any, layers: Mapping[str, Sequence[LayerMetrics]]) -> None:
    numbers = np.arange(len(layers["all"]))
    for offset, stratum in enumerate(STRATA):
        values = _drawable(layer.fvu for layer in layers[stratum])
        places = numbers + 0.27 * (offset - 1)
        axes.bar(places, values, 0.25, label=f"{stratum} positions", color=COLOURS[stratum])
        mark_undefined(axes, places, values)
    axes.set_xticks(numbers)
    axes.set_xlabel("layer")
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # the legend's place
    axes.legend(ncols=3, loc="upper right", frameon=False)


def plot_nelbo(evaluation: Evaluation) -> Figure:
    """What replacing and ablating costs: the bound and top-1 agreement by layer, the bound and KL by t."""
    figure, grid = _new_figure((12.0, 8.5), 2, 2)
    cost, agreement, by_t, kl = (_panel(figure, grid[row, column]) for row in (0, 1) for column in (0, 1))
    scores, bins = evaluation.scores, range(evaluation.t_bins)
    columns = [*range(evaluation.n_layers), None]
    for offset, kind in enumerate(KINDS):
        names = [Condition(kind, layer) for layer in columns]
        places = np.arange(len(names)) + 0.27 * (offset - 1)
        _bars(cost, places, [scores.delta_nelbo(name) for name in names], kind)
        _bars(agreement, places, [scores.top1_agreement(name) for name in names], kind)
        _line(by_t, evaluation, [scores.delta_nelbo(Condition(kind), t_bin) for t_bin in bins], kind)
        _line(kl, evaluation, [scores.kl(Condition(kind), t_bin) for t_bin in bins], kind)
        raw = [scores.raw_kl(Condition(kind), t_bin) for t_bin in bins]
        _line(kl, evaluation, raw, kind, style="o:")
    _mark_gaps(by_t, _middles(evaluation), [[scores.delta_nelbo(REPLACED, t_bin).value] for t_bin in bins])
    both = [[scores.kl(REPLACED, t_bin).value, scores.raw_kl(REPLACED, t_bin).value] for t_bin in bins]
    _mark_gaps(kl, _middles(evaluation), both)
    for axes in (cost, agreement):
        axes.set_xticks(
            np.arange(len(columns)), ["all" if layer is None else str(layer) for layer in columns]
        )
        axes.set_xlim(-0.6, len(columns) - 0.4)  # also where no bar is
        axes.set_xlabel("MLP of layer")
    for axes in (cost, by_t):
        _cost_axis(axes, "increase of the NELBO (nats per token)")
    kl.set_yscale("log")
    kl.yaxis.set_major_formatter("{x:g}")
    kl.set_ylabel("KL from the original (nats per position)")
    agreement.set_ylim(0, 1)
    agreement.set_ylabel("top-1 agreement, masked positions")
    for axes in (by_t, kl):
        _t_axis(axes, evaluation)
    cost.set_title("What replacing MLPs costs the model")
    agreement.set_title("How often its first choice stays")
    by_t.set_title("Cost with all MLPs changed, by t")
    kl.set_title("KL with all MLPs changed, by t")
    handles, labels = cost.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    kinds = [kl.plot([], [], style, color="#444444", markersize=4)[0] for style in ("o-", "o:")]
    kinds[1].set_markerfacecolor("white")
    kl.legend(kinds, ["masked positions", "unmasked, before SUBS"], fontsize="small")
    return figure


def _bars(axes: Any, places: NDArray[Any], found: Sequence[Estimate], kind: Kind) -> None:
    values = _drawable(estimate.value for estimate in found)
    errors = np.nan_to_num(_drawable(estimate.se for estimate in found))
    axes.bar(
        places,
        values,
        0.25,
        yerr=errors,
        color=KIND_COLOURS[kind],
        label=KIND_LABELS[kind],
        error_kw={"elinewidth": 0.9, "ecolor": "#444444"},
    )
    mark_undefined(axes, places, values)


def _line(
    axes: Any,
    evaluation: Evaluation,
    found: Sequence[Estimate],
    kind: Kind,
    *,
    style: str = "o-",
) -> None:
    values = _drawable(estimate.value for estimate in found)
    errors = np.nan_to_num(_drawable(estimate.se for estimate in found))
    # Not on top of one another where the values are alike.
    places = np.array(_middles(evaluation)) + {"replaced": -0.008, "mean": 0.008}.get(kind, 0.0)
    axes.errorbar(
        places,
        values,
        errors,
        fmt=style,
        color=KIND_COLOURS[kind],
        markersize=4,
        markerfacecolor="white" if ":" in style else KIND_COLOURS[kind],
        elinewidth=0.9,
        capsize=2,
    )


def _cost_axis(axes: Any, label: str) -> None:
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(label)


def _middles(evaluation: Evaluation) -> list[float]:
    return [(t_bin + 0.5) / evaluation.t_bins for t_bin in range(evaluation.t_bins)]


def _t_axis(axes: Any, evaluation: Evaluation) -> None:
    edges = np.linspace(0, 1, evaluation.t_bins + 1)
    axes.set_xticks(edges, [f"{edge:.1f}" for edge in edges])
    axes.set_xlim(0, 1)
    axes.set_xlabel("t (expected share of masked tokens)")


def _which(evaluation: Evaluation) -> str:
    return "the given" if evaluation.n_excluded is None else "held-out"


def _drawable(values: Iterable[float]) -> list[float]:
    """Values without infinities, of which matplotlib would make its limits."""
    return [value if math.isfinite(value) else math.nan for value in values]


def mark_undefined(axes: Any, places: Iterable[float], values: Iterable[float]) -> None:
    """Write where a bar is missing that it is not a bar of height zero."""
    for place, value in zip(places, values, strict=True):
        if not math.isfinite(value):
            _write_at_bottom(axes, place, UNDEFINED)


def _mark_gaps(axes: Any, places: Iterable[float], values: Iterable[Sequence[float]]) -> None:
    """Write where points are missing how many of them are."""
    for place, found in zip(places, values, strict=True):
        missing = sum(not math.isfinite(value) for value in found)
        if missing:
            _write_at_bottom(
                axes, place, UNDEFINED if missing == len(found) else f"{missing} of {len(found)} {UNDEFINED}"
            )


def _write_at_bottom(axes: Any, place: float, text: str) -> None:
    at_bottom = axes.get_xaxis_transform()  # data along x, part of the height along y
    axes.text(place, 0.02, text, transform=at_bottom, rotation=90, ha="center", va="bottom", fontsize=7)


def plot_density(evaluation: Evaluation) -> Figure:
    """Histogram of how often features are active, by layer, at unmasked and at masked positions."""
    figure, grid = _new_figure((11.0, 5.0), 1, 2)
    n_rows = {"masked": evaluation.n_masked, "unmasked": evaluation.n_positions - evaluation.n_masked}
    first = None
    for column, stratum in enumerate(("unmasked", "masked")):
        axes = _panel(figure, grid[0, column], sharey=first)
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


def plot_training(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Unexplained variance and dead features over the training run."""
    figure, axes = new_figure()
    rows = [entry["rows"] for entry in log]
    n_layers = len(log[0]["fvu_by_layer"])
    for layer in range(n_layers):
        values = [entry["fvu_by_layer"][layer] for entry in log]
        colour = layer_colour(layer, n_layers)
        axes.plot(rows, values, label=f"layer {layer}", color=colour, linewidth=1.0)
    axes.plot(rows, [entry["fvu"] for entry in log], color="black", linewidth=2.0, label="mean")
    axes.set_yscale("log")
    axes.set_xlabel("training rows (tokens)")
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("Training: reconstruction of the batches, and dead features")
    axes.legend(fontsize="small", ncols=1 + n_layers // 9)
    right = axes.twinx()
    right.plot(rows, [entry["dead"] for entry in log], color="#bbbbbb", linestyle="--")
    right.set_ylabel("dead features, all layers (dashed)")
    right.set_ylim(bottom=0)
    return figure


def new_figure() -> tuple[Figure, Any]:
    """A figure with one panel, that needs no display and that no global state holds on to."""
    figure, grid = _new_figure((8.0, 5.0), 1, 1)
    return figure, _panel(figure, grid[0, 0])


def _panel(figure: Figure, place: Any, **shared: Any) -> Any:
    """A panel with light horizontal lines."""
    axes = figure.add_subplot(place, **shared)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return axes


def _new_figure(size: tuple[float, float], rows: int, columns: int) -> tuple[Figure, Any]:
    """A figure to add panels to, and their grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_gridspec(rows, columns)


def layer_colour(layer: int, n_layers: int) -> Any:
    """The colour of a layer in every plot that has them all."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * layer / max(1, n_layers - 1))
