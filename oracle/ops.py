"""The exact operations: same definition, same bits, on every machine. SPEC.md says what each one is.

All take and return float32 tensors on one device, compute without gradients, refuse values that are not
finite, and return zeros without a sign.

>>> import torch
>>> one_ulp = 2.0**-23
>>> linear(torch.tensor([[1.0, one_ulp / 2, 2.0**-60]]), torch.ones(1, 3)).item() - 1.0 == one_ulp
True
>>> torch.nn.functional.linear(torch.tensor([[1.0, one_ulp / 2, 2.0**-60]]), torch.ones(1, 3)).item() - 1.0
0.0
"""

# Axes: batch, pos, d (any width), head, d_head, query, key, half (d_head / 2)

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Float32, Shaped
from oracle import elementwise, tables
from oracle.errors import ExactError, NotFiniteError
from oracle.guard import exact_operation, require_finite
from oracle.operands import broadcast_shape, require_fit, shapes_of
from oracle.paths import fused_for
from oracle.products import (
    Rows,
    Workspace,
    as_columns,
    as_rows,
    certified,
    raw_product,
    require_representable,
    tile_elements,
    tiles,
)
from oracle.recipes import MAX_SUM_TERMS
from oracle.selftest import require_workers
from oracle.weights import WeightCache

__all__ = [
    "linear",
    "matmul",
    "add",
    "mul",
    "modulate",
    "layer_norm",
    "gelu_tanh",
    "silu",
    "attention_scores",
    "softmax",
    "mix",
    "attention",
    "rotary_tables",
    "rotate",
    "time_features",
]

WEIGHT_ELEMENTS_AT_ONCE = 1 << 22
"""Weights converted to float64 at a time where they are not kept (32 MiB)."""

LEAST_COLUMNS = 256
"""Outputs of a linear map that are computed together however many rows there are."""

