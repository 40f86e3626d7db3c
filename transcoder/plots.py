"""The plots of an evaluation.

fvu.png (reconstruction by layer), nelbo.png (what each replacement costs the model), density.png (how often
features are active) and training.png. A bar that has no value is marked, not left out.
"""

# Axes: layer, feature

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transcoder.evaluation import MEAN, ORIGINAL, REPLACED, ZERO, Evaluation
from transcoder.metrics import STRATA, LayerMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
UNDEFINED = "undefined"
COLOURS = {"all": "#333333", "unmasked": "#4477aa", "masked": "#ee6677"}


def plot_fvu(evaluation: Evaluation) -> Figure:
    """Fraction of variance unexplained by layer and stratum."""
    return draw_fvu(evaluation.layers, f"Reconstruction of MLP outputs on {_which(evaluation)} positions")


def draw_fvu(layers: Mapping[str, Sequence[LayerMetrics]], title: str) -> Figure:
    """The same of anything that was measured by stratum and layer."""
    figure, axes = new_figure()
    numbers = np.arange(len(layers["all"]))
    for offset, stratum in enumerate(STRATA):
        values = _drawable(layer.fvu for layer in layers[stratum])
        places = numbers + 0.27 * (offset - 1)
        axes.bar(places, values, 0.25, label=stratum, color=COLOURS[stratum])
        mark_undefined(axes, places, values)
    axes.set_xticks(numbers)
    axes.set_xlabel("layer")
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title(title)
    axes.legend(title="positions")
    return figure


def plot_nelbo(evaluation: Evaluation) -> Figure:
    """Change of the bound by layer, replaced and zeroed, and for all layers together."""
    figure, axes = new_figure()
    original = evaluation.conditions[ORIGINAL].nelbo
    names = [*map(str, range(len(evaluation.replaced_alone))), "all"]
    for offset, (label, alone, together, colour) in enumerate(
        [
            ("replaced by the transcoder", evaluation.replaced_alone, REPLACED, "#228833"),
            ("ablated to zero", evaluation.zero_alone, ZERO, "#ccbb44"),
        ]
    ):
        values = _drawable(score.nelbo - original for score in [*alone, evaluation.conditions[together]])
        places = np.arange(len(names)) + 0.4 * offset - 0.2
        axes.bar(places, values, 0.38, label=label, color=colour)
        mark_undefined(axes, places, values)
    (mean,) = _drawable([evaluation.delta_nelbo(MEAN)])
    axes.plot(
        [len(names) - 1.4, len(names) - 0.6], [mean, mean], color="#aa3377", label="all ablated to the mean"
    )
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)  # also where no bar is
    axes.set_yscale("symlog", linthresh=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.5)  # the legend's place
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("MLP of layer")
    axes.set_ylabel("increase of the NELBO (nats per token)")
    axes.set_title("What replacing MLPs costs the model")
    axes.legend()
    return figure


def _which(evaluation: Evaluation) -> str:
    return "the given" if evaluation.n_excluded is None else "held-out"


def _drawable(values: Iterable[float]) -> list[float]:
    """Values without infinities, of which matplotlib would make its limits."""
    return [value if math.isfinite(value) else math.nan for value in values]


def mark_undefined(axes: Any, places: Iterable[float], values: Iterable[float]) -> None:
    """Write where a bar is missing that it is not a bar of height zero."""
    for place, value in zip(places, values, strict=True):
        if not math.isfinite(value):
            at_bottom = axes.get_xaxis_transform()  # data along x, part of the height along y
            axes.text(
                place, 0.02, UNDEFINED, transform=at_bottom, rotation=90, ha="center", va="bottom", fontsize=7
            )


def plot_density(evaluation: Evaluation) -> Figure:
    """Histogram of how often features are active, by layer."""
    title = f"Feature density on {_which(evaluation)} positions"
    return draw_density(evaluation.density, evaluation.n_positions, title)


def draw_density(density: NDArray[np.float64], n_rows: int, title: str) -> Figure:
    """The same of shares of rows [layer feature]."""
    figure, axes = new_figure()
    edges = np.linspace(math.log10(1.0 / max(1, n_rows)), 0.0, 31)
    n_layers = density.shape[0]
    for layer, share in enumerate(density):
        alive = share[share > 0]
        label = f"layer {layer} ({len(share) - len(alive)} dead)"
        colour = layer_colour(layer, n_layers)
        axes.hist(np.log10(alive), edges, histtype="step", label=label, color=colour, linewidth=1.4)
    axes.set_xlabel("log10 of the share of positions at which a feature is active")
    axes.set_ylabel("features")
    axes.set_title(title)
    axes.legend(fontsize="small", ncols=1 + n_layers // 9)
    return figure


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
    """A figure that needs no display and that no global state holds on to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def layer_colour(layer: int, n_layers: int) -> Any:
    """The colour of a layer in every plot that has them all."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * layer / max(1, n_layers - 1))
