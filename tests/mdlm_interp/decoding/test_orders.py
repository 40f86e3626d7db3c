"""Which positions come first: each order against its definition."""

from __future__ import annotations

import pytest
import torch

from mdlm_interp.decoding.draws import Measured
from mdlm_interp.decoding.orders import highest, scores

OPEN = torch.tensor([[True, True, False, True], [True, True, True, True]])
VALUES = torch.tensor([[0.4, 0.1, 0.9, 0.3], [0.2, 0.2, 0.7, 0.5]], dtype=torch.float64)
MEASURED = Measured(
    tokens=VALUES.long(), confidence=VALUES, drawn=VALUES + 1, margin=VALUES + 2, entropy=VALUES + 3
)
CHANCE = VALUES + 4


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("confidence", VALUES),
        ("drawn_confidence", VALUES + 1),
        ("margin", VALUES + 2),
        ("entropy", -(VALUES + 3)),
        ("random", VALUES + 4),
        ("left_to_right", torch.tensor([0.0, -1.0, -2.0, -3.0]).double().expand(2, 4)),
        ((3, 1, 0, 2), torch.tensor([-2.0, -1.0, -3.0, 0.0]).double().expand(2, 4)),
    ],
    ids=str,
)
def test_each_order_scores_by_what_its_name_says(order, expected):
    """Exact; what is not open is behind everything."""
    assert torch.equal(scores(order, MEASURED, OPEN, CHANCE), expected.masked_fill(~OPEN, -torch.inf))


def test_the_highest_come_first_and_of_equals_the_left_one():
    score = VALUES.masked_fill(~OPEN, -torch.inf)
    assert highest(score, torch.tensor([2, 3])).tolist() == [
        [True, False, False, True],
        [True, False, True, True],
    ]
    assert highest(score, torch.tensor([4, 0])).tolist() == [[True, True, False, True], [False] * 4]
