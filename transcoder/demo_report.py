"""What the demo shows, as lines of text, and the plot of feature effects."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mdlm_interp.atomic_files import replacing
from mdlm_interp.filling import FillResult
from mdlm_interp.program import invocation
from mdlm_interp.tokenizers import Tokenizer
from transcoder.checkpoint import write_json
from transcoder.effects import FeatureEffect, PredictionEffects
from transcoder.eval_scores import MEAN, ORIGINAL, REPLACED, ZERO
from transcoder.eval_tables import figure as estimated
from transcoder.eval_tables import number, table
from transcoder.evaluation import Evaluation
from transcoder.figures import DOTS_PER_INCH, new_figure
from transcoder.report import MEAN_NOTE, mean_fvu

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6
"""Features listed and plotted."""


def filled(sentence: str, result: FillResult) -> list[str]:
    """A sentence, its completion, and the best candidates of each mask."""
    lines = [f"  {sentence}", f"    -> {result.text.strip()}"]
    for index, mask in enumerate(result.masks, 1):
        words = ", ".join(f"{readable(text)} {probability:.0%}" for text, probability in mask.top)
        lines.append(f"    mask {index}: {words}")
    return lines


def effects(sentence: str, ids: Sequence[int], found: PredictionEffects, tokenizer: Tokenizer) -> list[str]:
    """The features that a prediction depends on, and the prediction without the first of them."""
    word = readable(tokenizer.token(found.token))
    lines = [
        f"  {sentence}",
        f"  the model's first choice at position {found.position}: {word}. Ablating one feature at one position:",
        "",
    ]
    rows = [
        [
            _name(effect),
            f"{readable(tokenizer.token(ids[effect.position]))} at {effect.position}",
            f"{effect.activation:.2f}",
            f"{effect.attribution:+.3f}",
            f"{effect.logit_change:+.3f}",
            f"{effect.probability_before:.1%} -> {effect.probability_after:.1%}",
        ]
        for effect in found.effects[:SHOWN]
    ]
    head = ["feature", "token at position", "activation", "estimated", "log-odds change", f"P({word})"]
    lines += ["  " + line for line in table(head, rows)]
    if found.effects:
        lines += ["", f"  likeliest words before and after ablating {_name(found.effects[0])}:"]
        lines += ["  " + line for line in top_table(found, tokenizer)]
    return lines


def top_table(found: PredictionEffects, tokenizer: Tokenizer) -> list[str]:
    """The likeliest tokens side by side."""
    rows = [
        [readable(tokenizer.token(before)), f"{p:.1%}", readable(tokenizer.token(after)), f"{q:.1%}"]
        for (before, p), (after, q) in zip(found.top_before, found.top_after, strict=True)
    ]
    return table(["before", "", "after", ""], rows)


def overview(
    evaluation: Evaluation, found: PredictionEffects, tokenizer: Tokenizer, report: Path, seconds: float
) -> list[str]:
    """The demo's results in one table."""
    layers = evaluation.layers["all"]
    n_layers, features = len(layers), evaluation.density["all"].size
    rows = [
        ["variance of MLP outputs explained, held out", mean_fvu(evaluation, explained=True)],
        ["  among unmasked positions", mean_fvu(evaluation, "unmasked", explained=True)],
        ["  among masked positions", mean_fvu(evaluation, "masked", explained=True)],
        ["active features per layer and token", f"{sum(m.l0 for m in layers) / n_layers:.1f}"],
        ["features never active on held-out text", f"{sum(m.dead or 0 for m in layers)} of {features}"],
        ["NELBO of the model, nats per token", number(evaluation.scores.nelbo(ORIGINAL).value, ".3f")],
        ["  change with all MLPs replaced", estimated(evaluation.delta_nelbo(REPLACED), "+.3f")],
        ["  change with all MLPs at their mean", estimated(evaluation.delta_nelbo(MEAN), "+.3f")],
        ["  change with all MLPs at zero", estimated(evaluation.delta_nelbo(ZERO), "+.3f")],
        ["share of the MLPs' contribution recovered", estimated(evaluation.share_recovered, ".1%")],
    ]
    if found.effects:
        best = found.effects[0]
        change = f"{best.probability_before:.1%} -> {best.probability_after:.1%}"
        rows.append([f"P({readable(tokenizer.token(found.token))}) without {_name(best)}", change])
    rows += [["report", str(report)], ["took", f"{seconds:.0f} s"]]
    return [*table(["what", "result"], rows), "", MEAN_NOTE]


def next_commands(out: Path, model: str, sentence: str) -> list[str]:
    """Commands that work with what the demo made."""
    store, clt = str(out / "activations.zarr"), str(out / "clt")
    at = ["--model", model]
    commands = [
        ["fill", sentence, *at],
        ["capture", "info", store],
        ["clt", "eval", clt, store, *at, "--out", str(out / "report-2")],
        [
            "clt",
            "train",
            store,
            "--out",
            str(out / "clt-wide"),
            "--n-features",
            "1024",
            "--train.steps",
            "600",
        ],
    ]
    return [f"  {invocation()} {shlex.join(command)}" for command in commands]


def save_effects(found: PredictionEffects, tokenizer: Tokenizer, directory: Path) -> list[Path]:
    """effects.json with every ablation, and effects.png."""
    content = {
        "position": found.position,
        "token": found.token,
        "text": tokenizer.token(found.token),
        "effects": [asdict(effect) for effect in found.effects],
        "top_before": found.top_before,
        "top_after": found.top_after,
    }
    files = [directory / "effects.json", directory / "effects.png"]
    write_json(files[0], content)
    with replacing(files[1]) as partial:
        plot_effects(found, tokenizer).savefig(partial, dpi=DOTS_PER_INCH)
    return files


def plot_effects(found: PredictionEffects, tokenizer: Tokenizer) -> Figure:
    """Measured and estimated effects of the features that matter most."""
    figure, axes = new_figure()
    shown = found.effects[: 2 * SHOWN][::-1]
    numbers = range(len(shown))
    axes.barh([n + 0.2 for n in numbers], [e.logit_change for e in shown], 0.38, label="ablated")
    axes.barh([n - 0.2 for n in numbers], [e.attribution for e in shown], 0.38, label="first-order estimate")
    axes.set_yticks(list(numbers), [f"{_name(effect)}, position {effect.position}" for effect in shown])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the log-odds (nats)")
    axes.set_ylabel("feature, and where it is ablated (counted from 0)")
    word = readable(tokenizer.token(found.token))
    title = f"Ablating one feature: effect on “{word}” at position {found.position}"
    axes.set_title(title, parse_math=False)  # a token may have dollar signs
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def readable(text: str) -> str:
    """A token's text as a word in a sentence: without the space that it begins with.

    >>> readable(" park"), readable(" "), readable("\\ufffd")
    ('park', "' '", 'part of a character')
    """
    if "\ufffd" in text:
        return "part of a character"
    word = text.strip()
    return word if word and word.isprintable() else repr(text)


def _name(effect: FeatureEffect) -> str:
    return f"layer {effect.layer} feature {effect.feature}"
