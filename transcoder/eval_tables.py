"""The tables of an evaluation, as lines of Markdown; report.json has every figure, these the ones to read."""

# Axes: layer, t_bin

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transcoder.eval_passes import KINDS
from transcoder.eval_scores import ORIGINAL, REPLACED, Condition, Estimate
from transcoder.evaluation import Evaluation
from transcoder.metrics import LayerMetrics

UNDEFINED = "undefined"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        right = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *right])} |"

    rule = f"| {' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])} |"
    return [line(head), rule, *map(line, rows)]


def number(value: float | int | None, spec: str) -> str:
    """A figure as text.

    >>> number(0.25, ".1%"), number(float("nan"), ".3f"), number(None, "d")
    ('25.0%', 'undefined', 'undefined')
    """
    return format(value, spec) if value is not None and math.isfinite(value) else UNDEFINED


def figure(estimate: Estimate, spec: str) -> str:
    """An estimate with its standard error, if it has one.

    >>> figure(Estimate(0.25, 0.01), "+.3f"), figure(Estimate(0.25, 0.01), ".1%")
    ('+0.250 ± 0.010', '25.0% ± 1.0%')
    >>> figure(Estimate(float("nan"), float("nan"), "no masks"), "+.3f")
    'undefined'
    """
    if not math.isfinite(estimate.value):
        return UNDEFINED
    if not math.isfinite(estimate.se):
        return f"{format(estimate.value, spec)} (one text)"
    return f"{format(estimate.value, spec)} ± {format(estimate.se, spec.removeprefix('+'))}"


def conditions_table(evaluation: Evaluation) -> list[str]:
    """All MLPs replaced or ablated at once."""
    scores = evaluation.scores
    rows = [[str(ORIGINAL), figure(scores.nelbo(ORIGINAL), ".3f"), *[""] * 4]]
    rows += [
        [
            str(condition),
            figure(scores.nelbo(condition), ".3f"),
            figure(scores.delta_nelbo(condition), "+.3f"),
            figure(scores.kl(condition), ".3f"),
            figure(scores.top1_agreement(condition), ".1%"),
            figure(scores.raw_kl(condition), ".3f"),
        ]
        for condition in (Condition(kind) for kind in KINDS)
    ]
    head = ["condition", "NELBO (nats/token)", "change", "KL, masked (nats)", "top-1 agreement"]
    return table([*head, "raw KL, unmasked (nats)"], rows)


def alone_tables(evaluation: Evaluation) -> list[str]:
    """Each MLP alone: what it costs the bound, then KL and agreement."""
    scores, layers = evaluation.scores, range(evaluation.n_layers)
    costs = [
        [
            str(layer),
            *(figure(scores.delta_nelbo(Condition(kind, layer)), "+.3f") for kind in KINDS),
            figure(scores.recovered(layer, "zero"), ".3f"),
            figure(scores.recovered(layer, "mean"), ".3f"),
        ]
        for layer in layers
    ]
    changes = [
        [
            str(layer),
            *(number(scores.kl(Condition(kind, layer)).value, ".3f") for kind in KINDS),
            *(number(scores.top1_agreement(Condition(kind, layer)).value, ".1%") for kind in KINDS),
            *(number(scores.raw_kl(Condition(kind, layer)).value, ".3f") for kind in KINDS),
        ]
        for layer in layers
    ]
    head = ["MLP", "change replaced", "zero", "mean", "recovered of zero", "of mean"]
    second = [f"{what} {kind}" for what in ("KL", "top-1", "raw KL") for kind in KINDS]
    return [*table(head, costs), "", *table(["MLP", *second], changes)]


