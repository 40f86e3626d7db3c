"""Figures of what happens along a trajectory. Each function makes one, without a display; `save` writes it as a PNG."""

# Axes: step, depth, batch, pos, layer, head

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdlm_interp.analysis.attribution import LogitAttribution
from mdlm_interp.analysis.lens import LogitLens
from mdlm_interp.analysis.replay import chosen
from mdlm_interp.analysis.sinks import Sinks
from mdlm_interp.analysis.stability import Stability
from mdlm_interp.analysis.time_probe import TimeProbe
from mdlm_interp.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
SHOWN_STEPS = 4
"""States of a sequence in the lens's heat maps."""
GIVEN, OPEN, RIGHT, DONE = range(4)
"""Cells of the stability figure."""


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG, whole or not at all."""
    target = Path(path)
    with replacing(target) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, format="png")
    return target


def tick_texts(texts: Sequence[str]) -> list[str]:
    """Tokens in quotes, so that a space or a tab is seen, and so that matplotlib takes no dollar for mathematics.

    >>> tick_texts([" cat", "$"])
    ["' cat'", "'\\\\$'"]
    """
    return [repr(text).replace("$", r"\$") for text in texts]


def lens_by_commit(lens: LogitLens) -> Figure:
    """How likely each depth makes the final token, over the steps before a position is committed.

    Few positions are observed long before their commit: the left end is noisy, and of late commits only.
    """
    found = lens.summary()
    figure, (left, right) = _panels(1, 2, (11.0, 4.2))
    for d, depth in enumerate(lens.depths):
        rows = [row for row in found if row["depth"] == depth]
        times, colour = [row["to_commit"] for row in rows], _shade(d, len(lens.depths))
        left.plot(times, [row["probability"] for row in rows], color=colour, label=depth)
        right.plot(times, [row["is_top"] for row in rows], color=colour)
    left.set_title("Mean probability of the token that is committed", fontsize=10)
    right.set_title("Share of positions where it is the likeliest", fontsize=10)
    for axes in (left, right):
        axes.set(xlabel="step relative to the commit", ylim=(0, None))
    figure.legend(frameon=False, fontsize=8, ncols=len(lens.depths), loc="outside lower center")
    return figure


def lens_heat_maps(
    lens: LogitLens, row: int = 0, labels: Sequence[str] | None = None, steps: Sequence[int] | None = None
) -> Figure:
    """Probability of the final token by depth and position in a few states of one sequence; given tokens are grey.

    Args:
        row: Number within `lens.rows`.
        labels: Texts of the final tokens; their numbers if none.
        steps: Numbers within `lens.steps`; a few that are evenly spread if none.
    """
    chosen("row", [row], len(lens.rows))
    spread = torch.linspace(0, len(lens.steps) - 1, min(SHOWN_STEPS, len(lens.steps))).long().tolist()
    shown = chosen("steps", spread if steps is None else steps, len(lens.steps))
    width = 2.0 + 0.28 * len(lens.positions)
    figure, panels = _panels(len(shown), 1, (width, 1.0 + 1.55 * len(shown)))
    image: Any = None
    for axes, step in zip(panels, shown, strict=True):
        values = lens.probability[step, :, row]
        masked = lens.is_masked[step, row].expand(values.shape)
        image = axes.imshow(
            torch.where(masked, values, torch.nan).numpy(),
            cmap=_colours("viridis"),
            vmin=0,
            vmax=1,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        axes.set_yticks(range(len(lens.depths)), lens.depths, fontsize=7)
        axes.set_title(f"before step {lens.steps[step]}", fontsize=9)
        axes.set_xticks([])
    names = [str(token) for token in lens.token[row].tolist()] if labels is None else tick_texts(labels)
    panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    figure.colorbar(image, ax=panels, label="probability of the token below", shrink=0.6)
    return figure


def attribution_bars(attribution: LogitAttribution) -> Figure:
    """Mean contribution of each component over places, with the spread between them."""
    found = attribution.summary()
    figure, (axes,) = _panels(1, 1, (max(6.0, 1.5 + 0.28 * len(found)), 4.2))
    axes.bar(
        range(len(found)),
        [row["mean"] for row in found],
        yerr=[row["std"] for row in found],
        color=[_component_colour(row["component"]) for row in found],
        error_kw={"elinewidth": 0.8, "ecolor": "0.4"},
    )
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(found)), [row["component"] for row in found], rotation=90, fontsize=7)
    relative = " minus the mean over the vocabulary" if attribution.against == "mean" else ""
    axes.set_ylabel(f"logit{relative}")
    axes.set_title(
        f"Direct contributions to {len(attribution.token)} tokens (bars: mean, lines: std)", fontsize=10
    )
    return figure


def stability_map(stability: Stability, row: int = 0, labels: Sequence[str] | None = None) -> Figure:
    """For one sequence, when each position's likeliest token is the one committed in the end.

    Args:
        row: Number within `stability.rows`.
        labels: Texts of the final tokens; their numbers if none.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    chosen("row", [row], len(stability.rows))
    is_open, agrees = stability.is_open[:, row], stability.agrees[:, row]
    cells = torch.full(is_open.shape, DONE)
    cells[:, stability.commit[row] < 0] = GIVEN
    cells[is_open], cells[agrees] = OPEN, RIGHT
    names = [str(token) for token in stability.final[row].tolist()] if labels is None else tick_texts(labels)
    colours = {GIVEN: "0.82", OPEN: "#f2d5b8", RIGHT: "#4477aa", DONE: "white"}
    figure, (axes,) = _panels(1, 1, (2.0 + 0.24 * len(names), 1.8 + 0.1 * len(cells)))
    axes.imshow(
        cells.numpy(),
        cmap=ListedColormap(list(colours.values())),
        vmin=GIVEN,
        vmax=DONE,
        aspect="auto",
        interpolation="nearest",
    )
    filled = (stability.commit[row] >= 0).nonzero()[:, 0]
    commits = stability.commit[row][filled]
    axes.scatter(filled.numpy(), commits.numpy(), marker="_", color="black", s=30, label="commit")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_ylabel("step, from the start down")
    told = {OPEN: "likeliest is another", RIGHT: "likeliest is the final token", GIVEN: "not filled"}
    handles = [Patch(color=colours[kind], label=text) for kind, text in told.items()]
    marks, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *marks], frameon=False, ncols=4, fontsize=8, loc="outside lower center")
    return figure


