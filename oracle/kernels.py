"""The loops that numba compiles for `fused.py`. Each recipe is SPEC.md's, operation for operation.

Floating-point contraction and reassociation are off (numba's default), so `p * f + c` is two roundings.
A maximum is taken over order-preserving integers and a sum over integers, because the compiler vectorises
those without being allowed to reorder anything.
"""

# mypy: ignore-errors

from __future__ import annotations

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
LANES = 8
SEGMENT = 128
"""Columns that are looked at again if one of them is undecided."""
SIGN = np.int32(0x7FFFFFFF)
MAGNITUDE = np.int64(0x7FFFFFFFFFFFFFFF)


def compiled(**options):
    """numba's compiler for one function, keeping its result on disk where that is possible."""

    def decorate(function):
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # no directory to keep it in
            return njit(**settings)(function)

    return decorate


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
def _exp(x, bias):
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
def _single(x):
    """Rounded to float32, zero without a sign."""
    return np.float32(x) + np.float32(0.0)


@compiled()
@no_type_check
def gelu_tanh(x, start, stop, out):
    for i in range(np.uint64(start), np.uint64(stop)):
        v = np.float64(x[i])
        out[i] = _single(v / (1.0 + _exp(v * ((v * v) * GELU_CUBE + GELU_LINE), ONE)))


@compiled()
@no_type_check
def silu(x, start, stop, out):
    for i in range(np.uint64(start), np.uint64(stop)):
        v = np.float64(x[i])
        out[i] = _single(v / (1.0 + _exp(-v, ONE)))


@compiled(inline="always")
@no_type_check
def _row_max(scores):
    best = np.int32(-2147483648)
    for j in range(scores.size):
        bits = single_bits(scores[j])
        best = max(best, bits ^ ((bits >> np.int32(31)) & SIGN))
    return np.float64(bits_single(np.int32(best ^ ((best >> np.int32(31)) & SIGN))))


@compiled(inline="always")
@no_type_check
def _numerators(scores, work):
    """exp(score - max) * 2^42 to work; returns the factor that makes them probabilities, and the largest."""
    highest = _row_max(scores)
    total = np.int64(0)
    for j in range(scores.size):
        e = _exp(np.float64(scores[j]) - highest, np.int64(1023 + SOFTMAX_BITS))
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
        r, _ = _numerators(scores[i], work)
        for j in range(work.size):
            row[j] = _single(work[j] * r)


@compiled(inline="always")
@no_type_check
def _mean(values, top):
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
def _rsqrt(v):
    y = bits_float(SEED - (float_bits(v) >> np.int64(1)))
    h = 0.5 * v
    for _ in range(NEWTON_STEPS):
        y = y * (1.5 - h * (y * y))
    return y


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
        mean = _mean(work, top)
        top = np.int64(0)
        for j in range(work.size):
            v = work[j] - mean
            work[j] = v
            v = v * v
            squares[j] = v
            top = max(top, float_bits(v))
        if not given:
            scale[i] = _single(_rsqrt(_mean(squares, top) + EPS))
        s = np.float64(scale[i])
        for j in range(work.size):
            v = _single((work[j] * s) * np.float64(weight[j]))
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
            v = _single(np.float64(row[j]) * (1.0 + np.float64(m[j])) + np.float64(b[j]))
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
                first, second = _single(a * u - b * v), _single(a * v + b * u)
                target[j] = first
                target[half + j] = second
                worst = max(worst, single_bits(first) & SIGN, single_bits(second) & SIGN)
    return worst


@compiled(inline="always")
@no_type_check
def _two_sum(a, b):
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


@compiled(inline="always")
@no_type_check
def _two_product(a, b):
    p = a * b
    t = a * 134217729.0
    a_high = t - (t - a)
    a_low = a - a_high
    t = b * 134217729.0
    b_high = t - (t - b)
    b_low = b - b_high
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


@compiled(inline="always")
@no_type_check
def _round_to_odd(high, low):
    if high == 0.0:
        return low
    bits = float_bits(high)
    if low == 0.0 or bits & np.int64(1):
        return high
    return bits_float(bits + (np.int64(1) if (low > 0.0) == (high > 0.0) else np.int64(-1)))


