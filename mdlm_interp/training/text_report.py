"""The final figures of a model trained on text: its bound on all held-out text, beside count models."""

# Axes: batch, pos

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdlm_interp.evaluation import nelbo
from mdlm_interp.model import HookedMDLM
from mdlm_interp.training.baselines import bigram_nats, unigram_nats
from mdlm_interp.training.config import Form
from mdlm_interp.training.data import TokenStreams
from mdlm_interp.training.loop import finite

FINAL_TIMES = 8
"""Noise levels a held-out sequence in the final evaluation."""

COUNTED_TOKENS = 50_000_000
"""Training tokens that the count models count, at most: pairs of more would not fit a small machine."""

FORMS: dict[Form, str] = {
    "wrapped": "wrapped sequences: an end-of-text at both ends, as trained",
    "bare": "bare sequences: text from end to end, as trained",
}


def evaluate(
    model: HookedMDLM, streams: TokenStreams, form: Form, blocks: NDArray[np.int64]
) -> dict[str, Any]:
    """The report on held-out sequences of one form [batch pos], as JSON holds it."""
    bound = nelbo(model, torch.from_numpy(blocks), times_per_sequence=FINAL_TIMES, progress=True)
    wrapped, length = form == "wrapped", blocks.shape[1]
    text_tokens = blocks.shape[0] * (length - 2 if wrapped else length)
    text_bytes = text_tokens * streams.held_out_bytes / len(streams.held_out)
    vocab_size = model.config.vocab_size
    counted = streams.train[:COUNTED_TOKENS]
    nats = {
        "unigram": unigram_nats(counted, blocks, vocab_size, wrapped=wrapped),
        "bigram": bigram_nats(counted, blocks, vocab_size, wrapped=wrapped),
        "model": bound.nats_per_token,
    }
    estimator = (
        f"continuous-time bound, {FINAL_TIMES} stratified times a sequence of {length} tokens, "
        f"t in [0.001, 1], mean over all positions"
    )
    if wrapped:
        estimator += "; the end-of-texts at both ends count as positions and cost the count models nothing"
    if len(counted) < len(streams.train):
        estimator += f"; the count models counted the first {len(counted):,} training tokens"
    return {
        "nats_per_token": nats,
        "bits_per_byte": {
            name: value * blocks.size / text_bytes / math.log(2) for name, value in nats.items()
        },
        "standard_error_nats": finite(bound.standard_error),
        "masked_cross_entropy_by_time": [finite(value) for value in bound.by_time],
        "tokens": blocks.size,
        "estimator": estimator,
    }


def table(report: Mapping[Any, dict[str, Any]]) -> str:
    """Held-out figures of each `Form` as text, a table each."""
    lines = []
    for form, figures in report.items():
        lines += [f"held-out text, {FORMS[form]}", f"{'':14} {'nats/token':>10} {'bits/byte':>10}"]
        for name, nats in figures["nats_per_token"].items():
            lines.append(f"{name:14} {nats:10.4f} {figures['bits_per_byte'][name]:10.4f}")
        error = figures["standard_error_nats"]
        spread = "unknown from one sequence" if error is None else f"{error:.4f} nats"
        lines.append(f"(model: upper bound, standard error {spread})")
    return "\n".join([*lines, ""])
