"""An evaluation as files: report.md to read, report.json to compute with, and plots.

A figure without a value is null in JSON and "undefined" elsewhere, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdlm_interp.atomic_files import replacing
from mdlm_interp.errors import OutputExistsError
from transcoder.checkpoint import write_json
from transcoder.data import Coverage, RowStore, coverage
from transcoder.evaluation import MEAN, ORIGINAL, REPLACED, ZERO, Evaluation
from transcoder.metrics import STRATA
from transcoder.plots import (
    DOTS_PER_INCH,
    UNDEFINED,
    plot_density,
    plot_fvu,
    plot_nelbo,
    plot_training,
)

if TYPE_CHECKING:
    from transcoder.model import CrossLayerTranscoder

REPORT = "report.json"
MARKDOWN = "report.md"
MEAN_NOTE = (
    "Ablation to the mean can cost more than to zero: the mean mixes masked and unmasked positions, which layer 0 "
    "sets far apart, so what it writes fits neither."
)


def write_report(
    evaluation: Evaluation,
    out: Path,
    *,
    about: Mapping[str, Any],
    training_log: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Write the report, all its files or none; returns them, report.md first.

    Args:
        about: What was evaluated: transcoder, model and store, for the report's head.
        training_log: Metrics of the training run, from `training_log.read_log`; no training curve without.
    Raises:
        OutputExistsError: If the directory holds a report.
        WriteError: If the disk is full or failing.
    """
    refuse_existing(out)
    figures = {
        "fvu.png": plot_fvu(evaluation),
        "nelbo.png": plot_nelbo(evaluation),
        "density.png": plot_density(evaluation),
    }
    if training_log:
        figures["training.png"] = plot_training(training_log)
    text = "\n".join([*markdown(evaluation, about), "", *(f"![{name}]({name})" for name in figures), ""])
    names = (MARKDOWN, REPORT, *figures)
    with ExitStack() as stack:
        # Each gets its name when the stack ends: after all are written.
        partial = {name: stack.enter_context(replacing(out / name)) for name in names}
        for name, figure in figures.items():
            figure.savefig(partial[name], dpi=DOTS_PER_INCH)
        partial[MARKDOWN].write_text(text, encoding="utf-8")
        write_json(partial[REPORT], {"about": dict(about), **to_json(evaluation)})
    return [out / name for name in names]


def origin(clt: CrossLayerTranscoder, store: RowStore) -> dict[str, str]:
    """For the report's head: how much of its planned capture each of the two stores holds."""
    entries = {}
    trained_on = clt.provenance.get("store", {}).get("coverage")
    if trained_on is not None:
        entries["training store"] = str(Coverage(**trained_on))
    return {**entries, "evaluated store": str(coverage(store))}


