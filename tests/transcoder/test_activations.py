"""TopK: which values are kept, and where the gradient goes. All claims on values are exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transcoder.activations import topk, topk_mask


def kept_by_sorting(row: list[float], k: int) -> list[bool]:
    """The k largest, ties by lowest index, by Python's stable sort."""
    chosen = sorted(range(len(row)), key=lambda index: -row[index])[:k]
    return [index in chosen for index in range(len(row))]


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6)
)
def test_exactly_k_are_kept_and_ties_go_to_the_lowest_index(rows, k):
    expected = torch.tensor([kept_by_sorting(row, k) for row in rows])
    found = topk_mask(torch.tensor(rows, dtype=torch.float32), k)
    assert torch.equal(found, expected)
    assert found.sum(-1).tolist() == [k] * len(rows)


def test_ties_in_one_row_do_not_touch_the_others():
    pre_acts = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    untied = topk_mask(pre_acts, 5)
    pre_acts[2, 1] = 1.0
    tied = topk_mask(pre_acts, 5)
    assert tied[2, 1].tolist() == [True] * 5 + [False] * 15
    tied[2, 1] = untied[2, 1]
    assert torch.equal(tied, untied)


def test_kept_values_are_unchanged_and_the_rest_is_zero():
    pre_acts = torch.rand(7, 30, generator=torch.Generator().manual_seed(1)) + 0.5
    acts = topk(pre_acts, 6)
    assert (acts > 0).sum(-1).tolist() == [6] * 7
    assert torch.equal(acts[acts > 0], pre_acts[acts > 0])
    assert bool((acts.sort(-1).values[:, 24] >= torch.where(acts > 0, 0, pre_acts).max(-1).values).all())


def test_a_kept_value_below_zero_counts_as_inactive():
    assert topk(torch.tensor([-1.0, 3.0, -2.0, -0.5]), 2).tolist() == [0.0, 3.0, 0.0, 0.0]


def test_k_of_all_features_is_a_relu():
    assert topk(torch.tensor([[-1.0, 2.0]]), 5).tolist() == [[0.0, 2.0]]


def test_a_nan_stays_visible():
    acts = topk(torch.tensor([[1.0, math.nan, 2.0], [1.0, 3.0, 2.0]]), 1)
    assert bool(acts[0].isnan().any())
    assert acts[1].tolist() == [0.0, 3.0, 0.0]


def test_the_gradient_is_the_finite_difference_at_kept_features_and_zero_elsewhere():
    generator = torch.Generator().manual_seed(2)
    pre_acts = torch.randn(3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    torch.autograd.backward((weight * topk(pre_acts, 4).square()).sum())
    kept = topk_mask(pre_acts.detach(), 4) & (pre_acts > 0)
    gradient = pre_acts.grad
    assert gradient is not None
    step = 1e-6
    for row, feature in torch.cartesian_prod(torch.arange(3), torch.arange(12)).tolist():
        shifted = pre_acts.detach().clone()
        values = []
        for sign in (1, -1):
            shifted[row, feature] = pre_acts.detach()[row, feature] + sign * step
            values.append(float((weight * topk(shifted, 4).square()).sum()))
        difference = (values[0] - values[1]) / (2 * step)
        # Rounding of the sum, about 1e-15, over the step.
        assert float(gradient[row, feature]) == pytest.approx(difference, abs=1e-7)
        assert bool(gradient[row, feature] != 0) == bool(kept[row, feature])
