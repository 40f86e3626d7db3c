"""An evaluation as files: report.md to read, report.json to compute with, and plots.

The plots are fvu.png (reconstruction by layer), nelbo.png (what each replacement costs the model),
density.png (how often features are active) and, if the run's metrics are there, training.png.
"""

# Axes: layer, feature

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdlm_interp.errors import OutputExistsError
from transcoder.checkpoint import write_json
from transcoder.evaluation import MEAN, ORIGINAL, REPLACED, ZERO, Evaluation
from transcoder.metrics import STRATA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.json"
MARKDOWN = "report.md"
DOTS_PER_INCH = 150
LEAST_SHARED = 0.02
"""Nats per token that ablating a layer must cost for its recovered share to be shown."""
COLOURS = {"all": "#333333", "unmasked": "#4477aa", "masked": "#ee6677"}


def write_report(
    evaluation: Evaluation, out: Path, *, about: Mapping[str, Any], training_log: Path | None = None
) -> list[Path]:
    """Write the report; returns its files, report.md first.

    Args:
        about: What was evaluated: transcoder, model and store, for the report's head.
        training_log: metrics.jsonl of the training run; no training curve without it.
    Raises:
        OutputExistsError: If the directory holds a report.
    """
    refuse_existing(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "fvu.png": plot_fvu(evaluation),
        "nelbo.png": plot_nelbo(evaluation),
        "density.png": plot_density(evaluation),
    }
    if training_log is not None and training_log.is_file():
        figures["training.png"] = plot_training(read_log(training_log))
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=DOTS_PER_INCH)
    text = "\n".join([*markdown(evaluation, about), "", *(f"![{name}]({name})" for name in figures), ""])
    (out / MARKDOWN).write_text(text, encoding="utf-8")
    write_json(out / REPORT, {"about": dict(about), **to_json(evaluation)})
    return [out / name for name in (MARKDOWN, REPORT, *figures)]


def refuse_existing(out: Path) -> None:
    """Raise OutputExistsError if a file of a report is there already; cheap enough to ask before evaluating."""
    for name in (REPORT, MARKDOWN, "fvu.png", "nelbo.png", "density.png", "training.png"):
        if (out / name).exists():
            raise OutputExistsError(f"{out / name} exists; choose another out directory")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every figure as plain values; what is undefined becomes null."""
    content = {
        "n_sequences": evaluation.n_sequences,
        "n_positions": evaluation.n_positions,
        "n_masked": evaluation.n_masked,
        "share_recovered": evaluation.share_recovered,
        "conditions": {
            name: {**asdict(score), "delta_nelbo": evaluation.delta_nelbo(name)}
            for name, score in evaluation.conditions.items()
        },
        "replaced_alone": [asdict(score) for score in evaluation.replaced_alone],
        "zero_alone": [asdict(score) for score in evaluation.zero_alone],
        "share_recovered_alone": evaluation.share_recovered_alone,
        "layers": {name: [asdict(layer) for layer in layers] for name, layers in evaluation.layers.items()},
        "density": evaluation.density.tolist(),
    }
    return {key: _without_nan(value) for key, value in content.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(evaluation: Evaluation, about: Mapping[str, Any]) -> list[str]:
    """The report's lines."""
    conditions = evaluation.conditions
    lines = [
        "# Cross-layer transcoder: evaluation",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
    ]
    lines += [
        f"- {evaluation.n_sequences} sequences, {evaluation.n_positions:,} positions, "
        f"{evaluation.n_masked:,} masked",
        "",
        "## In the model",
        "",
        f"Share of the MLPs' contribution recovered, (zero - replaced) / (zero - original): "
        f"**{evaluation.share_recovered:.3f}**.",
        "",
        *table(
            ["condition", "NELBO (nats/token)", "change", "KL from original (nats)", "top-1 agreement"],
            [
                [
                    name if name == ORIGINAL else f"all MLPs: {name}",
                    f"{score.nelbo:.3f}",
                    f"{evaluation.delta_nelbo(name):+.3f}",
                    f"{score.kl:.3f}",
                    f"{score.top1_agreement:.1%}",
                ]
                for name, score in conditions.items()
            ],
        ),
        "",
        "## By layer",
        "",
        "Reconstruction over all positions; change of the bound with that one MLP replaced, or zeroed.",
        "",
        *layer_table(evaluation),
        "",
        "FVU: fraction of variance unexplained. Dead: active at none of the evaluated positions.",
    ]
    return lines


