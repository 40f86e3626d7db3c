"""The certificate behind every product: what is called certain is right, however far the digits cancel.

Inputs whose leading digits cancel up to ten times over leave nothing of a float64 product, and often little of a
cascade of three; sums next to a midpoint times a factor need more digits than three float64 hold. Every claim is
exact.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from oracle import ops, repair
from oracle.products import as_rows
from oracle.repair import dot_rows
from oracle.tables import inverse_square_root
from tests.oracle import exact_reference as reference
from tests.oracle.exact_reference import same_bits

SIZES = [(6, 1), (6, 9), (17, 2), (17, 5), (40, 3), (40, 10), (129, 1), (129, 4)]
"""Terms, and how many times the sum so far is taken away."""


TIES = [(10, -110, 60), (30, -110, 60), (300, -110, 40), (30, -80, 10)]
"""Pairs of terms that cancel, and their exponents."""


def rounded(sums: list[Fraction]) -> torch.Tensor:
    return torch.tensor([reference.nearest_float32(total) for total in sums])


@pytest.mark.parametrize(("terms", "stages"), SIZES)
def test_products_are_correctly_rounded_however_often_they_cancel(terms, stages, path):
    for seed in range(4):
        x, weight, sums = reference.deep_cancellation(100 * terms + stages + seed, 40, terms, stages)
        assert same_bits(ops.linear(x, weight)[0], rounded(sums))


@pytest.mark.parametrize("size", TIES)
def test_a_term_far_below_a_midpoint_decides(size, path):
    terms, expected = reference.hidden_ties(1, 200, *size)
    assert same_bits(ops.linear(terms, torch.ones(1, terms.shape[1]))[:, 0], expected)
    assert same_bits(dot_rows(terms.double(), torch.ones_like(terms).double()), expected)
    # The control: no float64 sum sees it.
    assert not same_bits(terms.double().sum(1).float(), expected)


def test_a_bias_far_above_the_product_is_rounded_with_it(path):
    """The bound on the product says nothing about the addition of the bias."""
    generator = np.random.default_rng(1)
    bias = torch.from_numpy((1 + generator.integers(0, 2**23, 100) * 2.0**-23).astype(np.float32))
    far = torch.from_numpy(
        (generator.choice([-1, 1], 100) * 2.0 ** generator.integers(-100, -54, 100)).astype("f4")
    )
    x, weight = torch.full((1, 2), 2.0**-24), torch.stack((torch.ones(100), far * 2.0**24), 1)
    expected = torch.where(far > 0, torch.nextafter(bias, torch.tensor(4.0)), bias)
    assert same_bits(ops.linear(x, weight, bias)[0], expected)


def test_a_bias_may_cancel_the_product(path):
    for seed in range(6):
        x, weight, sums = reference.deep_cancellation(seed, 40, 12, seed % 3)
        bias = -rounded(sums)
        left = [total + Fraction(b) for total, b in zip(sums, bias.tolist(), strict=True)]
        assert same_bits(ops.linear(x, weight, bias)[0], rounded(left))


@pytest.mark.parametrize("d_head", [8, 12, 50])
def test_scores_are_correctly_rounded_where_their_scale_leaves_them_next_to_a_midpoint(d_head, path):
    """The last of three float64 rounds when it is scaled, and that rounding would decide."""
    factor = inverse_square_root(d_head)
    parts, expected = reference.scaled_midpoints(d_head, 60, factor)
    q, k = torch.ones(1, 1, 1, d_head), torch.zeros(1, 60, 1, d_head)
    k[0, :, 0, :7] = parts
    assert same_bits(ops.attention_scores(q, k)[0, 0, 0], expected)


@pytest.mark.parametrize("factor", [0.7, inverse_square_root(6), inverse_square_root(50), 3.3])
def test_the_plain_repair_alone_is_right_next_to_midpoints_times_a_factor(factor):
    for pairs in (0, 10, 30):
        parts, expected = reference.scaled_midpoints(int(100 * factor), 200, factor, pairs)
        found = dot_rows(parts.double(), torch.ones_like(parts).double(), factor=factor)
        assert same_bits(found, expected)
        # The control: scaling the float64 sum rounds some of them wrongly.
        assert not same_bits((parts.double().sum(1) * factor).float(), expected)


@pytest.mark.parametrize(("terms", "stages"), SIZES)
def test_the_plain_repair_alone_is_right_however_often_they_cancel(terms, stages):
    x, weight, sums = reference.deep_cancellation(terms + stages, 120, terms, stages)
    given = x.expand_as(weight).double(), weight.double()
    assert same_bits(dot_rows(*given), rounded(sums))
    for factor in (0.7, inverse_square_root(6)):
        assert same_bits(dot_rows(*given, factor=factor), rounded([Fraction(factor) * s for s in sums]))


@pytest.mark.parametrize("part", [lambda terms: repair._sum_quickly(terms, None), repair._sum_surely])
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_each_plain_repair_is_right_where_it_is_certain(part, factor):
    certain = asked = 0

    def check(terms, expected):
        nonlocal certain, asked
        values, sure = repair._scaled_and_rounded(part(terms.double()), factor)
        certain += certain_and_right(list(zip(values.tolist(), sure.tolist(), strict=True)), expected)
        asked += terms.shape[0]

    for terms, stages, reach in [*((*size, 50) for size in SIZES), (40, 1, 2), (129, 1, 2), (129, 2, 2)]:
        x, weight, sums = reference.deep_cancellation(3 * terms + stages, 100, terms, stages, reach)
        check(x.double() * weight.double(), rounded([Fraction(factor) * total for total in sums]))
    if factor == 1.0:
        for size in TIES:
            check(*reference.hidden_ties(3, 100, *size))
    else:
        for pairs in (0, 10, 30):
            check(*reference.scaled_midpoints(3, 100, factor, pairs))
    # Both decide some and leave some, or the claim would be empty.
    assert asked // 20 < certain < asked


def test_the_plain_repair_leaves_some_to_integers_and_decides_most(monkeypatch):
    """Neither part of it stands idle in the tests above."""
    asked = 0
    true = repair.dot_of_integers

    def counted(*given):
        nonlocal asked
        asked += 1
        return true(*given)

    monkeypatch.setattr(repair, "dot_of_integers", counted)
    for terms, stages in SIZES:
        x, weight, _ = reference.deep_cancellation(terms + stages, 120, terms, stages)
        dot_rows(x.expand_as(weight).double(), weight.double())
    assert 20 < asked < 60 * len(SIZES)


# The compiled repair, one part at a time


def compiled_parts():
    pytest.importorskip("numba", reason="the compiled loops need numba")
    from oracle import product_kernels

    return product_kernels


def certain_and_right(answers: list[tuple[float, bool]], expected: torch.Tensor) -> int:
    """How many answers are called certain; all of those must be right."""
    wrong = [
        (value, right)
        for (value, certain), right in zip(answers, expected.tolist(), strict=True)
        if certain and value != right
    ]
    assert wrong == []
    return sum(certain for _, certain in answers)


@pytest.mark.parametrize("part", ["quickly", "surely"])
def test_each_compiled_repair_is_right_where_it_is_certain(part):
    kernels = compiled_parts()
    certain = asked = 0
    for terms, stages, reach in [*((*size, 50) for size in SIZES), (40, 1, 2), (129, 1, 2), (129, 2, 2)]:
        x, weight, sums = reference.deep_cancellation(7 * terms + stages, 150, terms, stages, reach)
        rows, cols = as_rows(x, "x"), as_rows(weight, "weight")
        a, size = rows.values[0, 0].numpy(), float(rows.norms[0, 0]) * 1.01
        work, errors = np.empty(a.size + 40), np.empty(a.size + 1)
        answers = [
            kernels._dot_quickly(a, column, 0.0, size * norm, work, errors)
            if part == "quickly"
            else kernels._dot_surely(a, column, 0.0, 1.0, work)
            for column, norm in zip(cols.values[0].numpy(), cols.norms[0].tolist(), strict=True)
        ]
        certain += certain_and_right(answers, rounded(sums))
        asked += len(answers)
    for size_of_ties in TIES:
        ties, expected = reference.hidden_ties(2, 200, *size_of_ties)
        ones = torch.ones(ties.shape[1]).double().numpy()
        work, errors = np.empty(ones.size + 40), np.empty(ones.size + 1)
        sizes = (as_rows(ties, "ties").norms[0] * ones.size**0.5 * 1.01).tolist()
        answers = [
            kernels._dot_quickly(row, ones, 0.0, size, work, errors)
            if part == "quickly"
            else kernels._dot_surely(row, ones, 0.0, 1.0, work)
            for row, size in zip(ties.double().numpy(), sizes, strict=True)
        ]
        certain += certain_and_right(answers, expected)
        asked += len(answers)
    # Both decide some and leave some, or the claim would be empty.
    assert asked // 20 < certain < asked


@pytest.mark.parametrize("factor", [0.7, inverse_square_root(6), inverse_square_root(50), 3.3])
def test_the_compiled_repair_with_a_factor_is_right_where_it_is_certain(factor):
    kernels = compiled_parts()
    for pairs in (0, 10, 30):
        parts, expected = reference.scaled_midpoints(int(100 * factor), 200, factor, pairs)
        ones, work = np.ones(parts.shape[1]), np.empty(parts.shape[1] + 40)
        answers = [kernels._dot_surely(row, ones, 0.0, factor, work) for row in parts.double().numpy()]
        certain_and_right(answers, expected)
    certain = 0
    for terms, stages in SIZES:
        x, weight, sums = reference.deep_cancellation(terms + stages, 100, terms, stages)
        given = x[0].double().numpy()
        work = np.empty(given.size + 40)
        answers = [kernels._dot_surely(given, row, 0.0, factor, work) for row in weight.double().numpy()]
        certain += certain_and_right(answers, rounded([Fraction(factor) * total for total in sums]))
    assert certain > 100
