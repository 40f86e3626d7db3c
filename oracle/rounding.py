"""Correct rounding of integers and of certified intervals, in Python integers.

A binary32 has 24 significant bits and an ulp of at least 2^-149; a binary64 has 53 and 2^-1074.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Format(NamedTuple):
    """An IEEE-754 binary format."""

    bits: int
    """Significant bits."""
    least: int
    """Exponent of the smallest subnormal."""
    limit: int
    """Exponent of the first power of two that is too large."""


BINARY32 = Format(24, -149, 128)
BINARY64 = Format(53, -1074, 1024)


def round_ratio(numerator: int, denominator: int, to: Format) -> float:
    """The rational number rounded to the nearest value of a format, ties to even; inf beyond its range.

    >>> round_ratio(2**24 + 1, 1, BINARY32), round_ratio(2**24 + 3, 1, BINARY32)
    (16777216.0, 16777220.0)
    >>> round_ratio(1, 3 * 2**149, BINARY32), round_ratio(-2, 3 * 2**149, BINARY32) == -(2.0**-149)
    (0.0, True)
    """
    if numerator == 0:
        return 0.0
    magnitude = abs(numerator)
    top = magnitude.bit_length() - denominator.bit_length()
    if _scaled(magnitude, -top) >= _scaled(denominator, top):
        top += 1  # now 2^(top-1) <= value < 2^top
    unit = max(top - to.bits, to.least)
    quotient, rest = divmod(_scaled(magnitude, -unit), _scaled(denominator, unit))
    twice = 2 * rest
    whole = _scaled(denominator, unit)
    if twice > whole or (twice == whole and quotient & 1):
        quotient += 1
    if quotient.bit_length() + unit > to.limit:
        return math.copysign(math.inf, numerator)
    return math.copysign(math.ldexp(quotient, unit), numerator) if quotient else 0.0


def _scaled(value: int, power: int) -> int:
    """value times 2^power if that is no fraction, else value: the other side of a ratio is scaled then."""
    return value << power if power > 0 else value


def round_fixed(value: int, error: int, point: int, to: Format) -> float | None:
    """value / 2^point, known to within error / 2^point, rounded to a format; None if that cannot be told.

    A result that rounds to zero is +0.
    """
    magnitude = abs(value)
    if magnitude <= error:
        # The sign itself is open; decided only if everything in the interval rounds to zero.
        tiny = (magnitude + error) << 1
        return 0.0 if tiny.bit_length() <= point + to.least else None
    drop = max(magnitude.bit_length() - to.bits, point + to.least)
    if drop <= 0:
        return math.copysign(math.ldexp(magnitude, -point), value) if error == 0 else None
    kept, rest, half = magnitude >> drop, magnitude & ((1 << drop) - 1), 1 << (drop - 1)
    if abs(rest - half) <= error:
        return None
    kept += rest > half
    return math.copysign(math.ldexp(kept, drop - point), value) if kept else 0.0


def until_decided(attempt: Callable[[int], T | None], bits: int) -> T:
    """Ziv's strategy: attempt with more and more bits until the rounding can be told."""
    while (result := attempt(bits)) is None:
        bits *= 2
    return result
