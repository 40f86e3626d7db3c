"""Differences in value and in ulp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mdlm_interp.errors import DataError
from oracle import compare, ulp_distance


@pytest.mark.parametrize(("dtype", "scalar"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_neighbours_are_one_ulp_apart_everywhere(dtype, scalar):
    values = [0.0, 1.0, -1.0, 3e-39, -5e-324, 1e38, -math.pi]
    a = [scalar(value) for value in values]
    b = [np.nextafter(value, scalar(np.inf)) for value in a]
    distance = ulp_distance(torch.tensor(np.array(a), dtype=dtype), torch.tensor(np.array(b), dtype=dtype))
    assert distance.tolist() == [1] * len(values)


def test_the_distance_across_zero_counts_both_sides_and_zeros_are_equal():
    a, b = torch.tensor([1e-45, 0.0]), torch.tensor([-1e-45, -0.0])
    assert ulp_distance(a, b).tolist() == [2, 0]


def test_a_distance_beyond_int64_saturates():
    huge = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert ulp_distance(huge, -huge).tolist() == [torch.iinfo(torch.int64).max]


def test_the_worst_element_of_the_worst_tensor_comes_first():
    a = {"x": torch.zeros(2, 3), "y": torch.ones(4)}
    b = {"x": torch.zeros(2, 3), "y": torch.ones(4)}
    b["x"][1, 2] = 0.5
    b["y"][3] = 3.0
    first, second = compare(a, b)
    assert (first.name, first.worst, first.max_abs, first.values) == ("y", (3,), 2.0, (1.0, 3.0))
    assert (second.name, second.worst, second.n_different) == ("x", (1, 2), 1)
    assert "worst at [3]: 1.0 against 3.0" in str(first)
    assert str(compare(a, a)[0]).endswith(": identical")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"compares equal shapes, got \[2\] and \[3\]"),
        (torch.zeros(2), torch.zeros(2).double(), "two float32 or two float64"),
        (torch.zeros(2), torch.full((2,), math.nan), "cannot place NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, message):
    with pytest.raises(DataError, match=message):
        ulp_distance(a, b)


def test_a_name_on_one_side_only_is_refused():
    with pytest.raises(DataError, match="'y' is missing on the second side"):
        compare({"x": torch.zeros(1), "y": torch.zeros(1)}, {"x": torch.zeros(1)})