@compiled(inline="always")
@no_type_check
def _decide(high, low, bound):
    """high + low within bound as float32, and whether that is certain; see repair.round_sum."""
    below = np.float32(_round_to_odd(high, low - 2.0 * bound))
    above = np.float32(_round_to_odd(high, low + 2.0 * bound))
    return above + np.float32(0.0), below == above and (bound == 0.0 or bound <= abs(high) * 2.0**-55)


@compiled()
@no_type_check
def _dot_quickly(a, b, bias, size, sums, errors):
    """Sum of a * b + bias by a tree of exact additions, their errors added in plain float64.

    `size` bounds the sum of the terms' sizes. Decides all but one in millions.
    """
    n = a.size + 1
    for k in range(a.size):
        sums[k] = a[k] * b[k]
        errors[k] = 0.0
    sums[a.size], errors[a.size] = bias, 0.0
    depth = 1.0
    while n > 1:
        half = n // 2
        for k in range(half):
            s, e = _two_sum(sums[k], sums[half + k])
            sums[k] = s
            errors[k] = (errors[k] + errors[half + k]) + e
        if n & 1:
            sums[half], errors[half] = sums[n - 1], errors[n - 1]
        n = half + (n & 1)
        depth += 1.0
    high, low = _two_sum(sums[0], errors[0])
    # Each level errs by less than 2^-53 of all sizes, and adding those errors by 2 * depth * 2^-53 of theirs.
    return _decide(high, low, 4.0 * depth * depth * 2.0**-106 * size)


@compiled()
@no_type_check
def _dot_surely(a, b, bias, factor, sums):
    """repair.dot_rows for one pair: three cascaded sums, with a bound from the errors that were made."""
    unit = 2.0**-53
    n = a.size
    whole = n // LANES * LANES
    sums[: 4 * LANES] = 0.0
    for k in range(0, whole, LANES):
        for lane in range(LANES):
            p = a[k + lane] * b[k + lane]
            s, e = _two_sum(sums[lane], p)
            sums[lane] = s
            s, e = _two_sum(sums[LANES + lane], e)
            sums[LANES + lane] = s
            sums[2 * LANES + lane] += e
            sums[3 * LANES + lane] += abs(e)
    s1, s2, s3, spread = bias, 0.0, 0.0, 0.0
    for k in range(LANES + n - whole):
        p = sums[k] if k < LANES else a[whole + k - LANES] * b[whole + k - LANES]
        s1, e = _two_sum(s1, p)
        s2, e = _two_sum(s2, e)
        s3 += e
        spread += abs(e)
    for lane in range(LANES):
        s2, e = _two_sum(s2, sums[LANES + lane])
        s3 += e + sums[2 * LANES + lane]
        spread += abs(e) + sums[3 * LANES + lane]
    bound = 2.0 * (n + 4 * LANES) * unit * spread
    if factor != 1.0:
        s1, s2 = _two_sum(s1, s2)
        s1, e = _two_product(s1, factor)
        bound = abs(factor) * (2.0 * bound + 4.0 * unit * (abs(s2) + abs(s3)))
        s3 = (s2 + s3) * factor
        s2 = e
    high, low = _two_sum(s1, s2)
    tail = low + s3
    if s3 != 0.0:
        bound += abs(tail) * unit
    high, low = _two_sum(high, tail)
    return _decide(high, low, bound)


@compiled()
@no_type_check
def exact_dot(a, b, bias, factor, size, sums, errors):
    """factor * (sum of a * b + bias) rounded once to float32, and whether that is certain."""
    if factor == 1.0:
        value, certain = _dot_quickly(a, b, bias, size, sums, errors)
        if certain:
            return value, True
    return _dot_surely(a, b, bias, factor, sums)


@compiled()
@no_type_check
def _gather(memory, first, stride, column):
    for k in range(column.size):
        column[k] = memory[first + k * stride]


