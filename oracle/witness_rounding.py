"""Correct rounding by Python integers: what the witness rests on.

A real number is held as an integer numerator over a power of two, and rounded by looking at the bits that go.
Cosine, sine and logarithm are computed as integers with a known error and asked for more bits until
everything within that error rounds to the same number; roots are exact integer roots with a sticky bit.
No function of a mathematics library takes part, and nothing here is fast.

Source:
    oracle/SPEC.md, sections 1, 3 and 6, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

from mdlm_interp.errors import DataError

Dyadic: TypeAlias = "tuple[int, int]"
"""(n, e) stands for the real number n · 2^e."""

GUARD_BITS = 32
"""Bits of the working precision beyond the promised ones: room for 2^31 errors of one unit."""


def dyadic(value: float) -> Dyadic:
    """A finite binary64 as it is.

    >>> dyadic(0.75)
    (6755399441055744, -53)
    """
    mantissa, exponent = math.frexp(value)
    return int(mantissa * 2.0**53), exponent - 53


def times(a: Dyadic, b: Dyadic) -> Dyadic:
    """Exact product."""
    return a[0] * b[0], a[1] + b[1]


def plus(a: Dyadic, b: Dyadic) -> Dyadic:
    """Exact sum."""
    exponent = min(a[1], b[1])
    return (a[0] << (a[1] - exponent)) + (b[0] << (b[1] - exponent)), exponent


def _nearest(value: Dyadic, digits: int, least: int) -> float:
    """To `digits` significant bits and no finer than 2^least, ties to the even significand; zero is +0."""
    n, exponent = value
    magnitude = abs(n)
    dropped = max(magnitude.bit_length() - digits, least - exponent, 0)
    kept, rest = divmod(magnitude, 1 << dropped)
    # Twice the rest against one unit: above the tie, or on it with an odd significand.
    if 2 * rest + (kept & 1) > 1 << dropped:
        kept += 1
    # At most 2^digits, so both the conversion and the scaling are exact.
    rounded = math.ldexp(kept, exponent + dropped)
    return -rounded if n < 0 and kept else rounded


def nearest32(value: Dyadic) -> float:
    """SPEC's R: the nearest binary32, as a float; a zero is +0.

    >>> nearest32((2**24 + 1, -24)), nearest32((2**24 + 3, -24)) == 1 + 2.0**-22, nearest32((-1, -150))
    (1.0, True, 0.0)

    Raises:
        DataError: If the result would reach 2^128.
    """
    n, exponent = value
    top = n.bit_length() + exponent
    rounded = 0.0 if n == 0 else math.inf if top > 130 else _nearest(value, 24, -149)
    if abs(rounded) >= 2.0**128:
        raise DataError(
            f"a result of magnitude 2^{top} or half of it is no float32; "
            f"are the weights or an edited activation out of range?"
        )
    return rounded


def nearest64(value: Dyadic) -> float:
    """SPEC's RN64, for values below 2^1024; a zero is +0."""
    return _nearest(value, 53, -1074)


