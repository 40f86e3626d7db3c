"""What the demo shows, as lines of text, and the plot of feature effects."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mdlm_interp.filling import FillResult
from mdlm_interp.program import invocation
from mdlm_interp.tokenizers import Tokenizer
from transcoder.checkpoint import write_json
from transcoder.effects import FeatureEffect, PredictionEffects
from transcoder.evaluation import MEAN, ORIGINAL, REPLACED, ZERO, Evaluation
from transcoder.report import DOTS_PER_INCH, new_figure, table

SHOWN = 6
"""Features listed and plotted."""


def filled(sentence: str, result: FillResult) -> list[str]:
    """A sentence, its completion, and the best candidates of each mask."""
    lines = [f"  {sentence}", f"    -> {result.text.strip()}"]
    for number, mask in enumerate(result.masks, 1):
        words = ", ".join(f"{word.strip() or repr(word)} {probability:.0%}" for word, probability in mask.top)
        lines.append(f"    mask {number}: {words}")
    return lines


def effects(sentence: str, ids: Sequence[int], found: PredictionEffects, tokenizer: Tokenizer) -> list[str]:
    """The features that a prediction depends on, and the prediction without the first of them."""
    word = tokenizer.token(found.token)
    lines = [
        f"  {sentence}",
        f"  the model's first choice: {word!r}. Ablating one feature at one position:",
        "",
    ]
    rows = [
        [
            _name(effect),
            repr(tokenizer.token(ids[effect.position])),
            f"{effect.activation:.2f}",
            f"{effect.attribution:+.3f}",
            f"{effect.logit_change:+.3f}",
            f"{effect.probability_before:.1%} -> {effect.probability_after:.1%}",
        ]
        for effect in found.effects[:SHOWN]
    ]
    head = ["feature", "token", "activation", "estimated", "log-odds change", f"P({word.strip()})"]
    lines += ["  " + line for line in table(head, rows)]
    if found.effects:
        lines += ["", f"  likeliest words before and after ablating {_name(found.effects[0])}:"]
        lines += ["  " + line for line in top_table(found, tokenizer)]
    return lines


def top_table(found: PredictionEffects, tokenizer: Tokenizer) -> list[str]:
    """The likeliest tokens side by side."""
    rows = [
        [repr(tokenizer.token(before)), f"{p:.1%}", repr(tokenizer.token(after)), f"{q:.1%}"]
        for (before, p), (after, q) in zip(found.top_before, found.top_after, strict=True)
    ]
    return table(["before", "", "after", ""], rows)


def overview(
    evaluation: Evaluation, found: PredictionEffects, tokenizer: Tokenizer, report: Path, seconds: float
) -> list[str]:
    """The demo's results in one table."""
    layers = evaluation.layers["all"]
    n_layers, features = len(layers), evaluation.density.size
    rows = [
        ["variance of MLP outputs explained, held out", f"{1 - sum(m.fvu for m in layers) / n_layers:.1%}"],
        ["active features per layer and token", f"{sum(m.l0 for m in layers) / n_layers:.1f}"],
        ["features never active on held-out text", f"{sum(m.dead for m in layers)} of {features}"],
        ["NELBO of the model, nats per token", f"{evaluation.conditions[ORIGINAL].nelbo:.3f}"],
        ["  change with all MLPs replaced", f"{evaluation.delta_nelbo(REPLACED):+.3f}"],
        ["  change with all MLPs at their mean", f"{evaluation.delta_nelbo(MEAN):+.3f}"],
        ["  change with all MLPs at zero", f"{evaluation.delta_nelbo(ZERO):+.3f}"],
        ["share of the MLPs' contribution recovered", f"{evaluation.share_recovered:.1%}"],
    ]
    if found.effects:
        best = found.effects[0]
        change = f"{best.probability_before:.1%} -> {best.probability_after:.1%}"
        rows.append([f"P({tokenizer.token(found.token).strip()}) without {_name(best)}", change])
    rows += [["report", str(report)], ["took", f"{seconds:.0f} s"]]
    return table(["what", "result"], rows)


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
    figure, axes = new_figure()
    shown = found.effects[: 2 * SHOWN][::-1]
    numbers = range(len(shown))
    axes.barh([n + 0.2 for n in numbers], [e.logit_change for e in shown], 0.38, label="ablated")
    axes.barh([n - 0.2 for n in numbers], [e.attribution for e in shown], 0.38, label="first-order estimate")
    axes.set_yticks(list(numbers), [f"{_name(effect)} at {effect.position}" for effect in shown])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the log-odds (nats)")
    axes.set_ylabel("feature and position")
    axes.set_title(f"Ablating one feature: effect on {tokenizer.token(found.token)!r} at {found.position}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(files[1], dpi=DOTS_PER_INCH)
    return files


def _name(effect: FeatureEffect) -> str:
    return f"layer {effect.layer} feature {effect.feature}"
