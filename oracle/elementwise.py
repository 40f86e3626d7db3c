"""The recipes of SPEC.md sections 2 and 3 that are no matrix product, in plain torch operations.

Only operations that every torch build rounds alike are used: + - * / between tensors, conversion between
float32 and float64, comparisons, integer arithmetic on bit patterns. torch's own exp, tanh, sqrt, softmax and
layer_norm give other bits on another processor. Work goes in pieces that stay in cache.
"""

# Axes: batch, pos, d, row, head, d_head, half (d_head / 2)

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Float32, Float64
from oracle.recipes import (
    EPS,
    EXP_COEFFICIENTS,
    EXP_MAX,
    EXP_MIN,
    GELU_CUBE,
    GELU_LINE,
    LOG2E,
    MEAN_BITS,
    NEWTON_STEPS,
    RINT,
    RSQRT_SEED,
    SOFTMAX_BITS,
)

PIECE_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 24}
EXACT_FLOAT_TERMS = 2048
"""Up to this many counts of 2^42 their float64 sum is exact in any order; beyond, int64 adds them."""


def _piece(device: torch.device) -> int:
    return PIECE_ELEMENTS.get(device.type, PIECE_ELEMENTS["cpu"])


def single(x: Tensor) -> Tensor:
    """Float64 rounded to float32, zeros without a sign."""
    return x.float().add_(0.0)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, from int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exp_(x: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """SPEC 2.1; x is used up."""
    t = x.clamp_(EXP_MIN, EXP_MAX).mul_(LOG2E)
    shifted = t + RINT
    f = t.sub_(shifted - RINT)
    p = f * EXP_COEFFICIENTS[9]
    p.add_(EXP_COEFFICIENTS[8])
    for coefficient in reversed(EXP_COEFFICIENTS[:8]):
        p.mul_(f).add_(coefficient)
    # The low bits of `shifted` are k; they become the exponent of 2^k.
    power = shifted.view(torch.int64).add_(1023).bitwise_left_shift_(52)
    return p.mul_(power.view(torch.float64))


def _in_pieces(x: Tensor, recipe: Callable[[Tensor], Tensor]) -> Tensor:
    """A recipe on float64 pieces of a float32 tensor, as float32 of its shape."""
    flat = x.detach().contiguous().reshape(-1)
    out = torch.empty_like(flat)
    step = _piece(x.device)
    for i in range(0, flat.numel(), step):
        out[i : i + step] = recipe(flat[i : i + step].double())
    return out.add_(0.0).reshape(x.shape)


def gelu_float64(x: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """x / (1 + exp(-2u)), before it is rounded to float32."""
    return x / exp_((x * x).mul_(GELU_CUBE).add_(GELU_LINE).mul_(x)).add_(1.0)


def silu_float64(x: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """x / (1 + exp(-x)), before it is rounded to float32."""
    return x / exp_(-x).add_(1.0)


def gelu_tanh(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """GELU in its tanh form."""
    return _in_pieces(x, gelu_float64)


def silu(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """x times the logistic function of x."""
    return _in_pieces(x, silu_float64)


def softmax_float64(scores: Float64[Tensor, "row n"]) -> Float64[Tensor, "row n"]:
    """Probabilities before they are rounded to float32; denominators from exact integer sums."""
    numerators = exp_(scores - scores.amax(-1, keepdim=True))
    total = exact_total((numerators * 2.0**SOFTMAX_BITS).add_(RINT).sub_(RINT)).mul_(2.0**-SOFTMAX_BITS)
    return numerators.mul_(torch.ones_like(total) / total)


def softmax(scores: Float32[Tensor, "*rows cols"]) -> Float32[Tensor, "*rows cols"]:
    """Over the last axis."""
    source = scores.detach().reshape(-1, scores.shape[-1])
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    step = max(1, _piece(scores.device) // max(1, source.shape[1]))
    for i in range(0, source.shape[0], step):
        out[i : i + step] = softmax_float64(source[i : i + step].double())
    return out.add_(0.0).reshape(scores.shape)


def exact_total(counts: Float64[Tensor, "row n"]) -> Float64[Tensor, "row 1"]:
    """The sum of each row of whole numbers up to 2^42, rounded once."""
    if counts.shape[1] > EXACT_FLOAT_TERMS:
        counts = counts.to(torch.int64)
    return counts.sum(-1, keepdim=True).double()


def mean(values: Float64[Tensor, "row n"]) -> Float64[Tensor, "row 1"]:
    """SPEC 2.2: the mean of each row by an exact integer sum."""
    top = values.abs().amax(-1, keepdim=True)
    # A row of zeros has no exponent; any that keeps the powers in range leaves its mean at zero.
    exponent = ((top.view(torch.int64) >> 52) - 1022).clamp_min_(-900)
    counts = (values * power_of_two(MEAN_BITS - exponent)).add_(RINT).sub_(RINT)
    return (exact_total(counts) * (1.0 / values.shape[-1])) * power_of_two(exponent - MEAN_BITS)


def rsqrt(v: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """SPEC 2.3: 1 / sqrt(v) by Newton steps from an integer seed."""
    y = (RSQRT_SEED - (v.view(torch.int64) >> 1)).view(torch.float64)
    h = 0.5 * v
    for _ in range(NEWTON_STEPS):
        y = y * (1.5 - h * (y * y))
    return y


def scale_float64(centred: Float64[Tensor, "row d"]) -> Float64[Tensor, "row 1"]:
    """LayerNorm's 1 / sqrt(variance + 1e-5) before it is rounded to float32."""
    return rsqrt(mean(centred * centred).add_(EPS))


def layer_norm(
    x: Float32[Tensor, "*rows d"],
    weight: Float32[Tensor, " d"],
    scale: Float32[Tensor, "*rows 1"] | None = None,
) -> tuple[Float32[Tensor, "*rows d"], Float32[Tensor, "*rows 1"]]:
    """(x - mean) * scale * weight, and the scale: 1 / sqrt(variance + 1e-5) unless given."""
    source = x.detach().reshape(-1, x.shape[-1])
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    scales = out.new_empty(source.shape[0], 1) if scale is None else scale.detach().reshape(-1, 1)
    weights = weight.detach().double()
    step = max(1, _piece(x.device) // max(1, source.shape[1]))
    for i in range(0, source.shape[0], step):
        centred = source[i : i + step].double()
        centred.sub_(mean(centred))
        if scale is None:
            scales[i : i + step] = scale_float64(centred)
        out[i : i + step] = centred.mul_(scales[i : i + step].double()).mul_(weights)
    return out.add_(0.0).reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def add(a: Tensor, b: Tensor) -> Float32[Tensor, "..."]:
    """a + b, rounded once."""
    return (a + b).add_(0.0)


def mul(a: Tensor, b: Tensor) -> Float32[Tensor, "..."]:
    """a * b, rounded once."""
    return (a * b).add_(0.0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Float32[Tensor, "..."]:
    """x * (1 + scale) + shift in float64, rounded once to float32."""
    factor = scale.detach().double().add_(1.0)
    return single(x.detach().double().mul(factor).add(shift.detach().double()))


def rotate(
    x: Float32[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "pos half"],
    sin: Float[Tensor, "pos half"],
) -> Float32[Tensor, "batch pos head d_head"]:
    """Split-half rotation in float64, rounded once to float32."""
    first, second = x.detach().double().chunk(2, dim=-1)
    c, s = cos[:, None].double(), sin[:, None].double()
    return single(torch.cat((first * c - second * s, first * s + second * c), dim=-1))
