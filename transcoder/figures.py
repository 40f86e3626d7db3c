"""What the plots share: figures without a display, panels, colours, the axis of t, and marks for what has no value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transcoder.eval_tables import UNDEFINED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
"""Behind what is written where lines may lie."""
MOST_LINES = 2
"""Values that are written above each other."""
COLOURS = {"all": "#333333", "unmasked": "#4477aa", "masked": "#ee6677"}


def new_figure() -> tuple[Figure, Any]:
    """A figure with one panel, that needs no display and that no global state holds on to."""
    figure, grid = grid_of((8.0, 5.0), 1, 1)
    return figure, panel(figure, grid[0, 0])


def panel(figure: Figure, place: Any, **shared: Any) -> Any:
    """A panel with light horizontal lines."""
    axes = figure.add_subplot(place, **shared)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return axes


def grid_of(size: tuple[float, float], rows: int, columns: int) -> tuple[Figure, Any]:
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


def drawable(values: Iterable[float]) -> list[float]:
    """Values without infinities, of which matplotlib would make its limits."""
    return [value if math.isfinite(value) else math.nan for value in values]


def mark_undefined(axes: Any, places: Iterable[float], values: Iterable[float]) -> None:
    """Write where a bar is missing that it is not a bar of height zero."""
    for place, value in zip(places, values, strict=True):
        if not math.isfinite(value):
            write_at_bottom(axes, place, UNDEFINED)


def mark_gaps(axes: Any, places: Iterable[float], values: Iterable[Sequence[float]]) -> None:
    """Write where points are missing how many of them are."""
    for place, found in zip(places, values, strict=True):
        missing = sum(not math.isfinite(value) for value in found)
        if missing:
            write_at_bottom(
                axes, place, UNDEFINED if missing == len(found) else f"{missing} of {len(found)} {UNDEFINED}"
            )


def within(values: Iterable[float], end: float) -> list[float]:
    """Values as they are drawn on an axis that ends there; those without one stay so."""
    return [value if math.isnan(value) else min(value, end) for value in values]


def write_cut_bars(axes: Any, places: Iterable[float], values: Iterable[float], end: float) -> None:
    """Write above bars that end with the axis how long they are, upwards, as there is no room to the sides."""
    for place, value in zip(places, values, strict=True):
        if value > end:
            # Turned, this arrow points up.
            _write_above(axes, place, end, f"{value:.3g} →", rotation=90)


def write_cut_points(
    axes: Any, places: Iterable[float], values: Iterable[Sequence[float]], end: float
) -> None:
    """Write above the points that lie on the end of an axis where they belong, once for all at one place."""
    for place, found in zip(places, values, strict=True):
        above = sorted(value for value in found if value > end and math.isfinite(value))
        if not above:
            continue
        text = "\n".join(f"↑ {value:.3g}" for value in reversed(above))
        if len(above) > MOST_LINES:
            text = f"{len(above)} up\nto {above[-1]:.3g}"
        _write_above(axes, place, end, text)


def _write_above(axes: Any, place: float, height: float, text: str, rotation: int = 0) -> None:
    axes.annotate(
        text,
        (place, height),
        xytext=(0, 5),
        textcoords="offset points",
        rotation=rotation,
        ha="center",
        va="bottom",
        fontsize=8,
        bbox=ON_WHITE,
    )


def write_at_bottom(axes: Any, place: float, text: str) -> None:
    at_bottom = axes.get_xaxis_transform()  # data along x, part of the height along y
    axes.text(
        place,
        0.02,
        text,
        transform=at_bottom,
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=7,
        bbox=ON_WHITE,
        zorder=3,
    )


def middles(t_bins: int) -> list[float]:
    """The middle of each of equal parts of [0, 1] in t."""
    return [(t_bin + 0.5) / t_bins for t_bin in range(t_bins)]


def t_axis(axes: Any, t_bins: int) -> None:
    """The axis of t, with a tick at each edge of its parts."""
    edges = np.linspace(0, 1, t_bins + 1)
    axes.set_xticks(edges, [f"{edge:.1f}" for edge in edges])
    axes.set_xlim(0, 1)
    axes.set_xlabel("t (expected share of masked tokens)")


def which(n_excluded: int | None) -> str:
    """What the positions of an evaluation are called."""
    return "the given" if n_excluded is None else "held-out"