def refuse_existing(out: Path) -> None:
    """Raise OutputExistsError if a file of a report is there already; cheap enough to ask before evaluating."""
    for name in (REPORT, MARKDOWN, "fvu.png", "nelbo.png", "density.png", "training.png"):
        if (out / name).exists():
            raise OutputExistsError(f"{out / name} exists; choose another out directory")


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every figure as plain values; what is undefined becomes null."""
    content = {
        "n_sequences": evaluation.n_sequences,
        "n_positions": evaluation.n_positions,
        "n_masked": evaluation.n_masked,
        "n_excluded": evaluation.n_excluded,
        "undefined": evaluation.undefined,
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
        f"- {held_out(evaluation)}",
        "",
        "## In the model",
        "",
        f"Share of the MLPs' contribution recovered, (zero - replaced) / (zero - original): "
        f"**{number(evaluation.share_recovered, '.3f')}**.",
        "",
        *table(
            ["condition", "NELBO (nats/token)", "change", "KL from original (nats)", "top-1 agreement"],
            [
                [
                    name if name == ORIGINAL else f"all MLPs: {name}",
                    number(score.nelbo, ".3f"),
                    number(evaluation.delta_nelbo(name), "+.3f"),
                    number(score.kl, ".3f"),
                    number(score.top1_agreement, ".1%"),
                ]
                for name, score in conditions.items()
            ],
        ),
        "",
        MEAN_NOTE,
        "",
        "## By layer",
        "",
        "Reconstruction over all positions; change of the bound with that one MLP replaced, or zeroed.",
        "",
        *layer_table(evaluation),
        "",
        "FVU: fraction of variance unexplained. EV: variance explained, a constant error being free. Dead: "
        "active at none of the evaluated positions.",
    ]
    reasons = undefined_figures(evaluation)
    if reasons:
        lines += ["", "Undefined:", "", *(f"- {reason}" for reason in reasons)]
    return lines


def summary(evaluation: Evaluation) -> list[str]:
    """The evaluation in three lines, and one more for each figure that is undefined."""
    layers = evaluation.layers["all"]
    changes = {name: number(evaluation.delta_nelbo(name), "+.3f") for name in (REPLACED, ZERO, MEAN)}
    return [
        held_out(evaluation),
        f"reconstruction: FVU {mean_fvu(evaluation)}, L0 {np.mean([layer.l0 for layer in layers]):.1f} per "
        f"layer, {sum(layer.dead for layer in layers)} of {evaluation.density.size} features dead",
        f"in the model: NELBO {number(evaluation.conditions[ORIGINAL].nelbo, '.3f')} nats/token; all MLPs "
        f"replaced {changes[REPLACED]}, zeroed {changes[ZERO]}, mean {changes[MEAN]}; share recovered "
        f"{number(evaluation.share_recovered, '.1%')}",
        *(f"undefined: {reason}" for reason in undefined_figures(evaluation)),
    ]


def held_out(evaluation: Evaluation) -> str:
    """What was evaluated, and whether training saw it."""
    if evaluation.n_excluded is None:
        return f"{evaluation.n_sequences} sequences as given; whether training saw them was not looked at"
    return (
        f"held out: {evaluation.n_sequences} sequences used; {evaluation.n_excluded} of the store excluded, "
        f"as the transcoder was trained on their text"
    )


def undefined_figures(evaluation: Evaluation) -> list[str]:
    """Each figure without a value, and why; one line for all layers with one reason."""
    reasons = [f"{name}: {reason}" for name, reason in evaluation.undefined.items()]
    for stratum, layers in evaluation.layers.items():
        by_reason: dict[str, list[str]] = {}
        for layer, metrics in enumerate(layers):
            if metrics.undefined is not None:
                by_reason.setdefault(metrics.undefined, []).append(str(layer))
        for reason, numbers in by_reason.items():
            reasons.append(f"FVU and EV, {stratum} positions, layer {', '.join(numbers)}: {reason}")
    return reasons


def number(value: float, spec: str) -> str:
    """A figure as text.

    >>> number(0.25, ".1%"), number(float("nan"), ".3f")
    ('25.0%', 'undefined')
    """
    return format(value, spec) if math.isfinite(value) else UNDEFINED


def mean_fvu(evaluation: Evaluation, *, explained: bool = False) -> str:
    """The mean over those layers that have an FVU, as text, or of 1 - FVU as a percentage."""
    values = [layer.fvu for layer in evaluation.layers["all"]]
    defined = [value for value in values if math.isfinite(value)]
    if not defined:
        return UNDEFINED
    mean = sum(defined) / len(defined)
    only = "" if len(defined) == len(values) else f" (of {len(defined)} of {len(values)} layers)"
    return (f"{1 - mean:.1%}" if explained else f"{mean:.3f}") + only


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
            str(index),
            *(number(layer.fvu, ".3f") for layer in (every, unmasked, masked)),
            number(every.explained_variance, ".3f"),
            number(every.cosine, ".3f"),
            number(every.l0, ".1f"),
            str(every.dead),
            number(replaced.nelbo - original, "+.3f"),
            number(zero.nelbo - original, "+.3f"),
            number(share, ".3f"),
        ]
        for index, (every, unmasked, masked, replaced, zero, share) in enumerate(columns)
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