@compiled()
@no_type_check
def certify(
    product, a, b, strides, row_bound, col_norms, col_bound, bias, factor, sizes, out, steps, start, stop, places
):
    """products.certified for rows start ... stop - 1 of all groups; the number of places left undecided.

    b and out are flat memory with their strides given; a row of b is gathered where one is needed.
    """
    n_rows, n_cols = product.shape[1], product.shape[2]
    n_terms = a.shape[2]
    sums, errors, column = np.empty(n_terms + 4 * LANES + 1), np.empty(n_terms + 1), np.empty(n_terms)
    found = 0
    for i in range(start, stop):
        group, row = i // n_rows, i % n_rows
        values, norms = product[group, row], col_norms[group]
        first = group * steps[0] + row * steps[1]
        target = out[first : first + n_cols]
        bound = row_bound[group, row]
        for left in range(0, n_cols, SEGMENT):
            right = min(left + SEGMENT, n_cols)
            differ = np.int32(0)
            if col_bound.size:
                for j in range(np.uint64(left), np.uint64(right)):  # unsigned: no test for j < 0 in the loop
                    error = bound * norms[j] + col_bound[j]
                    low, high = np.float32(values[j] - error), np.float32(values[j] + error)
                    differ |= single_bits(low) ^ single_bits(high)
                    target[j] = high + np.float32(0.0)
            else:
                for j in range(np.uint64(left), np.uint64(right)):  # unsigned: no test for j < 0 in the loop
                    error = bound * norms[j]
                    low, high = np.float32(values[j] - error), np.float32(values[j] + error)
                    differ |= single_bits(low) ^ single_bits(high)
                    target[j] = high + np.float32(0.0)
            if differ == 0:
                continue
            for j in range(np.uint64(left), np.uint64(right)):  # unsigned: no test for j < 0 in the loop
                error = bound * norms[j]
                if col_bound.size:
                    error += col_bound[j]
                if np.float32(values[j] - error) == np.float32(values[j] + error):
                    continue
                added = bias[j] if bias.size else 0.0
                size = sizes[group, row] * norms[j] + abs(added)
                _gather(b, group * strides[0] + j * strides[1], strides[2], column)
                value, certain = exact_dot(a[group, row], column, added, factor, size, sums, errors)
                target[j] = value
                if not certain:
                    if found < places.shape[0]:
                        places[found, 0], places[found, 1], places[found, 2] = group, row, j
                    found += 1
    return found


@compiled()
@no_type_check
def attend(product, a, b, strides, row_bound, col_norms, factor, sizes, scores, start, stop, peaks):
    """Scores rounded and repaired, then their softmax over `product`, its largest value a row to `peaks`.

    Returns the number of undecided scores.
    """
    n_rows, n_cols = product.shape[1], product.shape[2]
    n_terms = a.shape[2]
    sums, errors, column = np.empty(n_terms + 4 * LANES + 1), np.empty(n_terms + 1), np.empty(n_terms)
    found = 0
    for i in range(start, stop):
        group, row = i // n_rows, i % n_rows
        values, norms = product[group, row], col_norms[group]
        bound = row_bound[group, row]
        for left in range(0, n_cols, SEGMENT):
            right = min(left + SEGMENT, n_cols)
            differ = np.int32(0)
            for j in range(np.uint64(left), np.uint64(right)):  # unsigned: no test for j < 0 in the loop
                error = bound * norms[j]
                low, high = np.float32(values[j] - error), np.float32(values[j] + error)
                differ |= single_bits(low) ^ single_bits(high)
                scores[j] = high + np.float32(0.0)
            if differ == 0:
                continue
            for j in range(np.uint64(left), np.uint64(right)):  # unsigned: no test for j < 0 in the loop
                error = bound * norms[j]
                if np.float32(values[j] - error) != np.float32(values[j] + error):
                    size = sizes[group, row] * norms[j]
                    _gather(b, group * strides[0] + j * strides[1], strides[2], column)
                    value, certain = exact_dot(a[group, row], column, 0.0, factor, size, sums, errors)
                    scores[j] = value
                    if not certain:
                        found += 1
        r, peaks[group, row] = _numerators(scores, values)
        for j in range(n_cols):
            values[j] = np.float64(_single(values[j] * r))
    return found