def reciprocal_sqrt(n: int) -> float:
    """RN64(1 / sqrt(n)).

    >>> reciprocal_sqrt(64), reciprocal_sqrt(2).hex()
    (0.125, '0x1.6a09e667f3bcdp-1')
    """
    root = math.isqrt((1 << 200) // n)  # floor(2^100 / sqrt(n))
    sticky = int(root * root * n != 1 << 200)
    return nearest64((2 * root + sticky, -101))


@lru_cache
def time_frequencies(half: int) -> tuple[float, ...]:
    """RN64(10000^(-k / half)) for k = 0 ... half - 1."""
    return tuple(_frequency(k, half) for k in range(half))


def _frequency(k: int, half: int) -> float:
    """The root 10000^(-k/half) of 10000^-k, found bit by bit: 80 binary places and a sticky bit."""
    power, one = 10_000**k, 1 << 80 * half
    root = 0
    for bit in reversed(range(81)):
        candidate = root | 1 << bit
        if candidate**half * power <= one:
            root = candidate
    sticky = int(root**half * power != one)
    return nearest64((2 * root + sticky, -81))


def _until_decided(enclose: Callable[[int], list[int]]) -> list[float]:
    """Round reals to binary32, given integers within 2 units of (the reals · 2^bits) for any number of bits.

    Every value must be exact (and then never undecided) or irrational: the loop ends then.
    """
    bits = 96
    while True:
        found = enclose(bits)
        below = [nearest32((n - 2, -bits)) for n in found]
        if below == [nearest32((n + 2, -bits)) for n in found]:
            return below
        bits *= 2


def _arc_series(numerator: int, denominator: int, bits: int, sign: int) -> int:
    """Sum of sign^i · u^(2i+1) / (2i+1), times 2^bits, for 0 <= u = numerator / denominator <= 1/3.

    That is arctan(u) for sign -1 and artanh(u) for +1. Off by less than 3 units a term: one for each of two
    floors, and what the floors before leave behind.
    """
    power = (numerator << bits) // denominator
    total, i = 0, 0
    while power:
        total += sign**i * (power // (2 * i + 1))
        power = power * numerator**2 // denominator**2
        i += 1
    return total


@lru_cache
def _pi(bits: int) -> int:
    """Within 1.1 units of π · 2^bits, by Machin's formula."""
    wide = bits + GUARD_BITS
    return (16 * _arc_series(1, 5, wide, -1) - 4 * _arc_series(1, 239, wide, -1)) >> GUARD_BITS


def cos_sin32(angle: Dyadic) -> tuple[float, float]:
    """R(cos(angle)) and R(sin(angle)), the angle being exact and of any size.

    >>> cos_sin32((0, 0))
    (1.0, 0.0)
    >>> [value.hex() for value in cos_sin32((1, 0))]
    ['0x1.14a2800000000p-1', '0x1.aed5480000000p-1']
    """
    if angle[0] == 0:
        return 1.0, 0.0
    cos, sin = _until_decided(lambda bits: _cos_sin(angle, bits))
    return cos, sin


def _cos_sin(angle: Dyadic, bits: int) -> list[int]:
    """Cosine and sine of an angle, times 2^bits, each within 2 units."""
    n, exponent = angle
    whole_bits = max(n.bit_length() + exponent, 0)
    # The multiple of π/2 that is taken away has an error of one unit for each quarter turn.
    wide = bits + GUARD_BITS + whole_bits
    shift = exponent + wide
    x = n << shift if shift >= 0 else n >> -shift
    quarter = _pi(wide - 1)
    turns = (2 * x + quarter) // (2 * quarter)
    x -= turns * quarter
    # Taylor: term i is x^i / i!; each floor adds less than one unit to all that follows.
    terms, i = [1 << wide], 0
    while terms[-1] not in (0, -1):  # the floor of a vanishing negative number is -1
        i += 1
        terms.append((terms[-1] * x >> wide) // i)
    cos = sum(terms[0::4]) - sum(terms[2::4])
    sin = sum(terms[1::4]) - sum(terms[3::4])
    cos, sin = ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))[turns % 4]
    return [cos >> (wide - bits), sin >> (wide - bits)]


def log32(numerator: int, denominator: int) -> float:
    """R(ln(numerator / denominator)) for a ratio of at least 1.

    >>> log32(7, 7), log32(1000, 1) == float.fromhex("0x1.ba18aap+2")
    (0.0, True)
    """
    if numerator == denominator:
        return 0.0
    return _until_decided(lambda bits: [_log(numerator, denominator, bits)])[0]


def _log(numerator: int, denominator: int, bits: int) -> int:
    """Logarithm of a ratio of at least 1, times 2^bits, within 2 units: ln z = 2 artanh((z-1) / (z+1))."""
    wide = bits + GUARD_BITS
    twos = numerator.bit_length() - denominator.bit_length()
    if denominator << twos > numerator:
        twos -= 1  # z from 1 to 2: the series takes no negative argument
    scaled = denominator << twos
    total = 2 * _arc_series(numerator - scaled, numerator + scaled, wide, 1)
    total += twos * 2 * _arc_series(1, 3, wide, 1)
    return total >> GUARD_BITS
