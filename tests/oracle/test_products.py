"""Matrix products against exact rational arithmetic, in whatever order they are computed. Every claim is exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from oracle import ops, plain_path, products, witness
from oracle.repair import dot_of_integers, dot_rows
from oracle.tables import inverse_square_root
from tests.oracle import exact_reference as reference
from tests.oracle.exact_reference import same_bits


@pytest.mark.parametrize("terms", [1, 2, 5, 33, 100])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_linear_is_the_nearest_float32_to_the_exact_sum(kind, terms, path):
    a, b = (
        reference.hard_rows(kind, 10 * terms, 6, 5, terms)
        if terms > 1
        else (torch.ones(6, 1), torch.ones(5, 1))
    )
    assert same_bits(ops.linear(a, b), reference.products(a, b))
    bias = b[:, 0].clone() * (1 + 2.0**-23)
    assert same_bits(ops.linear(a, b, bias), reference.products(a, b, bias))


def test_sums_longer_than_a_chunk_are_correctly_rounded(path, monkeypatch):
    monkeypatch.setattr(products, "WHOLE_TERMS", 20)
    monkeypatch.setattr(products, "CHUNK_TERMS", 16)
    for kind in ("normal", "wide", "nearly ties", "cancellation"):
        a, b = reference.hard_rows(kind, 3, 4, 4, 75)
        assert same_bits(ops.linear(a, b), reference.products(a, b)), kind


def test_near_ties_are_hard():
    """Rounding the float64 product gives other bits: what decides is lost below a midpoint."""
    a, b = reference.hard_rows("nearly ties", 50, 6, 5, 33)
    exact = reference.products(a, b)
    assert not same_bits((a.flip(1).double() @ b.flip(1).double().T).float(), exact)
    assert not same_bits(functional.linear(a, b), exact)


def test_the_ties_are_ties():
    """Exactly midway between two float32, one in twenty at least, and summed in float32 some go wrong."""
    a, b = reference.hard_rows("ties", 50, 30, 20, 33)
    exact = a.double() @ b.double().T  # integers below 2^53
    upper, lower = exact.float().double(), torch.nextafter(exact.float(), exact.float() * 0).double()
    midway = (exact - lower).abs() == (upper - exact).abs()
    assert int(midway.sum()) >= 30
    assert not same_bits(functional.linear(a, b), reference.products(a, b))


@pytest.mark.parametrize("d_head", [6, 16, 32, 50])
def test_scores_are_rounded_once_with_their_scale(d_head, path):
    for kind in ("normal", "wide", "nearly ties", "cancellation", "subnormal results"):
        q, k = reference.hard_rows(kind, d_head, 5, 7, d_head)
        found = ops.attention_scores(q.reshape(1, 5, 1, -1), k.reshape(1, 7, 1, -1))[0, 0]
        assert same_bits(found, reference.products(q, k, factor=inverse_square_root(d_head))), kind


def test_mix_is_the_nearest_float32_to_the_exact_sum(path):
    pattern = reference.draw(1, (2, 3, 5, 40), -30, 0).abs()
    v = reference.draw(2, (2, 40, 3, 4), -10, 10)
    found = ops.mix(pattern, v)
    for batch in range(2):
        for head in range(3):
            expected = reference.products(pattern[batch, head], v[batch, :, head].T)
            assert same_bits(found[batch, :, head], expected)


def softmax(row: torch.Tensor) -> torch.Tensor:
    """SPEC's, by the witness."""
    return torch.from_numpy(witness.softmax(row.numpy()))


@pytest.mark.parametrize("d_head", [4, 16, 17, 40])
def test_attention_is_scores_softmax_and_mix_each_rounded_from_its_exact_value(d_head, path):
    """Scores and values whose first 24 bits cancel: an error bound a few hundred times too small decides wrongly."""
    groups, keys = 40, 9
    factor = inverse_square_root(d_head)
    q, k = torch.zeros(groups, 1, 1, d_head), torch.zeros(groups, keys, 1, d_head)
    patterns = []
    for group in range(groups):
        x, weight, _ = reference.deep_cancellation(group, keys, d_head - 1, 1, reach=2)
        # Large parts that cancel leave scores of the size of 1.
        q[group, 0, 0], k[group, :, 0] = x[0], weight * 2.0**22
        patterns.append(softmax(reference.products(x, weight * 2.0**22, factor=factor))[0])
    pattern = torch.stack(patterns)
    v = reference.draw(7, (groups, keys, 1, d_head), -2, 2)
    for group in range(groups):
        # The most probable key's value takes away what the others add up to.
        most = int(pattern[group].argmax())
        v[group, most] = 0.0
        for dimension in range(d_head):
            others = sum(
                map(reference.exact_product, pattern[group].tolist(), v[group, :, 0, dimension].tolist())
            )
            v[group, most, 0, dimension] = -float(others / Fraction(float(pattern[group, most])))
    expected = torch.stack([reference.products(pattern[g : g + 1], v[g, :, 0].T)[0] for g in range(groups)])
    assert same_bits(ops.attention(q, k, v)[:, 0, 0], expected)
    # The control: in float64 some of the values come out wrong.
    inexact = (pattern[:, None].double() @ v[:, :, 0].double())[:, 0].float()
    assert not same_bits(inexact, expected)