def by_t_tables(evaluation: Evaluation) -> list[str]:
    """All MLPs by t-bin, and the cost of each replaced alone; bins without sequences are left out."""
    scores = evaluation.scores
    rows = []
    for t_bin in present_bins(evaluation):
        chosen = scores.chosen(t_bin)
        rows.append(
            [
                t_name(evaluation, t_bin),
                str(int(chosen.sum())),
                str(int(scores.n_masked[chosen].sum())),
                *(figure(scores.delta_nelbo(Condition(kind), t_bin), "+.3f") for kind in KINDS),
                number(scores.recovered(None, "zero", t_bin).value, ".3f"),
                *(number(scores.kl(Condition(kind), t_bin).value, ".3f") for kind in KINDS),
                *(number(scores.top1_agreement(Condition(kind), t_bin).value, ".0%") for kind in KINDS),
            ]
        )
    head = ["t", "sequences", "masked", "change replaced", "zero", "mean", "recovered"]
    head += [f"{what} {kind}" for what in ("KL", "top-1") for kind in KINDS]
    alone = layers_by_t(
        evaluation,
        lambda layer, t_bin: number(scores.delta_nelbo(Condition("replaced", layer), t_bin).value, "+.3f"),
        total=lambda t_bin: number(scores.delta_nelbo(REPLACED, t_bin).value, "+.3f"),
    )
    return [
        *table(head, rows),
        "",
        "Change of the NELBO with one MLP replaced, by t:",
        "",
        *alone,
    ]


def layers_by_t(
    evaluation: Evaluation,
    cell: Callable[[int, int], str],
    total: Callable[[int], str] | None = None,
) -> list[str]:
    """A table with a row for each layer and a column for each t-bin that has sequences."""
    bins = present_bins(evaluation)
    rows = [[str(layer), *(cell(layer, t_bin) for t_bin in bins)] for layer in range(evaluation.n_layers)]
    if total is not None:
        rows.append(["all", *(total(t_bin) for t_bin in bins)])
    return table(["layer", *(f"t {t_name(evaluation, t_bin)}" for t_bin in bins)], rows)


def reconstruction_table(evaluation: Evaluation) -> list[str]:
    """Every figure by layer, over all positions, the unmasked and the masked."""
    rows = [
        [
            f"{layer} {stratum}",
            number(found.fvu, ".3f"),
            number(found.explained_variance, ".3f"),
            number(found.explained_variance_by_dimension, ".3f"),
            number(found.cosine, ".3f"),
            number(found.l0, ".1f"),
            number(found.dead, "d"),
            number(found.dense, ".1%"),
        ]
        for layer in range(evaluation.n_layers)
        for stratum in ("all", "unmasked", "masked")
        for found in [evaluation.layers[stratum][layer]]
    ]
    return table(["layer", "FVU", "EV pooled", "EV by dimension", "cosine", "L0", "dead", "dense"], rows)


def fvu_by_t(evaluation: Evaluation, stratum: str) -> list[str]:
    """FVU by layer and t-bin over one stratum."""
    found: list[list[LayerMetrics]] = evaluation.layers_by_t[stratum]
    return layers_by_t(evaluation, lambda layer, t_bin: number(found[t_bin][layer].fvu, ".3f"))


def overview_table(evaluation: Evaluation) -> list[str]:
    """Layers in one table for the terminal."""
    scores = evaluation.scores
    rows = []
    for layer in range(evaluation.n_layers):
        every, unmasked, masked = (
            evaluation.layers[stratum][layer] for stratum in ("all", "unmasked", "masked")
        )
        costs = (scores.delta_nelbo(Condition(kind, layer)).value for kind in KINDS)
        rows.append(
            [
                str(layer),
                *(number(found.fvu, ".3f") for found in (every, unmasked, masked)),
                number(every.explained_variance, ".3f"),
                number(every.cosine, ".3f"),
                number(every.l0, ".1f"),
                number(every.dead, "d"),
                number(every.dense, ".1%"),
                *(number(cost, "+.3f") for cost in costs),
                number(scores.recovered(layer, "zero").value, ".3f"),
            ]
        )
    head = ["layer", "FVU", "FVU unmasked", "FVU masked", "EV", "cosine", "L0", "dead", "dense"]
    return table([*head, "NELBO replaced", "zeroed", "mean", "recovered"], rows)


def present_bins(evaluation: Evaluation) -> list[int]:
    """T-bins that have a sequence."""
    return [t_bin for t_bin in range(evaluation.t_bins) if evaluation.scores.chosen(t_bin).any()]


def t_name(evaluation: Evaluation, t_bin: int) -> str:
    """The edges of a t-bin."""
    return f"{t_bin / evaluation.t_bins:.1f}-{(t_bin + 1) / evaluation.t_bins:.1f}"