ATTENTION_TILE = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Scores held at a time (8 MiB of float64 on a CPU)."""

_NOTHING_KEPT = WeightCache(0)


@exact_operation
def linear(
    x: Float32[Tensor, "*rows d_in"],
    weight: Float32[Tensor, "d_out d_in"],
    bias: Float32[Tensor, " d_out"] | None = None,
    *,
    cache: WeightCache | None = None,
) -> Float32[Tensor, "*rows d_out"]:
    """x times weight transposed, plus bias: the exact value rounded once.

    Args:
        cache: Keeps float64 copies of weights between calls.
    """
    require_fit("linear", x=(x, "*rows d_in"), weight=(weight, "d_out d_in"), bias=(bias, "d_out"))
    n_out, n_in = weight.shape
    if bias is not None:
        require_finite(bias, "linear: bias")
    n_rows = x.shape[:-1].numel()
    if n_in == 0 or n_out == 0:  # a sum of no products is the bias
        empty = x.new_zeros(*x.shape[:-1], n_out)
        return empty if bias is None else empty + bias.detach()
    rows = as_rows(x.reshape(n_rows, n_in), "linear: x")
    out = x.new_empty(1, n_rows, n_out)
    require_workers(out.device, out.numel())
    biases = None if bias is None else bias.detach().double()
    largest = float(rows.norms.amax()) if n_rows else 0.0
    work = Workspace(x.device)
    # Whole columns of outputs, as even as can be: large products run best.
    fit = max(1, min(WEIGHT_ELEMENTS_AT_ONCE // max(1, n_in), tile_elements(x.device) // max(1, n_rows)))
    step = -(-n_out // max(1, -(-n_out // max(fit, LEAST_COLUMNS))))
    for start, columns in (cache or _NOTHING_KEPT).rows_of(weight, step, "linear: weight"):
        stop = start + columns.norms.shape[1]
        part = None if biases is None else biases[start:stop]
        for _, block in tiles(1, n_rows, stop - start, tile_elements(x.device)):
            certified(rows.part(slice(0, 1), block), columns, out[:, block, start:stop], work, part)
        reach = largest * float(columns.norms.amax()) + (0.0 if part is None else float(part.abs().amax()))
        require_representable(out[..., start:stop], reach, "linear")
    return out.reshape(*x.shape[:-1], n_out)


@exact_operation
def matmul(
    a: Float32[Tensor, "*#batch m k"], b: Float32[Tensor, "*#batch k n"]
) -> Float32[Tensor, "*shape m n"]:
    """The matrix product, each element the exact sum rounded once; leading axes broadcast."""
    require_fit("matmul", a=(a, "*leading_of_a m k"), b=(b, "*leading_of_b k n"))
    batch = broadcast_shape("matmul", 2, a=a, b=b)
    left = as_rows(a.expand(*batch, *a.shape[-2:]), "matmul: a")
    right = as_columns(b.expand(*batch, *b.shape[-2:]), "matmul: b")
    return _products(left, right, "matmul").reshape(*batch, a.shape[-2], b.shape[-1])


def _products(a: Rows, b: Rows, what: str, factor: float = 1.0) -> Float32[Tensor, "group row col"]:
    n_groups, n_rows, n_cols = a.values.shape[0], a.values.shape[1], b.values.shape[1]
    out = a.values.new_empty(n_groups, n_rows, n_cols, dtype=torch.float32)
    require_workers(out.device, out.numel())
    work = Workspace(out.device)
    for groups, block in tiles(n_groups, n_rows, n_cols, tile_elements(out.device)):
        certified(a.part(groups, block), b.part(groups, slice(None)), out[groups, block], work, factor=factor)
    if out.numel():
        require_representable(out, float(a.norms.amax()) * float(b.norms.amax()) * factor, what)
    return out


@exact_operation
def add(a: Tensor, b: Tensor) -> Float32[Tensor, "..."]:
    """Element-wise sum, rounded once; broadcasting."""
    broadcast_shape("add", a=a, b=b)
    return _finite("add: the sum", "add", a.shape == b.shape, a, b)


@exact_operation
def mul(a: Tensor, b: Tensor) -> Float32[Tensor, "..."]:
    """Element-wise product, rounded once; broadcasting."""
    broadcast_shape("mul", a=a, b=b)
    if _one_a_sequence(b, a):
        a, b = b, a
    return _finite("mul: the product", "mul", _one_a_sequence(a, b), a, b)


@exact_operation
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Float32[Tensor, "..."]:
    """adaLN: x * (1 + scale) + shift, in float64, rounded once to float32; broadcasting."""
    broadcast_shape("modulate", x=x, shift=shift, scale=scale)
    regular = _one_a_sequence(x, shift) and _one_a_sequence(x, scale)
    return _finite("modulate: the result", "modulate", regular, x, shift, scale)


def _one_a_sequence(x: Tensor, other: Tensor) -> bool:
    """Whether other is [batch, 1, d] for x [batch, pos, d]."""
    return x.dim() == 3 and other.shape == (x.shape[0], 1, x.shape[2])


def _finite(what: str, recipe: str, regular: bool, *tensors: Tensor) -> Tensor:
    """A recipe's result, compiled if the shapes are regular; a value that is not finite cannot but show in it."""
    fused = fused_for(tensors[0].device)
    if fused is not None and regular:
        try:
            result: Tensor = getattr(fused, recipe)(*tensors)
            return result
        except NotFiniteError:
            pass  # the plain path below says where
    result = getattr(elementwise, recipe)(*tensors)
    require_finite(result, what)
    return result


@exact_operation
def layer_norm(
    x: Float32[Tensor, "*rows d"],
    weight: Float32[Tensor, " d"],
    scale: Float32[Tensor, "*rows 1"] | None = None,
) -> tuple[Float32[Tensor, "*rows d"], Float32[Tensor, "*rows 1"]]:
    """(x - mean) * scale * weight, and the scale: 1 / sqrt(biased variance + 1e-5) unless given."""
    require_fit("layer_norm", x=(x, "*rows d"), weight=(weight, "d"), scale=(scale, "*rows 1"))
    _require_length(x.shape[-1], "layer_norm")
    fused = fused_for(x.device)
    if fused is not None:
        try:
            normalized, used = fused.layer_norm(x, weight, scale)
            return normalized, used
        except NotFiniteError:
            pass  # the plain path below says where
    normalized, used = elementwise.layer_norm(x, weight, scale)
    require_finite(normalized, "layer_norm: the result")
    return normalized, used


