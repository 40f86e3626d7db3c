"""Drawing one token: temperature, top-k, top-p and suppression in their order, by the inverse CDF."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mdlm_interp.decoding import Draw
from mdlm_interp.decoding import draws as module
from mdlm_interp.decoding.draws import Float64Draws, measure, restrict

LAW = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
N = 4000


def words(n: int = N) -> np.ndarray:
    """Evenly spread over all 64-bit words: counts are then the law itself, to one draw."""
    return (np.arange(n, dtype=np.float64) / n * 2.0**53).astype(np.uint64) << np.uint64(11)


def counted(draw: Draw, law: Tensor = LAW, allowed: tuple[int, ...] | None = None) -> list[float]:
    """Share of each token over evenly spread words."""
    ids = torch.tensor(allowed if allowed is not None else range(len(law)))
    found = measure(law.log().expand(N, -1), words(), draw, Float64Draws(), ids)
    return (torch.bincount(found.tokens, minlength=len(law)).double() / N).tolist()


def test_the_draw_has_the_models_law():
    assert counted(Draw()) == pytest.approx(LAW.tolist(), abs=2 / N)


def test_temperature_is_a_power_and_zero_is_the_best():
    squares = LAW**2 / (LAW**2).sum()
    assert counted(Draw(temperature=0.5)) == pytest.approx(squares.tolist(), abs=2 / N)
    assert counted(Draw(temperature=0.0)) == [1, 0, 0, 0]
    ties = torch.tensor([0.1, 0.45, 0.45], dtype=torch.float64)
    assert counted(Draw(temperature=0.0), ties) == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-320, 5e-324])
def test_a_temperature_so_small_that_quotients_overflow_draws_the_best(temperature):
    """Exact: equals are drawn alike, and others never."""
    assert counted(Draw(temperature=temperature)) == [1, 0, 0, 0]
    ties = torch.tensor([1e-30, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert counted(Draw(temperature=temperature), ties) == [0, 0.5, 0.5, 0]


def test_top_k_keeps_the_k_best_and_ties_with_the_last():
    assert counted(Draw(top_k=2)) == pytest.approx([4 / 7, 0, 3 / 7, 0], abs=2 / N)
    ties = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    assert counted(Draw(top_k=2), ties) == pytest.approx(ties.tolist(), abs=2 / N)
    assert counted(Draw(top_k=99)) == counted(Draw())


def test_top_p_keeps_the_smallest_set_that_holds_p():
    """0.4 + 0.3 reaches 0.7 exactly; a little more takes the next token too."""
    law = torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    assert (restrict(law[None], None, 0.7) > 0).tolist() == [[True, False, True, False]]
    assert (restrict(law[None], None, 0.71) > 0).tolist() == [[True, False, True, True]]
    assert (restrict(law[None], None, 1e-9) > 0).tolist() == [[True, False, False, False]]
    assert counted(Draw(top_p=0.5)) == pytest.approx([4 / 7, 0, 3 / 7, 0], abs=2 / N)


def test_top_p_counts_integer_weights_too():
    weights = torch.tensor([[4, 1, 3, 2]])
    assert restrict(weights, None, 0.7).tolist() == [[4, 0, 3, 0]]
    assert restrict(weights, 3, 0.7).tolist() == [[4, 0, 3, 0]]


def test_the_order_is_temperature_then_top_k_then_top_p():
    """At temperature 1/2 the best token has 16/30 and is enough for p = 0.5; without it, it is not."""
    assert counted(Draw(temperature=0.5, top_p=0.5)) == [1, 0, 0, 0]
    assert sum(share > 0 for share in counted(Draw(top_p=0.5))) == 2
    # Of the three best, 4/9 + 3/9 is less than 0.8; of all four, 0.4 + 0.3 is too: both keep the third.
    assert counted(Draw(top_k=2, top_p=0.57)) == [1, 0, 0, 0]
    assert sum(share > 0 for share in counted(Draw(top_p=0.57))) == 2


def test_top_p_first_chooses_its_set_before_the_temperature():
    """0.7 takes the two best of the plain law; tempered, the best alone would not do, nor would two at T = 2."""
    law = torch.tensor([0.45, 0.1, 0.3, 0.15], dtype=torch.float64)
    first = counted(Draw(temperature=2.0, top_p=0.7, top_p_first=True), law)
    root = law.sqrt()[[0, 2]] / law.sqrt()[[0, 2]].sum()
    assert first == pytest.approx([float(root[0]), 0, float(root[1]), 0], abs=2 / N)
    assert sum(share > 0 for share in counted(Draw(temperature=2.0, top_p=0.7), law)) == 3


def test_what_may_not_be_drawn_is_out_before_everything():
    left = counted(Draw(top_k=2), allowed=(1, 2, 3))
    assert left == pytest.approx([0, 0, 0.6, 0.4], abs=2 / N)


def test_the_measures_are_those_of_the_plain_probabilities():
    """Bounded by rounding, whatever the draw does to them."""
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    allowed = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    draw = Draw(temperature=0.3, top_k=3, top_p=0.8)
    found = measure(logits, words(50), draw, Float64Draws(), allowed)
    plain = logits[:, allowed].double().softmax(-1)
    two = plain.topk(2).values
    torch.testing.assert_close(found.confidence, two[:, 0])
    torch.testing.assert_close(found.margin, two[:, 0] - two[:, 1])
    torch.testing.assert_close(found.entropy, -(plain * plain.log()).sum(-1))
    column = (found.tokens[:, None] == allowed).int().argmax(-1)
    torch.testing.assert_close(found.drawn, plain[torch.arange(50), column])
    assert set(found.tokens.tolist()) <= set(allowed.tolist())


def test_looking_at_a_few_rows_at_a_time_changes_nothing(monkeypatch):
    logits = torch.randn(17, 9, generator=torch.Generator().manual_seed(0))
    whole = measure(logits, words(17), Draw(top_p=0.9), Float64Draws(), torch.arange(9))
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 40)
    pieces = measure(logits, words(17), Draw(top_p=0.9), Float64Draws(), torch.arange(9))
    for name in module.MEASURES:
        assert torch.equal(getattr(whole, name), getattr(pieces, name))


def test_one_token_left_is_certain():
    found = measure(torch.zeros(2, 3), words(2), Draw(), Float64Draws(), torch.tensor([1]))
    assert found.tokens.tolist() == [1, 1]
    assert found.margin.tolist() == found.confidence.tolist() == [1, 1]
    assert found.entropy.tolist() == [0, 0]


def test_no_rows_are_measured_as_none():
    found = measure(torch.zeros(0, 3), words(0), Draw(), Float64Draws(), torch.arange(3))
    assert found.tokens.shape == found.entropy.shape == (0,)