def sink_map(sinks: Sinks, row: int = 0) -> Figure:
    """Attention that each position receives, mean over heads, by step: a panel for each layer.

    The colour grows with the root of the attention, so that one strong sink does not hide the others.

    Args:
        row: Number within `sinks.rows`.
    """
    from matplotlib.colors import PowerNorm

    chosen("row", [row], len(sinks.rows))
    received = sinks.received[:, :, :, row].mean(2)
    n_pos = received.shape[-1]
    figure, panels = _panels(1, len(sinks.layers), (1.5 + 2.6 * len(sinks.layers), 4.0))
    image: Any = None
    norm = PowerNorm(0.5, 0.0, float(received.nan_to_num(0).max()))
    ticks = _few(len(sinks.steps))
    for place, axes in enumerate(panels):
        values = received[:, place]
        image = axes.imshow(
            values.numpy(), cmap=_colours("magma"), norm=norm, aspect="auto", interpolation="nearest"
        )
        # NaN stays NaN through the mean over heads; such a state has no sink to mark.
        known = (~values.isnan().any(-1)).nonzero()[:, 0]
        axes.plot(values[known].argmax(-1).numpy(), known.numpy(), ".", color="#66ccee", markersize=4)
        axes.set(title=f"layer {sinks.layers[place]}", xlabel="position", xlim=(-0.5, n_pos - 0.5))
        axes.set_yticks(ticks, [sinks.steps[i] for i in ticks], fontsize=7)
    panels[0].set_ylabel("step, from the start down")
    figure.colorbar(image, ax=panels, label=f"attention received (even: {1 / n_pos:.3f})")
    figure.suptitle("Attention received, mean over heads; dots: the most", fontsize=10)
    return figure


def probe_bars(probe: TimeProbe) -> Figure:
    """R^2 of each hook point on held-out sequences, beside permuted times."""
    found = probe.table()
    figure, (axes,) = _panels(1, 1, (max(5.0, 1.8 + 0.5 * len(found)), 4.2))
    places = torch.arange(len(found)).double()
    axes.bar((places - 0.2).tolist(), [row["r2"] for row in found], 0.4, color="#4477aa", label="t")
    permuted = [row["r2_permuted_mean"] for row in found]
    axes.bar((places + 0.2).tolist(), permuted, 0.4, color="0.7", label="permuted t")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(places.tolist(), [row["hook"] for row in found], rotation=90, fontsize=7)
    axes.set(ylabel="R² on held-out sequences", ylim=(max(-1.0, min(0.0, *permuted)) * 1.05, 1))
    axes.set_title(
        f"Linear probe of t: {probe.n_train} sequences to learn, {probe.n_held_out} held out", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure that no global state holds on to, and its panels in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _colours(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad="0.85")


def _shade(number: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * number / max(1, count - 1))


def _component_colour(name: str) -> str:
    kinds = {"attn": "#4477aa", "mlp": "#ee6677"}
    return kinds.get(name.split()[0], "#888888")


def _few(count: int) -> list[int]:
    """Some numbers below count, evenly spread."""
    spread: Tensor = torch.linspace(0, count - 1, min(6, count)).long()
    return sorted(set(spread.tolist()))
