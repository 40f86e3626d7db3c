"""Correctly rounded dot products of given pairs of rows, whatever their range: the slow and certain part.

Used for the outputs that a float64 product leaves undecided. In steps:

1. products of float32 values are exact in float64; each is split at one place, the same for all of a row, so that
   the upper parts add up exactly in any order; the lower parts are added in plain float64, within a bound;
2. the sum of both is rounded to odd in float64 and then to nearest in float32, which is correct rounding
   (rounding to nearest twice is not: the first may land on a midpoint of the second);
3. if the bound leaves two candidates, the products are added pairwise, keeping every rounding error (Knuth's
   TwoSum); the errors are added in the same way; the errors of that, in plain float64. The sum is then
   s1 + s2 + s3 within a bound computed from the last errors, which is zero if there were none;
4. if that leaves two candidates too, Python integers decide.

Source:
    Rump, Ogita, Oishi 2008 (the split, AccSum); Knuth, TAOCP 2, 4.2.2 (TwoSum); Ogita, Rump, Oishi 2005 (Dot3);
    Boldo, Melquiond 2008 (round to odd).
"""

# Axes: pair (one dot product each), term

from __future__ import annotations

import torch
from torch import Tensor

from mdlm_interp.shapes import Bool, Float32, Float64
from oracle.rounding import BINARY32, round_ratio

UNIT = 2.0**-53
SPLITTER = 134217729.0
"""2^27 + 1: Veltkamp's constant, which halves a float64's significand."""

TERMS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Products held at a time, so that gathered rows stay in cache (1 MiB of float64 on a CPU)."""


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its exact error."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


def two_product(a: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """The rounded product and its exact error, without a fused multiply-add (Dekker)."""

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        t = x * SPLITTER
        high = t - (t - x)
        return high, x - high

    p = a * b
    a_high, a_low = halves(a)
    b_high, b_low = halves(torch.full_like(a, b))
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _tree(
    terms: Float64[Tensor, "pair term"],
) -> tuple[Float64[Tensor, " pair"], Float64[Tensor, "pair error"]]:
    """Pairwise sum over the last axis, and the exact errors of all its additions."""
    errors = []
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        sums, error = two_sum(terms[:, :half], terms[:, half : 2 * half])
        errors.append(error)
        terms = torch.cat((sums, terms[:, 2 * half :]), 1) if terms.shape[1] % 2 else sums
    return terms[:, 0], torch.cat(errors, 1) if errors else terms.new_zeros(terms.shape[0], 1)


def round_to_odd(high: Tensor, low: Tensor) -> Tensor:
    """high + low (|low| below half an ulp of high) rounded to float64 so that inexact results are odd."""
    bits = high.view(torch.int64)
    away = (low > 0) == (high > 0)
    inexact_even = (low != 0) & ((bits & 1) == 0)
    stepped = (bits + torch.where(inexact_even, torch.where(away, 1, -1), 0)).view(torch.float64)
    return torch.where(high == 0, low, stepped)


def round_sum(
    s1: Tensor, s2: Tensor, s3: Tensor, bound: Tensor
) -> tuple[Float32[Tensor, " pair"], Bool[Tensor, " pair"]]:
    """s1 + s2 + s3, known to within bound, rounded to float32, and whether that is certain."""
    high, low = two_sum(s1, s2)
    tail = low + s3
    bound = bound + torch.where(s3 == 0, 0.0, tail.abs() * UNIT)
    high, low = two_sum(high, tail)
    # Only the sign of the low part counts, and rounding low -+ 2 bound cannot change it wrongly.
    below = round_to_odd(high, low - 2 * bound).float()
    above = round_to_odd(high, low + 2 * bound).float()
    # A bound of the size of high's own last digits says nothing about what lies between its neighbours.
    return above + 0.0, (below == above) & ((bound == 0) | (bound <= high.abs() * 2.0**-55))


def pairs_at_once(a: Tensor) -> int:
    """How many rows of these to repair together."""
    return max(1, TERMS_AT_ONCE.get(a.device.type, TERMS_AT_ONCE["cpu"]) // max(1, a.shape[-1]))


def dot_rows(
    a: Float64[Tensor, "pair term"],
    b: Float64[Tensor, "pair term"],
    bias: Float64[Tensor, " pair"] | None = None,
    factor: float = 1.0,
) -> Float32[Tensor, " pair"]:
    """factor * (sum of a * b + bias) for each pair of rows, rounded once to float32; zeros are +0.

    Args:
        a, b: Values that float32 can hold (a may be scaled by a power of two), as float64.
    """
    step = pairs_at_once(a)
    pieces = [
        _dot_rows(a[i : i + step], b[i : i + step], None if bias is None else bias[i : i + step], factor)
        for i in range(0, a.shape[0], step)
    ]
    return torch.cat(pieces) if pieces else a.new_zeros(0, dtype=torch.float32)


def _dot_rows(a: Tensor, b: Tensor, bias: Tensor | None, factor: float) -> Float32[Tensor, " pair"]:
    terms = a * b
    rounded, certain = _scaled_and_rounded(_sum_quickly(terms, bias), factor)
    left = (~certain).nonzero()[:, 0]
    if left.numel():
        terms = terms[left] if bias is None else torch.cat((terms[left], bias[left, None]), 1)
        rounded[left], certain = _scaled_and_rounded(_sum_surely(terms), factor)
        for i in left[~certain].tolist():
            rounded[i] = dot_of_integers(a[i], b[i], 0.0 if bias is None else float(bias[i]), factor)
    return rounded


Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""s1, s2, s3 whose sum is that of a row's terms within the last, each [pair]."""