def test_matmul_broadcasts_and_is_correctly_rounded(path):
    a, b = reference.draw(3, (2, 1, 4, 9), -20, 20), reference.draw(4, (3, 9, 5), -20, 20)
    found = ops.matmul(a, b)
    assert found.shape == (2, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            assert same_bits(found[i, j], reference.products(a[i, 0], b[j].T))


@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=9),
    st.floats(width=32),
)
@settings(max_examples=300)
def test_any_finite_floats_are_correctly_rounded(pairs, bias):
    finite = [pair for pair in pairs if all(np.isfinite(pair))] or [(0.0, 0.0)]
    bias = bias if np.isfinite(bias) else 0.0
    a, b = (torch.tensor([[pair[i] for pair in finite]], dtype=torch.float32) for i in (0, 1))
    total = torch.tensor([bias], dtype=torch.float32)
    expected = reference.dot(a[0], b[0], bias)
    if not np.isfinite(expected) or abs(expected) >= 2.0**127:
        return  # overflow is refused, see test_refusals
    for context in (plain_path, torch.no_grad):
        with context():
            assert same_bits(ops.linear(a, b, total), torch.tensor([[expected]]))


@pytest.mark.parametrize("factor", [1.0, 0.7, inverse_square_root(6)])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_repair_alone_rounds_every_output_correctly(kind, factor):
    a, b = (x.double() for x in reference.hard_rows(kind, 77, 12, 12, 60))
    bias = torch.linspace(-1, 1, 12).float().double()
    expected = [reference.dot(x, y, c, factor) for x, y, c in zip(a, b, bias.tolist(), strict=True)]
    assert dot_rows(a, b, bias, factor).tolist() == expected
    assert [dot_of_integers(x, y, c, factor) for x, y, c in zip(a, b, bias.tolist(), strict=True)] == expected


def test_repair_is_used_and_needed_where_the_product_cannot_decide():
    """At 768 terms between one output in 10^5 and one in 100 is left to repair, and those come out right."""
    a, b = reference.draw(5, (300, 768)), reference.draw(6, (300, 768))
    rows, cols = products.as_rows(a, "a"), products.as_rows(b, "b")
    product, unit = products.raw_product(rows, cols, products.Workspace(a.device))
    out = torch.empty(1, 300, 300)
    undecided = products._decide(product, rows.norms * unit, cols.norms, None, out)
    assert 1 <= undecided.shape[0] < 900
    found = ops.linear(a, b)
    places = [(i, j) for _, i, j in undecided.tolist()]
    assert all(found[i, j].item() == reference.dot(a[i], b[j]) for i, j in places)
    # Needed: where the first 24 bits cancel, rounding the float64 product is wrong.
    x, weight, _ = reference.deep_cancellation(1, 40, 40, 1, reach=2)
    assert not same_bits((x.double() @ weight.double().T).float(), ops.linear(x, weight))


def test_a_bound_so_wide_that_everything_is_repaired_changes_nothing(path, monkeypatch):
    for kind in ("normal", "wide", "nearly ties", "cancellation", "outliers"):
        a, b = reference.hard_rows(kind, 8, 6, 7, 65)
        linear, scores = (
            ops.linear(a, b),
            ops.attention_scores(a.reshape(1, 6, 1, 65), b.reshape(1, 7, 1, 65)),
        )
        monkeypatch.setattr(products, "BOUND_SCALE", 2.0**40)
        assert same_bits(ops.linear(a, b), linear)
        assert same_bits(ops.attention_scores(a.reshape(1, 6, 1, 65), b.reshape(1, 7, 1, 65)), scores)
        monkeypatch.setattr(products, "BOUND_SCALE", 1.0)


def test_a_bound_that_is_too_small_is_caught(monkeypatch):
    """The control of this file: with the error bound 2^20 times too small a definition test fails."""
    wrong = 0
    for kind in ("nearly ties", "cancellation", "wide"):
        a, b = reference.hard_rows(kind, 50, 6, 5, 33)
        expected = reference.products(a, b)
        monkeypatch.setattr(products, "BOUND_SCALE", 2.0**-20)
        with plain_path():
            wrong += not same_bits(ops.linear(a, b), expected)
        wrong += not same_bits(ops.linear(a, b), expected)
        monkeypatch.setattr(products, "BOUND_SCALE", 1.0)
        assert same_bits(ops.linear(a, b), expected)
    assert wrong >= 2
