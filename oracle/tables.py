"""Tables of cosines, sines and other constants, correctly rounded, from Python integers alone.

Fixed-point numbers with a stated error are refined until their rounding is certain (Ziv's strategy), so
no mathematical library has a say in any bit. Tables are kept between calls.

Definition: SPEC.md, section 3 (rotary_tables, time_features, attention_scores) and section 6 (sigma).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from oracle.errors import ExactError
from oracle.rounding import BINARY32, BINARY64, round_fixed, round_ratio, until_decided

FIRST_BITS = 192
"""Fraction bits of the first attempt: never too few for a rotary table of ordinary length."""

ROTARY_TABLES_KEPT = 8
"""Different inverse frequencies whose tables are kept."""


@lru_cache(maxsize=32)
def pi_fixed(bits: int) -> int:
    """pi times 2^bits, within 1. Source: Machin's formula, 16 arctan(1/5) - 4 arctan(1/239)."""
    guard = 16
    one = 1 << (bits + guard)

    def arctan_of_inverse(n: int) -> int:
        total, power, k = 0, one // n, 1
        while power:
            total += power // k if k % 4 == 1 else -(power // k)
            power //= n * n
            k += 2
        return total

    return (16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)) >> guard


def cos_sin_fixed(mantissa: int, exponent: int, bits: int) -> tuple[int, int, int]:
    """cos and sin of mantissa * 2^exponent, times 2^bits, and a bound on their errors in the same unit."""
    size = max(0, mantissa.bit_length() + exponent)
    work = bits + 24
    wide = work + size + 8
    # Remainder modulo pi/2, with enough digits of pi that the size of the angle costs nothing.
    shift = wide + exponent
    angle = mantissa << shift if shift >= 0 else mantissa >> -shift
    half_pi = pi_fixed(wide) >> 1
    quarter = (2 * angle + half_pi) // (2 * half_pi)
    rest = (angle - quarter * half_pi) >> (wide - work)
    square = (rest * rest) >> work
    one = 1 << work
    cosine, sine, term, k = one, rest, one, 0
    odd_term = rest
    while term or odd_term:
        k += 2
        term = -((term * square) >> work) // (k * (k - 1))
        odd_term = -((odd_term * square) >> work) // (k * (k + 1))
        cosine += term
        sine += odd_term
        if abs(term) <= 1 and abs(odd_term) <= 1:
            break
    # Fewer than 2^12 truncations of one unit each, all in `work` digits, which has 24 more than `bits`.
    pairs = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))
    chosen = pairs[quarter % 4]
    return chosen[0] >> 24, chosen[1] >> 24, 2


def cos_sin(mantissa: int, exponent: int) -> tuple[float, float]:
    """The binary32 nearest to the cosine and the sine of the dyadic number mantissa * 2^exponent."""
    if mantissa == 0:
        return 1.0, 0.0

    def attempt(bits: int) -> tuple[float, float] | None:
        c, s, error = cos_sin_fixed(mantissa, exponent, bits)
        cosine, sine = round_fixed(c, error, bits, BINARY32), round_fixed(s, error, bits, BINARY32)
        return None if cosine is None or sine is None else (cosine, sine)

    return until_decided(attempt, FIRST_BITS)


def dyadic(value: float) -> tuple[int, int]:
    """(m, e) with value = m * 2^e exactly."""
    numerator, denominator = value.as_integer_ratio()
    return numerator, 1 - denominator.bit_length()


def _rotary_column(frequency: float, n_positions: int) -> tuple[list[float], list[float]]:
    """cos and sin of p * frequency for p = 0 ... n_positions - 1, by rotating from one position to the next.

    Each step's error is below 8 units of the fixed-point numbers and adds up; what it leaves undecided is
    computed on its own.
    """
    mantissa, exponent = dyadic(frequency)
    bits = FIRST_BITS
    turn_cos, turn_sin, _ = cos_sin_fixed(mantissa, exponent, bits)
    cosine, sine = 1 << bits, 0
    cosines, sines = [], []
    for position in range(n_positions):
        error = 8 * position + 2
        c, s = round_fixed(cosine, error, bits, BINARY32), round_fixed(sine, error, bits, BINARY32)
        if c is None or s is None:
            c, s = cos_sin(position * mantissa, exponent)
        cosines.append(c)
        sines.append(s)
        cosine, sine = (
            (cosine * turn_cos - sine * turn_sin) >> bits,
            (cosine * turn_sin + sine * turn_cos) >> bits,
        )
    return cosines, sines


_rotary: dict[bytes, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}