def _sum_quickly(terms: Float64[Tensor, "pair term"], bias: Tensor | None) -> Parts:
    """The upper parts of all terms, added exactly, and the sum of the lower ones."""
    low, high = terms.aminmax(dim=1)
    top = torch.maximum(-low, high)
    if bias is not None:
        top = torch.maximum(top, bias.abs())
    # A power of two above 2 n times the largest term: its ulp divides all upper parts, and their sum is below it.
    n = terms.shape[1] + 1
    exponent = (top.view(torch.int64) >> 52) + (n.bit_length() + 2)
    split = torch.where(top == 0, top, (exponent << 52).view(torch.float64))
    upper = (terms + split[:, None]).sub_(split[:, None])
    s1, s2 = upper.sum(1), torch.sub(terms, upper, out=upper).sum(1)
    if bias is not None:
        part = (bias + split) - split
        s1, s2 = s1 + part, s2 + (bias - part)
    # n lower parts of at most UNIT times the split, added in any order.
    return s1, s2, torch.zeros_like(s1), split * (2.0 * (n * UNIT) ** 2)


def _sum_surely(terms: Float64[Tensor, "pair term"]) -> Parts:
    """The sum by two trees of exact additions; the errors of the second are added in plain float64."""
    s1, errors = _tree(terms)
    s2, errors = _tree(errors)
    s3, spread = errors.sum(1), errors.abs().sum(1)
    # Any order of adding n errors is within (n - 1) * UNIT of the sum of their sizes, to first order.
    return s1, s2, s3, 2 * errors.shape[1] * UNIT * spread


def _scaled_and_rounded(
    parts: Parts, factor: float
) -> tuple[Float32[Tensor, " pair"], Bool[Tensor, " pair"]]:
    """factor times a sum as float32, and whether that is certain."""
    s1, s2, s3, bound = parts
    if factor != 1.0:
        s1, s2 = two_sum(s1, s2)
        s1, error = two_product(s1, factor)
        bound = abs(factor) * (2 * bound + 4 * UNIT * (s2.abs() + s3.abs()))
        s2, s3 = error, (s2 + s3) * factor
    return round_sum(s1, s2, s3, bound)


def dot_of_integers(
    a: Float64[Tensor, " term"], b: Float64[Tensor, " term"], bias: float = 0.0, factor: float = 1.0
) -> float:
    """factor * (sum of a * b + bias) rounded once to float32, in Python integers."""
    pairs = [
        (x.as_integer_ratio(), y.as_integer_ratio()) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    pairs.append((bias.as_integer_ratio(), (1, 1)))
    denominator = max(x[1] * y[1] for x, y in pairs)  # all are powers of two
    total = sum(x[0] * y[0] * (denominator // (x[1] * y[1])) for x, y in pairs)
    up, down = factor.as_integer_ratio()
    return round_ratio(total * up, denominator * down, BINARY32)
