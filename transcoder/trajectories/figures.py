"""Figures of features along a trajectory; `mdlm_interp.analysis.figures.save` writes them."""

# Axes: state, layer, feature, batch, pos

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mdlm_interp.analysis.figures import tick_texts
from mdlm_interp.analysis.replay import chosen
from transcoder.figures import grid_of, layer_colour, panel
from transcoder.trajectories.courses import FeatureCourses
from transcoder.trajectories.onset import FeatureLives
from transcoder.trajectories.overlap import FeatureOverlap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "from_start": ("active from the start", "0.75"),
    "before_commit_state": ("comes before the commit", "#4477aa"),
    "in_commit_state": ("in the state that the token is drawn from", "#66ccee"),
    "with_the_token": ("with the token", "#ee6677"),
    "later": ("later", "#ccbb44"),
}


def onset_rates(lives: FeatureLives, *, within: int = 12) -> Figure:
    """Onsets for each position and state, by state relative to the commit, and which share of lives began when.

    Args:
        within: States on either side of the commit that are shown.
    """
    figure, grid = grid_of((11.5, 4.6), 1, 2)
    left, right = panel(figure, grid[0, 0]), panel(figure, grid[0, 1])
    draw_rates(left, lives, within)
    left.legend(frameon=False, fontsize=8)
    bottom = [0.0] * lives.n_layers
    found = lives.summary()
    for kind, (text, colour) in KINDS.items():
        shares = [row[kind] for row in found]
        right.bar(range(lives.n_layers), shares, bottom=bottom, color=colour, label=text)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    right.set_xticks(range(lives.n_layers))
    right.set(xlabel="layer", ylabel="share of the features seen at a position", ylim=(0, 1))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=5, loc="outside lower right")
    return figure


def draw_rates(axes: Any, lives: FeatureLives, within: int) -> None:
    """Onset rates of every layer in a panel; a dotted line where the token is written."""
    for layer in range(lives.n_layers):
        rows = [row for row in lives.rates(layer) if abs(row["to_commit"]) <= within]
        times, rates = [row["to_commit"] for row in rows], [row["rate"] for row in rows]
        colour = layer_colour(layer, lives.n_layers)
        axes.plot(times, rates, marker=".", color=colour, label=f"layer {layer}")
    axes.axvline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="state relative to the commit (the token stands from 1 on)", ylim=(0, None))
    axes.set_ylabel("features that come on, per position")


def overlap_bars(overlap: FeatureOverlap) -> Figure:
    """Mean overlap of a position's features from one state to the next, by layer and what happens to the position."""
    found = overlap.summary()
    figure, grid = grid_of((7.0, 4.2), 1, 1)
    axes = panel(figure, grid[0, 0])
    kinds = {
        "masked": ("stays a mask", "#4477aa"),
        "filled": ("is filled", "#ee6677"),
        "token": ("keeps its token", "#ccbb44"),
    }
    for place, (kind, (text, colour)) in enumerate(kinds.items()):
        places = [row["layer"] + (place - 1) * 0.27 for row in found]
        axes.bar(places, [row[kind] for row in found], 0.25, color=colour, label=f"the position {text}")
    axes.set_xticks([row["layer"] for row in found])
    which = "active features" if overlap.k is None else f"{overlap.k} strongest features"
    axes.set(xlabel="layer", ylabel=f"Jaccard overlap of the {which}", ylim=(0, 1))
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def course_maps(
    courses: FeatureCourses, row: int = 0, labels: Sequence[str] | None = None, titles: Sequence[str] = ()
) -> Figure:
    """Activation of each feature by state and position in one sequence; a line marks each position's commit.

    Args:
        row: Number within `courses.rows`.
        labels: Texts of the positions; their numbers if none.
        titles: Of the panels; layer and number of each feature if none.
    """
    chosen("row", [row], len(courses.rows))
    n_states, count, _, n_pos = courses.acts.shape
    figure, grid = grid_of((2.2 + 0.24 * n_pos, 1.2 + 2.4 * count), count, 1)
    filled = (courses.commit[row] >= 0).nonzero()[:, 0]
    for number, (layer, feature) in enumerate(courses.features):
        axes = figure.add_subplot(grid[number, 0])
        values = courses.acts[:, number, row]
        image = axes.imshow(
            torch.where(values > 0, values, torch.nan).numpy(),
            cmap="viridis",
            vmin=0,
            aspect="auto",
            interpolation="nearest",
        )
        # Between the last state with a mask and the first with the token.
        edges = courses.commit[row][filled].double() + 0.5
        axes.hlines(
            edges.tolist(), (filled - 0.5).tolist(), (filled + 0.5).tolist(), color="#ee6677", linewidth=1.2
        )
        axes.set_title(titles[number] if titles else f"layer {layer}, feature {feature}", fontsize=9)
        axes.set(ylabel="state", xlim=(-0.5, n_pos - 0.5), ylim=(n_states - 0.5, -0.5))
        names = [str(place) for place in range(n_pos)] if labels is None else tick_texts(labels)
        last = number == count - 1
        axes.set_xticks(range(n_pos), names if last else [], rotation=90, fontsize=7)
        figure.colorbar(image, ax=axes, label="activation")
    return figure
