"""The loops that numba compiles for `fused.py`. Each recipe is SPEC.md's, operation for operation.

Floating-point contraction and reassociation are off (numba's default), so `p * f + c` is two roundings.
A maximum is taken over order-preserving integers and a sum over integers, because the compiler vectorises
those without being allowed to reorder anything.
"""

# mypy: ignore-errors

from __future__ import annotations

import hashlib
from importlib import resources
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

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

C1, C2, C3, C4, C5, C6, C7, C8, C9 = EXP_COEFFICIENTS[1:]
RINT_BITS = np.int64(np.array(RINT).view(np.int64))
SEED = np.int64(RSQRT_SEED)
ONE = np.int64(1023)
SIGN = np.int32(0x7FFFFFFF)
MAGNITUDE = np.int64(0x7FFFFFFFFFFFFFFF)
_FILES = ("recipes.py", "kernels.py", "product_kernels.py")
_TEXT = b"".join(resources.files("oracle").joinpath(name).read_bytes() for name in _FILES)
SOURCES = np.int64(int.from_bytes(hashlib.sha256(_TEXT).digest()[:8], "little", signed=True))
"""What all loops are compiled from. numba keeps a loop on disk as long as the loop's own file is as old as it was,
also when a constant or another file's loop that went into it has changed."""


def compiled(**options):
    """numba's compiler for one function, keeping its result on disk where that is possible."""

    def decorate(function):
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # no directory to keep it in
            return njit(**settings)(function)

    return decorate


@compiled()
@no_type_check
def compiled_from():
    """SOURCES as it was when this file's loops were compiled."""
    return SOURCES


@no_type_check
def _bitcast(source, target, llvm_type):
    @intrinsic
    def cast(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], llvm_type)

        return target(source), generate

    return cast


float_bits = _bitcast(types.float64, types.int64, ir.IntType(64))
bits_float = _bitcast(types.int64, types.float64, ir.DoubleType())
single_bits = _bitcast(types.float32, types.int32, ir.IntType(32))
bits_single = _bitcast(types.int32, types.float32, ir.FloatType())


@compiled(inline="always")
@no_type_check
def exp(x, bias):
    """SPEC 2.1, times 2^(bias - 1023): both powers of two go into the exponent at once."""
    x = EXP_MIN if x < EXP_MIN else x
    x = EXP_MAX if x > EXP_MAX else x
    t = x * LOG2E
    shifted = t + RINT
    f = t - (shifted - RINT)
    p = C9
    p = p * f + C8
    p = p * f + C7
    p = p * f + C6
    p = p * f + C5
    p = p * f + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    p = p * f + 1.0
    # The low bits of `shifted` are k; they become the exponent of 2^k.
    return p * bits_float((float_bits(shifted) + bias) << np.int64(52))


@compiled(inline="always")
@no_type_check
def single(x):
    """Rounded to float32, zero without a sign."""
    return np.float32(x) + np.float32(0.0)


@compiled(inline="always")
@no_type_check
def gelu_float64(v):
    return v / (1.0 + exp(v * ((v * v) * GELU_CUBE + GELU_LINE), ONE))


@compiled(inline="always")
@no_type_check
def silu_float64(v):
    return v / (1.0 + exp(-v, ONE))


@compiled()
@no_type_check
def gelu_tanh(x, start, stop, out):
    for i in range(np.uint64(start), np.uint64(stop)):
        out[i] = single(gelu_float64(np.float64(x[i])))


@compiled()
@no_type_check
def silu(x, start, stop, out):
    for i in range(np.uint64(start), np.uint64(stop)):
        out[i] = single(silu_float64(np.float64(x[i])))


@compiled(inline="always")
@no_type_check
def row_max(scores):
    best = np.int32(-2147483648)
    for j in range(scores.size):
        bits = single_bits(scores[j])
        best = max(best, bits ^ ((bits >> np.int32(31)) & SIGN))
    return np.float64(bits_single(np.int32(best ^ ((best >> np.int32(31)) & SIGN))))


@compiled(inline="always")
@no_type_check
def numerators(scores, work):
    """exp(score - max) * 2^42 to work; returns the factor that makes them probabilities, and the largest."""
    highest = row_max(scores)
    total = np.int64(0)
    for j in range(scores.size):
        e = exp(np.float64(scores[j]) - highest, np.int64(1023 + SOFTMAX_BITS))
        work[j] = e
        total += float_bits(e + RINT)
    total -= np.int64(scores.size) * RINT_BITS
    r = 1.0 / (np.float64(total) * 2.0**-SOFTMAX_BITS)
    return r * 2.0**-SOFTMAX_BITS, r