def summary(evaluation: Evaluation) -> list[str]:
    """The evaluation in two lines."""
    layers = evaluation.layers["all"]
    fvu, l0 = np.mean([layer.fvu for layer in layers]), np.mean([layer.l0 for layer in layers])
    features = evaluation.density.size
    return [
        f"held out: FVU {fvu:.3f}, L0 {l0:.1f} per layer, {sum(layer.dead for layer in layers)} of "
        f"{features} features dead ({evaluation.n_sequences} sequences)",
        f"in the model: NELBO {evaluation.conditions[ORIGINAL].nelbo:.3f} nats/token; all MLPs replaced "
        f"{evaluation.delta_nelbo(REPLACED):+.3f}, zeroed {evaluation.delta_nelbo(ZERO):+.3f}, mean "
        f"{evaluation.delta_nelbo(MEAN):+.3f}: {evaluation.share_recovered:.1%} recovered",
    ]


def layer_table(evaluation: Evaluation) -> list[str]:
    """The table of layers."""
    original = evaluation.conditions[ORIGINAL].nelbo
    columns = zip(
        *(evaluation.layers[stratum] for stratum in STRATA),
        evaluation.replaced_alone,
        evaluation.zero_alone,
        evaluation.share_recovered_alone,
        strict=True,
    )
    rows = [
        [
            str(number),
            *(f"{layer.fvu:.3f}" for layer in (every, unmasked, masked)),
            f"{every.explained_variance:.3f}",
            f"{every.cosine:.3f}",
            f"{every.l0:.1f}",
            str(every.dead),
            f"{replaced.nelbo - original:+.3f}",
            f"{zero.nelbo - original:+.3f}",
            # A share of next to nothing says nothing.
            f"{share:.3f}" if abs(zero.nelbo - original) > LEAST_SHARED else "-",
        ]
        for number, (every, unmasked, masked, replaced, zero, share) in enumerate(columns)
    ]
    head = ["layer", "FVU", "FVU unmasked", "FVU masked", "EV", "cosine", "L0", "dead"]
    return table([*head, "NELBO replaced", "NELBO zeroed", "recovered"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        right = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *right])} |"

    rule = f"| {' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])} |"
    return [line(head), rule, *map(line, rows)]


def plot_fvu(evaluation: Evaluation) -> Figure:
    """Fraction of variance unexplained by layer and stratum."""
    figure, axes = new_figure()
    numbers = np.arange(len(evaluation.layers["all"]))
    for offset, stratum in enumerate(STRATA):
        values = [layer.fvu for layer in evaluation.layers[stratum]]
        axes.bar(numbers + 0.27 * (offset - 1), values, 0.25, label=stratum, color=COLOURS[stratum])
    axes.set_xticks(numbers)
    axes.set_xlabel("layer")
    axes.set_ylabel("fraction of variance unexplained")
    axes.set_title("Reconstruction of MLP outputs on held-out positions")
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
        values = [score.nelbo - original for score in [*alone, evaluation.conditions[together]]]
        axes.bar(np.arange(len(names)) + 0.4 * offset - 0.2, values, 0.38, label=label, color=colour)
    mean = evaluation.delta_nelbo(MEAN)
    axes.plot(
        [len(names) - 1.4, len(names) - 0.6], [mean, mean], color="#aa3377", label="all ablated to the mean"
    )
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_yscale("symlog", linthresh=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.5)  # the legend's place
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("MLP of layer")
    axes.set_ylabel("increase of the NELBO (nats per token)")
    axes.set_title("What replacing MLPs costs the model")
    axes.legend()
    return figure


def plot_density(evaluation: Evaluation) -> Figure:
    """Histogram of how often features are active, by layer."""
    figure, axes = new_figure()
    floor = 1.0 / max(1, evaluation.n_positions)
    edges = np.linspace(math.log10(floor), 0.0, 31)
    n_layers = evaluation.density.shape[0]
    for layer, share in enumerate(evaluation.density):
        alive = share[share > 0]
        label = f"layer {layer} ({len(share) - len(alive)} dead)"
        shade = 0.85 * layer / max(1, n_layers - 1)
        axes.hist(np.log10(alive), edges, histtype="step", label=label, color=_colour(shade), linewidth=1.4)
    axes.set_xlabel("log10 of the share of positions at which a feature is active")
    axes.set_ylabel("features")
    axes.set_title("Feature density on held-out positions")
    axes.legend(fontsize="small", ncols=1 + n_layers // 9)
    return figure


def plot_training(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Unexplained variance and dead features over the training run."""
    figure, axes = new_figure()
    rows = [entry["rows"] for entry in log]
    n_layers = len(log[0]["fvu_by_layer"])
    for layer in range(n_layers):
        values = [entry["fvu_by_layer"][layer] for entry in log]
        shade = 0.85 * layer / max(1, n_layers - 1)
        axes.plot(rows, values, label=f"layer {layer}", color=_colour(shade), linewidth=1.0)
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


def _colour(shade: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](shade)
