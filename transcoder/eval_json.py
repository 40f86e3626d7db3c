"""An evaluation as plain values for report.json: every figure, by layer, masked or not, and t-bin.

A figure in the model is {"value", "se"}, its standard error over texts; without a value it is null and
"undefined" says why. `DEFINITIONS` goes into the file.
"""

# Axes: layer, t_bin, condition

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from transcoder.eval_error_terms import NATIVE_BOUND
from transcoder.eval_passes import KINDS
from transcoder.eval_scores import LEAST_COST, ORIGINAL, Condition, Estimate
from transcoder.evaluation import Evaluation
from transcoder.metrics import DENSE, DENSITY_EDGES, LayerMetrics

DEFINITIONS = {
    "fvu": "squared error / variance of the targets about their mean, both over the positions looked at",
    "nmse": "mean squared error in units of the variance over the training store, by layer",
    "explained_variance": "pooled: 1 - sum over dimensions of var(error) / sum over dimensions of var(target)",
    "explained_variance_by_dimension": "mean over dimensions of 1 - var(error) / var(target)",
    "dense": f"share of a layer's features active at more than {DENSE:.0%} of the positions",
    "density_histogram": "features by share of positions at which they are active, in (edge, next edge] of "
    "density_edges; dead ones are not in it",
    "nelbo": "mean over all positions of -log p(x_0 | x_t) / t at masked ones and 0 at others, nats per token",
    "kl": "KL(original || condition) in nats, mean over masked positions, without the mask token",
    "raw_kl": "the same of logits before SUBS, mean over unmasked positions; under SUBS it is 0 there",
    "top1_agreement": "share of masked positions whose likeliest token is the original's",
    "recovered": "(ablated - replaced) / (ablated - original) in the NELBO, against ablation to zero and to the mean",
    "se": "standard error over texts, all sequences of equal clean tokens being one; of a difference, paired by "
    "sequence",
}


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every figure as plain values; what is undefined becomes null."""
    check = evaluation.error_terms
    content = {
        "n_sequences": evaluation.n_sequences,
        "n_texts": evaluation.n_texts,
        "n_positions": evaluation.n_positions,
        "n_masked": evaluation.n_masked,
        "n_excluded": evaluation.n_excluded,
        "t_edges": [t_bin / evaluation.t_bins for t_bin in range(evaluation.t_bins + 1)],
        "density_edges": list(DENSITY_EDGES),
        "least_cost_nats": LEAST_COST,
        "definitions": DEFINITIONS,
        "in_model": in_model(evaluation),
        "layers": {
            stratum: [_layer(found) for found in layers] for stratum, layers in evaluation.layers.items()
        },
        "layers_by_t": {
            stratum: [[_layer(found) for found in layers] for layers in by_t]
            for stratum, by_t in evaluation.layers_by_t.items()
        },
        "density": {stratum: values.tolist() for stratum, values in evaluation.density.items()},
        "error_terms": None
        if check is None
        else {**asdict(check), "native_bound": NATIVE_BOUND, "holds": check.holds},
    }
    found: dict[str, Any] = without_nan(content)
    return found


def in_model(evaluation: Evaluation) -> dict[str, Any]:
    """Figures by condition: original, all MLPs, and each alone as a list by layer."""

    def condition(name: Condition) -> dict[str, Any]:
        by_t = [_scores(evaluation, name, t_bin) for t_bin in range(evaluation.t_bins)]
        return {**_scores(evaluation, name, None), "by_t": by_t}

    return {
        "original": condition(ORIGINAL),
        "all": {kind: condition(Condition(kind)) for kind in KINDS},
        "alone": {
            kind: [condition(Condition(kind, layer)) for layer in range(evaluation.n_layers)]
            for kind in KINDS
        },
    }


def _scores(evaluation: Evaluation, condition: Condition, t_bin: int | None) -> dict[str, Any]:
    scores = evaluation.scores
    chosen = scores.chosen(t_bin)
    found: dict[str, Any] = {
        "n_sequences": int(chosen.sum()),
        "n_texts": scores.n_texts(t_bin),
        "n_masked": int(scores.n_masked[chosen].sum()),
        "nelbo": estimate(scores.nelbo(condition, t_bin)),
        "delta_nelbo": estimate(scores.delta_nelbo(condition, t_bin)),
        "kl": estimate(scores.kl(condition, t_bin)),
        "raw_kl": estimate(scores.raw_kl(condition, t_bin)),
        "top1_agreement": estimate(scores.top1_agreement(condition, t_bin)),
    }
    if condition.kind == "replaced":
        found["recovered"] = {
            "zero": estimate(scores.recovered(condition.layer, "zero", t_bin)),
            "mean": estimate(scores.recovered(condition.layer, "mean", t_bin)),
        }
    return found


def estimate(found: Estimate) -> dict[str, Any]:
    """A figure, its standard error, and why one of them is null.

    >>> estimate(Estimate(0.5, 0.1))
    {'value': 0.5, 'se': 0.1}
    """
    shown: dict[str, Any] = without_nan({"value": found.value, "se": found.se})
    return shown if found.undefined is None else {**shown, "undefined": found.undefined}


def _layer(found: LayerMetrics) -> dict[str, Any]:
    shown = asdict(found)
    if found.undefined is None:
        del shown["undefined"]
    return shown


def without_nan(value: Any) -> Any:
    """The same with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