@compiled()
@no_type_check
def softmax(scores, work, start, stop, out):
    for i in range(start, stop):
        row = out[i]
        r, _ = numerators(scores[i], work)
        for j in range(work.size):
            row[j] = single(work[j] * r)


@compiled(inline="always")
@no_type_check
def mean(values, top):
    """SPEC 2.2, of a row of float64 whose largest magnitude has the bits `top`."""
    if top == 0:
        return 0.0
    exponent = (top >> np.int64(52)) - np.int64(1022)
    up = bits_float((np.int64(MEAN_BITS) - exponent + ONE) << np.int64(52))
    down = bits_float((exponent - np.int64(MEAN_BITS) + ONE) << np.int64(52))
    total = np.int64(0)
    for j in range(values.size):
        total += float_bits(values[j] * up + RINT)
    total -= np.int64(values.size) * RINT_BITS
    return (np.float64(total) * (1.0 / np.float64(values.size))) * down


@compiled(inline="always")
@no_type_check
def rsqrt(v):
    y = bits_float(SEED - (float_bits(v) >> np.int64(1)))
    h = 0.5 * v
    for _ in range(NEWTON_STEPS):
        y = y * (1.5 - h * (y * y))
    return y


@compiled(inline="always")
@no_type_check
def scale_float64(squares, top):
    """From a row of squares whose largest has the bits `top`."""
    return rsqrt(mean(squares, top) + EPS)


@compiled()
@no_type_check
def layer_norm(x, weight, scale, given, work, start, stop, out):
    squares = np.empty(work.size)
    worst = np.int64(0)
    for i in range(start, stop):
        row, target = x[i], out[i]
        top = np.int64(0)
        for j in range(work.size):
            v = np.float64(row[j])
            work[j] = v
            top = max(top, float_bits(v) & MAGNITUDE)
        centre = mean(work, top)
        top = np.int64(0)
        for j in range(work.size):
            v = work[j] - centre
            work[j] = v
            v = v * v
            squares[j] = v
            top = max(top, float_bits(v))
        if not given:
            scale[i] = single(scale_float64(squares, top))
        s = np.float64(scale[i])
        for j in range(work.size):
            v = single((work[j] * s) * np.float64(weight[j]))
            target[j] = v
            worst = max(worst, single_bits(v) & SIGN)
    return worst


@compiled()
@no_type_check
def add(a, b, start, stop, out):
    worst = np.int64(0)
    for i in range(np.uint64(start), np.uint64(stop)):
        v = (a[i] + b[i]) + np.float32(0.0)
        out[i] = v
        worst = max(worst, single_bits(v) & SIGN)
    return worst


@compiled()
@no_type_check
def gate(x, factor, start, stop, out):
    """x [batch, pos, d] times factor [batch, 1, d]."""
    n_positions = x.shape[1]
    worst = np.int64(0)
    for i in range(start, stop):
        batch, position = i // n_positions, i % n_positions
        row, target, g = x[batch, position], out[batch, position], factor[batch, 0]
        for j in range(row.size):
            v = (row[j] * g[j]) + np.float32(0.0)
            target[j] = v
            worst = max(worst, single_bits(v) & SIGN)
    return worst


@compiled()
@no_type_check
def modulate(x, shift, scale, start, stop, out):
    n_positions = x.shape[1]
    worst = np.int64(0)
    for i in range(start, stop):
        batch, position = i // n_positions, i % n_positions
        row, target = x[batch, position], out[batch, position]
        b, m = shift[batch, 0], scale[batch, 0]
        for j in range(row.size):
            v = single(np.float64(row[j]) * (1.0 + np.float64(m[j])) + np.float64(b[j]))
            target[j] = v
            worst = max(worst, single_bits(v) & SIGN)
    return worst


@compiled()
@no_type_check
def rotate(x, cos, sin, start, stop, out):
    n_positions, n_heads, half = x.shape[1], x.shape[2], x.shape[3] // 2
    worst = np.int64(0)
    for i in range(start, stop):
        batch, position = i // n_positions, i % n_positions
        c, s = cos[position], sin[position]
        for head in range(n_heads):
            row, target = x[batch, position, head], out[batch, position, head]
            for j in range(half):
                a, b = np.float64(row[j]), np.float64(row[half + j])
                u, v = np.float64(c[j]), np.float64(s[j])
                first, second = single(a * u - b * v), single(a * v + b * u)
                target[j] = first
                target[half + j] = second
                worst = max(worst, single_bits(first) & SIGN, single_bits(second) & SIGN)
    return worst