def rotary_tables(
    inv_freq: NDArray[np.float32], n_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [pos, half] of position times inverse frequency, correctly rounded.

    Raises:
        ExactError: If a frequency is not finite, or the number of positions negative.
    """
    if n_positions < 0:
        raise ExactError(
            f"rotary_tables: n_positions must be at least 0, got {n_positions}; is a length missing?"
        )
    if not np.isfinite(inv_freq).all():
        raise ExactError("rotary_tables: inv_freq has values that are not finite; load the checkpoint again")
    key = inv_freq.astype("<f4").tobytes()
    kept = _rotary.get(key)
    if kept is None or kept[0].shape[0] < n_positions:
        columns = [_rotary_column(float(frequency), n_positions) for frequency in inv_freq]
        shape = (len(columns), n_positions)
        cosines, sines = (
            np.array([column[which] for column in columns], np.float32).reshape(shape).T.copy()
            for which in (0, 1)
        )
        while len(_rotary) >= ROTARY_TABLES_KEPT:
            del _rotary[next(iter(_rotary))]
        kept = _rotary[key] = (cosines, sines)
    return kept[0][:n_positions], kept[1][:n_positions]


@lru_cache(maxsize=4096)
def time_frequency(k: int, half: int) -> float:
    """The binary64 nearest to 10000^(-k / half), settled by comparing integers.

    y is too large exactly if (y's lower midpoint)^half * 10000^k > 1, all of it rational.
    """
    guess: float = 10_000.0 ** (-k / half)

    def above(value: int, exponent: int) -> bool:  # value * 2^exponent > 10000^(-k / half)
        return bool(value**half * 10_000**k > 1 << (-exponent * half))

    while True:
        fraction, power = math.frexp(guess)
        mantissa, exponent = int(math.ldexp(fraction, 53)), power - 53
        # Midpoints to both neighbours; none is ever hit, the number being irrational unless it is exact.
        if k and above(4 * mantissa - (1 if mantissa == 1 << 52 else 2), exponent - 2):
            guess = math.nextafter(guess, 0.0)
        elif k and not above(2 * mantissa + 1, exponent - 1):
            guess = math.nextafter(guess, 1.0)
        else:
            return guess


@lru_cache(maxsize=1024)
def time_features(sigma: float, width: int) -> tuple[float, ...]:
    """width / 2 cosines of sigma times the frequencies, then as many sines, correctly rounded.

    Raises:
        ExactError: If the width is odd or less than 2.
    """
    if width < 2 or width % 2:
        raise ExactError(
            f"time_features: width must be even and at least 2, as many sines as cosines, got {width}; "
            f"the model's is 256"
        )
    half = width // 2
    sigma_mantissa, sigma_exponent = dyadic(sigma)
    pairs = []
    for k in range(half):
        mantissa, exponent = dyadic(time_frequency(k, half))
        pairs.append(cos_sin(sigma_mantissa * mantissa, sigma_exponent + exponent))
    return (*(pair[0] for pair in pairs), *(pair[1] for pair in pairs))


@lru_cache(maxsize=256)
def inverse_square_root(n: int) -> float:
    """The binary64 nearest to 1 / sqrt(n)."""
    bits = 256
    root = math.isqrt((1 << (2 * bits)) // n)
    if root * root * n == 1 << (2 * bits):
        return round_ratio(root, 1 << bits, BINARY64)
    found = round_fixed(root, 2, bits, BINARY64)
    assert found is not None, "1 / sqrt(n) agrees with a midpoint to 200 bits"
    return found


@lru_cache(maxsize=4096)
def sigma_of_masked(n_masked: int, length: int) -> float:
    """The noise level of a sequence by its share of masks: binary32 nearest to -ln(1 - 0.999 masked / length)."""
    if not 0 <= n_masked <= length or length < 1:
        raise ExactError(f"sigma_of_masked: {n_masked} masked tokens of {length} is no share")
    numerator, denominator = 1000 * length, 1000 * length - 999 * n_masked
    if n_masked == 0:
        return 0.0

    def attempt(bits: int) -> float | None:
        work = bits + 24
        # The ratio lies in [1, 1000]: divide by 2 until it is below 4/3, and by the series for the rest.
        halvings = max(0, (3 * numerator // (4 * denominator)).bit_length())
        value = _log_fixed(numerator, denominator << halvings, work) + halvings * _log_fixed(2, 1, work)
        return round_fixed(value >> 24, 2, bits, BINARY32)

    return until_decided(attempt, FIRST_BITS)


def _log_fixed(numerator: int, denominator: int, bits: int) -> int:
    """ln of a ratio in [1/2, 2] times 2^bits, within 2^12: 2 artanh((r - 1) / (r + 1))."""
    z = ((numerator - denominator) << bits) // (numerator + denominator)
    square, power, total, k = (z * z) >> bits, z, 0, 1
    while abs(power) > 1:
        total += power // k
        power = (power * square) >> bits
        k += 2
    return 2 * total
