"""An evaluation as files: report.md to read, report.json to compute with, and plots.

A figure without a value is null in JSON and "undefined" elsewhere, with its reason.
"""

# Axes: layer, t_bin

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdlm_interp.atomic_files import replacing
from mdlm_interp.errors import OutputExistsError
from transcoder import eval_tables
from transcoder.checkpoint import write_json
from transcoder.cost_plots import plot_nelbo
from transcoder.data import Coverage, RowStore, coverage
from transcoder.eval_error_terms import NATIVE_BOUND
from transcoder.eval_json import to_json
from transcoder.eval_passes import KINDS
from transcoder.eval_scores import ABLATIONS, MEAN, ORIGINAL, REPLACED, ZERO, Condition
from transcoder.eval_tables import UNDEFINED, figure, number, t_name
from transcoder.evaluation import Evaluation
from transcoder.figures import DOTS_PER_INCH
from transcoder.metrics import DENSE
from transcoder.plots import plot_density, plot_fvu
from transcoder.training_plots import plot_training

if TYPE_CHECKING:
    from transcoder.model import CrossLayerTranscoder

REPORT = "report.json"
MARKDOWN = "report.md"
MEAN_NOTE = (
    "Ablation to the mean can cost more than to zero: the mean mixes masked and unmasked positions, which layer 0 "
    "sets far apart, so what it writes fits neither."
)
IN_MODEL_NOTE = (
    "All conditions see the same noised sequences; ± is one standard error over texts, of the paired "
    "difference where a change is shown; all sequences of one text, such as one block at several times, are one "
    "observation. NELBO and top-1 agreement are of masked positions (SUBS copies the "
    "others); raw KL is of the logits before SUBS at unmasked ones, which no loss and no sampler reads."
)
RECONSTRUCTION_NOTE = (
    "FVU: squared error over variance. EV pooled: 1 - sum of var(error) / sum of var(target) over dimensions, a "
    "constant error being free; EV by dimension: mean over dimensions of 1 - var(error) / var(target). Variances "
    "are about the mean of the positions looked at. Dead: active at none of them; "
    f"dense: share of features active at more than {DENSE:.0%}."
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
        for name, drawn in figures.items():
            drawn.savefig(partial[name], dpi=DOTS_PER_INCH)
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


def markdown(evaluation: Evaluation, about: Mapping[str, Any]) -> list[str]:
    """The report's lines."""
    scores = evaluation.scores
    lines = [
        "# Cross-layer transcoder: evaluation",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        f"- {sequences(evaluation)}, {evaluation.n_positions:,} positions, {evaluation.n_masked:,} masked",
        f"- {held_out(evaluation)}",
        "",
        "## In the model",
        "",
        f"Share of the MLPs' contribution recovered, (ablated - replaced) / (ablated - original): "
        f"**{figure(evaluation.share_recovered, '.3f')}** of what ablation to zero costs, "
        f"{figure(scores.recovered(None, 'mean'), '.3f')} of what ablation to the mean costs.",
        "",
        *eval_tables.conditions_table(evaluation),
        "",
        IN_MODEL_NOTE,
        "",
        MEAN_NOTE,
        "",
        "### Each MLP alone",
        "",
        *eval_tables.alone_tables(evaluation),
        "",
        "### By t",
        "",
        "All MLPs at once, over the sequences of each part of [0, 1] that has any; few make a rough standard error.",
        "",
        *eval_tables.by_t_tables(evaluation),
        "",
        "## Reconstruction",
        "",
        *eval_tables.reconstruction_table(evaluation),
        "",
        RECONSTRUCTION_NOTE,
    ]
    for stratum in ("unmasked", "masked"):
        lines += ["", f"FVU at {stratum} positions, by t:", "", *eval_tables.fvu_by_t(evaluation, stratum)]
    lines += ["", "## Error terms", "", *error_term_lines(evaluation)]
    reasons = undefined_figures(evaluation)
    if reasons:
        lines += ["", "## Undefined", "", *(f"- {reason}" for reason in reasons)]
    return lines


def error_term_lines(evaluation: Evaluation) -> list[str]:
    """What came of adding the error terms back."""
    check = evaluation.error_terms
    if check is None:
        return ["Error terms were not added back: that was not asked for."]
    where = f"{check.n_logits:,} logits of {check.n_sequences} sequences"
    if check.oracle_differing is None:
        exact = f"not asked, as {check.undefined}"
    elif check.oracle_differing == 0:
        exact = f"all {where} are the model's own, bit for bit"
    else:
        exact = f"**{check.oracle_differing:,} of {where} differ from the model's own**"
    verdict = "within" if check.within_bound else "**beyond**"
    return [
        "With what it misses added to each reconstruction (`transcoder/error_terms.py`), the model comes back:",
        "",
        f"- under the oracle: {exact}",
        f"- natively: {check.native_differing:,} of {where} differ, by at most {check.native_difference:.1e} of "
        f"their root mean square, {verdict} the bound of {NATIVE_BOUND:g}",
        f"- without error terms: by at most {check.without_difference:.1e}",
        "",
        "This shows that the splice reads and writes in the right places and that nothing but these terms separates "
        "the replacement from the model. It says nothing about the transcoder's quality.",
    ]


def summary(evaluation: Evaluation) -> list[str]:
    """The evaluation in a few lines, and one more for each kind of figure that is undefined."""
    layers = evaluation.layers["all"]
    changes = {name: figure(evaluation.delta_nelbo(name), "+.3f") for name in (REPLACED, ZERO, MEAN)}
    check = evaluation.error_terms
    lines = [
        held_out(evaluation),
        f"reconstruction: FVU {mean_fvu(evaluation)} (unmasked {mean_fvu(evaluation, 'unmasked')}, masked "
        f"{mean_fvu(evaluation, 'masked')}), L0 {np.mean([layer.l0 for layer in layers]):.1f} per "
        f"layer, {sum(layer.dead or 0 for layer in layers)} of {evaluation.density['all'].size} features dead",
        f"in the model: NELBO {number(evaluation.scores.nelbo(ORIGINAL).value, '.3f')} nats/token; all MLPs "
        f"replaced {changes[REPLACED]}, zeroed {changes[ZERO]}, mean {changes[MEAN]}; share recovered "
        f"{figure(evaluation.share_recovered, '.1%')}",
    ]
    if check is not None:
        exact = "not asked" if check.oracle_differing is None else f"{check.oracle_differing:,} logits differ"
        lines.append(
            f"error terms added back: of {check.n_logits:,} logits, under the oracle {exact}; natively at most "
            f"{check.native_difference:.1e} of their rms ({'within' if check.within_bound else 'BEYOND'} "
            f"{NATIVE_BOUND:g})"
        )
    return [*lines, *(f"undefined: {reason}" for reason in undefined_figures(evaluation, by_t=False))]


def sequences(evaluation: Evaluation) -> str:
    """How many sequences of how many texts were evaluated."""
    n_texts = evaluation.n_texts
    return f"{evaluation.n_sequences} sequences of {n_texts} text{'' if n_texts == 1 else 's'}"


def held_out(evaluation: Evaluation) -> str:
    """What was evaluated, and whether training saw it."""
    if evaluation.n_excluded is None:
        return f"{sequences(evaluation)} as given; whether training saw them was not looked at"
    return (
        f"held out: {sequences(evaluation)} used; {evaluation.n_excluded} of the store excluded, "
        f"as the transcoder was trained on their text"
    )


def undefined_figures(evaluation: Evaluation, *, by_t: bool = True) -> list[str]:
    """Each figure without a value, and why; one line for all layers or t-bins with one reason."""
    scores = evaluation.scores
    names = [ORIGINAL, *(Condition(kind) for kind in KINDS)]
    names += [Condition(kind, layer) for kind in KINDS for layer in range(evaluation.n_layers)]
    reasons: list[str] = []
    for condition in names:
        found = (scores.nelbo(condition).undefined, scores.kl(condition).undefined)
        reasons += [f"{condition}: {reason}" for reason in dict.fromkeys(found) if reason is not None]
    for layer in (None, *range(evaluation.n_layers)):
        for against in ABLATIONS:
            reason = scores.recovered(layer, against).undefined
            if reason is not None:
                what = "all MLPs" if layer is None else f"MLP {layer}"
                reasons.append(f"share recovered of ablation to {against}, {what}: {reason}")
    for stratum, layers in evaluation.layers.items():
        by_reason: dict[str, list[str]] = {}
        for number_of, metrics in enumerate(layers):
            if metrics.undefined is not None:
                by_reason.setdefault(metrics.undefined, []).append(str(number_of))
        for reason, numbers in by_reason.items():
            reasons.append(f"FVU and EV, {stratum} positions, layer {', '.join(numbers)}: {reason}")
    return reasons + (_undefined_by_t(evaluation) if by_t else [])


def _undefined_by_t(evaluation: Evaluation) -> list[str]:
    """The same for parts of [0, 1]; report.json has each reason in full."""
    scores, bins = evaluation.scores, range(evaluation.t_bins)
    groups: dict[str, list[str]] = {}
    for t_bin in bins:
        name, chosen = t_name(evaluation, t_bin), scores.chosen(t_bin)
        if not chosen.any():
            groups.setdefault("all figures: no sequence has such a t", []).append(name)
            continue
        if not scores.n_masked[chosen].any():
            groups.setdefault("KL and top-1: no position is masked", []).append(name)
        if scores.n_texts(t_bin) == 1:
            groups.setdefault("standard errors: one text only", []).append(name)
        if math.isnan(scores.recovered(None, "zero", t_bin).value):
            key = "share recovered, all MLPs: ablation to zero costs next to nothing"
            groups.setdefault(key, []).append(name)
        for stratum in ("unmasked", "masked"):
            for layer, found in enumerate(evaluation.layers_by_t[stratum][t_bin]):
                if found.undefined is not None and found.n_rows:
                    key = f"FVU and EV, {stratum} positions, layer {layer}: these positions hardly vary"
                    groups.setdefault(key, []).append(name)
            if not evaluation.layers_by_t[stratum][t_bin][0].n_rows:
                groups.setdefault(f"reconstruction, {stratum}: no such positions", []).append(name)
    return [f"t {', '.join(names)}: {reason}" for reason, names in groups.items()]


def mean_fvu(evaluation: Evaluation, stratum: str = "all", *, explained: bool = False) -> str:
    """The mean over those layers that have an FVU, as text, or of 1 - FVU as a percentage."""
    values = [layer.fvu for layer in evaluation.layers[stratum]]
    defined = [value for value in values if math.isfinite(value)]
    if not defined:
        return UNDEFINED
    mean = sum(defined) / len(defined)
    only = "" if len(defined) == len(values) else f" (of {len(defined)} of {len(values)} layers)"
    return (f"{1 - mean:.1%}" if explained else f"{mean:.3f}") + only


def layer_table(evaluation: Evaluation) -> list[str]:
    """The table of layers for the terminal."""
    return eval_tables.overview_table(evaluation)
