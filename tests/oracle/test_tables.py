"""Correctly rounded constants and tables, against mpmath with digits to spare. Every claim is exact."""

from __future__ import annotations

import random
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import ops, tables, witness
from oracle.errors import ExactError
from oracle.rounding import BINARY32, BINARY64, round_fixed, round_ratio
from tests.oracle.exact_reference import nearest_float32, same_bits


def fraction(value: mpmath.mpf):
    sign, mantissa, exponent, _ = value._mpf_
    return Fraction(-int(mantissa) if sign else int(mantissa)) * Fraction(2) ** exponent


def expected_pair(angle: Fraction) -> tuple[float, float]:
    with mpmath.workprec(700):
        value = mpmath.mpf(angle.numerator) / angle.denominator
        return nearest_float32(fraction(mpmath.cos(value))), nearest_float32(fraction(mpmath.sin(value)))


def test_rotary_tables_are_correctly_rounded():
    inv_freq = (1.0 / 10_000.0 ** (torch.arange(0, 64, 2) / 64)).float()
    cos, sin = ops.rotary_tables(inv_freq, 1024)
    chooser = random.Random(0)
    for _ in range(400):
        p, j = chooser.randrange(1024), chooser.randrange(32)
        angle = p * Fraction(float(inv_freq[j]))
        assert (cos[p, j].item(), sin[p, j].item()) == expected_pair(angle)
    assert same_bits(cos[0], torch.ones(32))
    assert same_bits(sin[0], torch.zeros(32))


def test_a_table_does_not_depend_on_what_was_asked_before():
    inv_freq = torch.tensor([1.0, 0.3, 0.01])
    short = [table.clone() for table in ops.rotary_tables(inv_freq, 5)]
    long = ops.rotary_tables(inv_freq, 40)
    tables._rotary.clear()
    again = ops.rotary_tables(inv_freq, 40)
    for a, b, c in zip(short, long, again, strict=True):
        assert same_bits(a, b[:5])
        assert same_bits(b, c)
    long[0].zero_()
    assert same_bits(ops.rotary_tables(inv_freq, 40)[0], again[0])


@given(st.integers(-149, 120), st.integers(1, 2**24 - 1))
def test_any_angle_is_correctly_rounded(exponent, mantissa):
    assert tables.cos_sin(mantissa, exponent) == expected_pair(mantissa * Fraction(2) ** exponent)


@pytest.mark.parametrize("sigma", [0.0, 1e-45, 0.7, 6.9, 1e10, 3.4e38])
def test_time_features_are_correctly_rounded_and_the_witness_s(sigma):
    value = torch.tensor([sigma, sigma / 3])
    found = ops.time_features(value, 256)
    assert same_bits(found, torch.from_numpy(witness.time_features(value.numpy(), 256)))
    for k in (0, 1, 63, 127):
        with mpmath.workprec(400):
            frequency = float(mpmath.power(10_000, -mpmath.mpf(k) / 128))
        assert tables.time_frequency(k, 128) == frequency
        pair = expected_pair(Fraction(float(value[0])) * Fraction(frequency))
        assert (found[0, k].item(), found[0, 128 + k].item()) == pair


def test_inverse_square_roots_and_noise_levels_are_correctly_rounded():
    with mpmath.workprec(300):
        for n in (*range(1, 200), 768, 10**9 + 7):
            assert tables.inverse_square_root(n) == float(1 / mpmath.sqrt(n))
        for masked in range(1, 65):
            exact = -mpmath.log(1 - mpmath.mpf(999 * masked) / 64_000)
            assert tables.sigma_of_masked(masked, 64) == nearest_float32(fraction(exact))
    assert tables.sigma_of_masked(0, 64) == 0.0
    with pytest.raises(ExactError, match="5 masked tokens of 4 is no share"):
        tables.sigma_of_masked(5, 4)


@given(st.integers(-(2**90), 2**90), st.integers(0, 240))
def test_rounding_of_ratios_is_that_of_a_float_conversion(numerator, shift):
    exact = Fraction(numerator, 2**shift)
    assert round_ratio(numerator, 2**shift, BINARY64) == float(exact)
    assert round_ratio(numerator, 2**shift, BINARY32) == nearest_float32(exact)


@given(st.integers(-(2**220), 2**220), st.integers(0, 2**30), st.integers(-(2**30), 2**30))
def test_an_interval_is_rounded_only_if_all_of_it_rounds_alike(value, error, inside):
    found = round_fixed(value, error, 192, BINARY32)
    if found is not None and abs(inside) <= error:
        assert found == nearest_float32(Fraction(value + inside, 2**192))


def test_frequencies_that_are_not_finite_are_refused():
    with pytest.raises(ExactError, match="rotary_tables: inv_freq has values that are not finite"):
        tables.rotary_tables(np.array([1.0, np.nan], np.float32), 4)
