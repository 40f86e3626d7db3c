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

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Float32, Shaped
from oracle import elementwise, tables
from oracle.attention import attention, attention_scores, mix
from oracle.errors import ExactError, NotFiniteError
from oracle.guard import exact_operation, require_finite
from oracle.matrix_products import linear, matmul
from oracle.operands import broadcast_shape, require_fit, require_length, shapes_of
from oracle.paths import fused_for

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
    require_length(x.shape[-1], "layer_norm")
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


@exact_operation
def softmax(scores: Float32[Tensor, "*rows cols"]) -> Float32[Tensor, "*rows cols"]:
    """Over the last axis."""
    require_fit("softmax", scores=(scores, "*rows cols"))
    require_length(scores.shape[-1], "softmax")
    require_finite(scores, "softmax: scores")
    return (fused_for(scores.device) or elementwise).softmax(scores)  # type: ignore[no-any-return]


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
