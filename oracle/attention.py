"""Exact attention: its scores, its mixing of values, and all of it a block of queries at a time."""

# Axes: batch, pos, head, d_head, query, key, group (a head of a sequence), row (a query), col (a key)

from __future__ import annotations

import math

from torch import Tensor

from mdlm_interp.shapes import Float32
from oracle import elementwise, tables
from oracle.errors import ExactError
from oracle.guard import exact_operation
from oracle.matrix_products import rounded_products
from oracle.operands import require_fit, require_length, shapes_of
from oracle.paths import fused_for
from oracle.products import (
    Rows,
    Workspace,
    as_columns,
    as_rows,
    certified,
    raw_product,
    require_representable,
    tiles,
)
from oracle.selftest import require_workers

ATTENTION_TILE = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Scores held at a time (8 MiB of float64 on a CPU)."""


def _per_head(x: Tensor) -> Tensor:
    """[batch, pos, head, d_head] as [batch, head, pos, d_head]."""
    return x.transpose(1, 2)


def _scaled_query(q: Tensor, what: str) -> tuple[Rows, float]:
    """Queries with as much of 1 / sqrt(d_head) as can be multiplied in exactly, and the rest of the factor."""
    if q.shape[-1] == 0:
        raise ExactError(
            f"{what}: d_head must be at least 1, got {shapes_of(q=q)}; are the last axes in order?"
        )
    factor = tables.inverse_square_root(q.shape[-1])
    if math.frexp(factor)[0] == 0.5:
        return as_rows(_per_head(q), f"{what}: q", factor), 1.0
    return as_rows(_per_head(q), f"{what}: q"), factor


@exact_operation
def attention_scores(
    q: Float32[Tensor, "batch query head d_head"], k: Float32[Tensor, "batch key head d_head"]
) -> Float32[Tensor, "batch head query key"]:
    """q . k / sqrt(d_head), the scale being part of the single rounding."""
    require_fit("attention_scores", q=(q, "batch query head d_head"), k=(k, "batch key head d_head"))
    queries, factor = _scaled_query(q, "attention_scores")
    scores = rounded_products(
        queries, as_rows(_per_head(k), "attention_scores: k"), "attention_scores", factor
    )
    return scores.reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


@exact_operation
def mix(
    pattern: Float32[Tensor, "batch head query key"], v: Float32[Tensor, "batch key head d_head"]
) -> Float32[Tensor, "batch query head d_head"]:
    """Values weighted by an attention pattern."""
    require_fit("mix", pattern=(pattern, "batch head query key"), v=(v, "batch key head d_head"))
    weights = as_rows(pattern, "mix: pattern")
    mixed = rounded_products(weights, as_columns(_per_head(v), "mix: v"), "mix")
    return mixed.reshape(*pattern.shape[:3], v.shape[-1]).transpose(1, 2)


@exact_operation
def attention(
    q: Float32[Tensor, "batch query head d_head"],
    k: Float32[Tensor, "batch key head d_head"],
    v: Float32[Tensor, "batch key head d_head"],
) -> Float32[Tensor, "batch query head d_head"]:
    """mix(softmax(attention_scores(q, k)), v), a block of queries at a time."""
    require_fit(
        "attention",
        q=(q, "batch query head d_head"),
        k=(k, "batch key head d_head"),
        v=(v, "batch key head d_head"),
    )
    require_length(k.shape[1], "attention")
    queries, factor = _scaled_query(q, "attention")
    keys, values = as_rows(_per_head(k), "attention: k"), as_columns(_per_head(v), "attention: v")
    out = q.new_empty(queries.values.shape[0], q.shape[1], v.shape[-1])
    scores_work, mixed_work = Workspace(q.device), Workspace(q.device)
    limit = ATTENTION_TILE[q.device.type]
    require_workers(out.device, out.shape[:2].numel() * k.shape[1])
    for groups, block in tiles(out.shape[0], q.shape[1], k.shape[1], limit):
        a, b = queries.part(groups, block), keys.part(groups, slice(None))
        pattern, peaks = _pattern(a, b, factor, scores_work)
        # Probabilities sum to 1 within rounding, so their squares sum to less than the largest of them.
        norms = peaks.mul_(1.01).pow_(0.5)
        certified(Rows(pattern, norms), values.part(groups, slice(None)), out[groups, block], mixed_work)
    if out.numel():
        require_representable(out, 2.0 * float(values.norms.amax()), "attention")
    return out.reshape(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _pattern(a: Rows, b: Rows, factor: float, work: Workspace) -> tuple[Tensor, Tensor]:
    """softmax of the scores of a block, as float64 that float32 can hold, and about each row's largest."""
    reach = float(a.norms.amax()) * float(b.norms.amax()) * factor if a.norms.numel() else 0.0
    fused = fused_for(a.values.device)
    if fused is not None and reach < 2.0**127:
        product, unit = raw_product(a, b, work)
        if factor != 1.0:
            product.mul_(factor)
        peaks = fused.attend(product, a.values, b.values, a.norms * (unit * factor), b.norms, factor, a.norms)
        if peaks is not None:
            return product, peaks
    pattern = elementwise.softmax(rounded_products(a, b, "attention", factor)).double()
    return pattern, pattern.amax(-1)
