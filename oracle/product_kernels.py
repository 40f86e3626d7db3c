"""The loops that numba compiles around matrix products: rounding, repair, and softmax of what was rounded.

The same algorithms as `products._decide` and `repair`, one output at a time. See `kernels` for the rules.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import no_type_check

import numpy as np

from oracle.kernels import SOURCES, bits_float, compiled, float_bits, numerators, single, single_bits

LANES = 8
SEGMENT = 128
"""Columns that are looked at again if one of them is undecided."""


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


@compiled(inline="always")
@no_type_check
def _round_segment(values, norms, extra, bound, left, right, target):
    """Round one segment of a row to float32 as if all of it were decided; 0 if all of it is."""
    differ = np.int32(0)
    for j in range(np.uint64(left), np.uint64(right)):  # unsigned: no test for j < 0 in the loop
        error = bound * norms[j] + extra[j]
        low, high = np.float32(values[j] - error), np.float32(values[j] + error)
        differ |= single_bits(low) ^ single_bits(high)
        target[j] = high + np.float32(0.0)
    return differ


@compiled(inline="always")
@no_type_check
def _undecided(value, bound, norm, extra):
    """Whether the ends of one output's interval round apart; the same operations as in `_round_segment`."""
    error = bound * norm + extra
    return np.float32(value - error) != np.float32(value + error)


@compiled()
@no_type_check
def certify(
    product,
    a,
    b,
    strides,
    row_bound,
    col_norms,
    col_bound,
    bias,
    factor,
    sizes,
    out,
    steps,
    start,
    stop,
    places,
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
            if _round_segment(values, norms, col_bound, bound, left, right, target) == 0:
                continue
            for j in range(np.uint64(left), np.uint64(right)):
                if not _undecided(values[j], bound, norms[j], col_bound[j]):
                    continue
                size = sizes[group, row] * norms[j] + abs(bias[j])
                _gather(b, group * strides[0] + j * strides[1], strides[2], column)
                value, certain = exact_dot(a[group, row], column, bias[j], factor, size, sums, errors)
                target[j] = value
                if not certain:
                    if found < places.shape[0]:
                        places[found, 0], places[found, 1], places[found, 2] = group, row, j
                    found += 1
    return found


@compiled()
@no_type_check
def attend(product, a, b, strides, row_bound, col_norms, nothing, factor, sizes, scores, start, stop, peaks):
    """Scores rounded and repaired, then their softmax over `product`, its largest value a row to `peaks`.

    `nothing` is a row of zeros in the place of biases. Returns the number of undecided scores.
    """
    n_rows, n_cols = product.shape[1], product.shape[2]
    places = np.empty((0, 3), np.int64)
    # Each row's scores are wanted once, so all rows are written to the same memory.
    steps = np.zeros(2, np.int64)
    found = 0
    for i in range(start, stop):
        found += certify(
            product,
            a,
            b,
            strides,
            row_bound,
            col_norms,
            nothing,
            nothing,
            factor,
            sizes,
            scores,
            steps,
            i,
            i + 1,
            places,
        )
        values = product[i // n_rows, i % n_rows]
        r, peaks[i // n_rows, i % n_rows] = numerators(scores, values)
        for j in range(n_cols):
            values[j] = np.float64(single(values[j] * r))
    return found


@compiled()
@no_type_check
def compiled_from():
    """SOURCES as it was when this file's loops were compiled."""
    return SOURCES