def _require_length(n: int, what: str) -> None:
    if not 1 <= n <= MAX_SUM_TERMS:
        raise ExactError(
            f"{what}: rows must have 1 to {MAX_SUM_TERMS} values for their sums to be exact, got {n}"
        )


@exact_operation
def gelu_tanh(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """GELU in its tanh form."""
    require_finite(x, "gelu_tanh: x")
    return (fused_for(x.device) or elementwise).gelu_tanh(x)  # type: ignore[no-any-return]


@exact_operation
def silu(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """x times the logistic function of x."""
    require_finite(x, "silu: x")
    return (fused_for(x.device) or elementwise).silu(x)  # type: ignore[no-any-return]


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
    scores = _products(queries, as_rows(_per_head(k), "attention_scores: k"), "attention_scores", factor)
    return scores.reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


@exact_operation
def softmax(scores: Float32[Tensor, "*rows cols"]) -> Float32[Tensor, "*rows cols"]:
    """Over the last axis."""
    require_fit("softmax", scores=(scores, "*rows cols"))
    _require_length(scores.shape[-1], "softmax")
    require_finite(scores, "softmax: scores")
    return (fused_for(scores.device) or elementwise).softmax(scores)  # type: ignore[no-any-return]


@exact_operation
def mix(
    pattern: Float32[Tensor, "batch head query key"], v: Float32[Tensor, "batch key head d_head"]
) -> Float32[Tensor, "batch query head d_head"]:
    """Values weighted by an attention pattern."""
    require_fit("mix", pattern=(pattern, "batch head query key"), v=(v, "batch key head d_head"))
    weights = as_rows(pattern, "mix: pattern")
    mixed = _products(weights, as_columns(_per_head(v), "mix: v"), "mix")
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
    _require_length(k.shape[1], "attention")
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
    pattern = elementwise.softmax(_products(a, b, "attention", factor)).double()
    return pattern, pattern.amax(-1)


@exact_operation
def rotary_tables(
    inv_freq: Float32[Tensor, " half"], n_positions: int
) -> tuple[Float32[Tensor, "pos half"], Float32[Tensor, "pos half"]]:
    """cos and sin of position times inverse frequency, correctly rounded."""
    require_fit("rotary_tables", inv_freq=(inv_freq, "half"))
    cos, sin = tables.rotary_tables(inv_freq.detach().cpu().numpy(), n_positions)
    return torch.from_numpy(cos.copy()).to(inv_freq.device), torch.from_numpy(sin.copy()).to(inv_freq.device)


@exact_operation
def rotate(
    x: Float32[Tensor, "batch pos head d_head"],
    cos: Float32[Tensor, "pos half"],
    sin: Float32[Tensor, "pos half"],
) -> Float32[Tensor, "batch pos head d_head"]:
    """Rotary embedding in the split-half convention, each output rounded once from float64."""
    require_fit("rotate", x=(x, "batch pos head d_head"), cos=(cos, "pos half"), sin=(sin, "pos half"))
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ExactError(
            f"rotate: d_head must be twice the tables' half, got {shapes_of(x=x, cos=cos, sin=sin)}; "
            f"make the tables with rotary_tables from d_head / 2 frequencies"
        )
    return _finite("rotate: the result", "rotate", True, x, cos, sin)


@exact_operation
def time_features(sigma: Shaped[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Cosines, then sines, of sigma times 10000^(-k / half), correctly rounded."""
    require_fit("time_features", sigma=(sigma, "batch"))
    require_finite(sigma, "time_features: sigma")
    rows = [tables.time_features(value, width) for value in sigma.detach().cpu().tolist()]
    return torch.tensor(rows, dtype=torch.float32, device=sigma.device).reshape(sigma.shape[0], width)
