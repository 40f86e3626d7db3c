"""nelbo.png: what each replacement costs the model, by layer and by t. What has no value is marked, not left out."""

# Axes: layer, t_bin

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transcoder.eval_passes import KINDS
from transcoder.eval_scores import REPLACED, Condition, Estimate, Kind
from transcoder.evaluation import Evaluation
from transcoder.figures import drawable, grid_of, mark_gaps, mark_undefined, middles, panel, t_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_COLOURS: dict[Kind, str] = {"replaced": "#228833", "zero": "#ccbb44", "mean": "#aa3377"}
KIND_LABELS: dict[Kind, str] = {
    "replaced": "replaced by the transcoder",
    "zero": "ablated to zero",
    "mean": "ablated to the mean",
}
LINEAR_BELOW = 0.01
"""Nats per token under which the logarithmic axis of costs is linear, as they may be below zero."""


def plot_nelbo(evaluation: Evaluation) -> Figure:
    """What replacing and ablating costs: the bound and top-1 agreement by layer, the bound and KL by t."""
    figure, grid = grid_of((12.0, 8.5), 2, 2)
    cost, agreement, by_t, kl = (panel(figure, grid[row, column]) for row in (0, 1) for column in (0, 1))
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
    mark_gaps(
        by_t, middles(evaluation.t_bins), [[scores.delta_nelbo(REPLACED, t_bin).value] for t_bin in bins]
    )
    both = [[scores.kl(REPLACED, t_bin).value, scores.raw_kl(REPLACED, t_bin).value] for t_bin in bins]
    mark_gaps(kl, middles(evaluation.t_bins), both)
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
        t_axis(axes, evaluation.t_bins)
    cost.set_title("What replacing MLPs costs the model")
    agreement.set_title("How often its first choice stays")
    by_t.set_title("Cost with all MLPs changed, by t")
    kl.set_title("KL with all MLPs changed, by t")
    handles, labels = cost.get_legend_handles_labels()
    kinds = [kl.plot([], [], style, color="#444444", markersize=4)[0] for style in ("o-", "o:")]
    kinds[1].set_markerfacecolor("white")
    # All below the panels: within one, a legend would lie on what is written there of missing values.
    handles, labels = [*handles, *kinds], [*labels, "KL, masked positions", "KL, unmasked, before SUBS"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _bars(axes: Any, places: NDArray[Any], found: Sequence[Estimate], kind: Kind) -> None:
    values = drawable(estimate.value for estimate in found)
    errors = np.nan_to_num(drawable(estimate.se for estimate in found))
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
    values = drawable(estimate.value for estimate in found)
    errors = np.nan_to_num(drawable(estimate.se for estimate in found))
    # Not on top of one another where the values are alike.
    places = np.array(middles(evaluation.t_bins)) + {"replaced": -0.008, "mean": 0.008}.get(kind, 0.0)
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
