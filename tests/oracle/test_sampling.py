"""Exact sampling: draws are integer arithmetic, keyed by seed, step, sequence and position. Every claim is exact."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import tqdm

from mdlm_interp.errors import DataError
from oracle import ExactError, Oracle, exact_sample, golden, witness_sampling
from oracle.sampling import counts, draw
from tests.oracle.exact_reference import draw as draw_logits

MASK = golden.SYNTHETIC_CONFIG.mask_id


@pytest.mark.parametrize("temperature", [0.25, 0.8, 1.0, 3.0, 1e-300])
def test_counts_and_draws_are_the_witness_s(temperature):
    logits = draw_logits(1, (6, 50), -2, 4)
    weights = counts(logits, 49, temperature)
    words = [0, 2**63, 2**64 - 1, 0x123456789ABCDEF0, 7**22, 3**40]
    expected = [witness_sampling.draw_weights(row.numpy(), 49, temperature) for row in logits]
    assert weights.tolist() == expected
    tokens = [
        witness_sampling.draw(row.numpy(), 49, temperature, word)
        for row, word in zip(logits, words, strict=True)
    ]
    assert draw(weights, words).tolist() == tokens


def test_counts_of_close_logits_are_the_witness_s_and_not_those_of_torch_s_exp():
    logits = draw_logits(2, (40, 200), -8, -1)
    found = counts(logits, 199).tolist()
    assert found == [witness_sampling.draw_weights(row.numpy(), 199, 1.0) for row in logits]
    # The control: SPEC's exponential and another one differ by more than half a count here and there.
    values = logits[:, :199].double()
    others = ((values - values.amax(-1, keepdim=True)).exp() * 2.0**42).round().to(torch.int64)
    assert [row[:199] for row in found] != others.tolist()


def test_draws_follow_the_counts():
    """A word below the first token's share takes it, the next one the second."""
    weights = torch.tensor([[1, 0, 3]] * 4)
    quarter = 2**62
    assert draw(weights, [0, quarter - 1, quarter, 2**64 - 1]).tolist() == [0, 0, 2, 2]


def test_a_sample_is_the_witness_s_and_the_same_in_any_batch(synthetic, path):
    oracle = Oracle(synthetic)
    start = torch.full((2, 7), MASK)
    start[1, :4] = torch.tensor([5, 6, 7, 8])
    found = exact_sample(oracle, start, steps=3, seed=3)
    assert not bool((found == MASK).any())
    assert found[1, :4].tolist() == [5, 6, 7, 8]
    weights = {name: tensor.numpy() for name, tensor in synthetic.state_dict().items()}
    for row in range(2):
        expected = witness_sampling.reverse_process(
            weights, synthetic.config, start[row].numpy(), n_steps=3, seed=3, sequence=row
        )
        assert found[row].tolist() == expected.tolist()
        alone = exact_sample(oracle, start[row : row + 1], steps=3, seed=3, indices=[row])
        assert torch.equal(alone[0], found[row])


def test_the_seed_and_the_sequence_number_change_the_text(oracle):
    start = torch.full((2, 12), MASK)
    found = exact_sample(oracle, start, steps=3, seed=0)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, exact_sample(oracle, start, steps=3, seed=1))
    assert torch.equal(found.flip(0), exact_sample(oracle, start, steps=3, seed=0, indices=[1, 0]))


def test_temperature_zero_takes_the_first_of_the_best(oracle):
    start = torch.full((1, 8), MASK)
    with oracle.hooks({"hook_logits": lambda logits, hook: torch.zeros_like(logits)}):
        assert exact_sample(oracle, start, steps=2, temperature=0.0).tolist() == [[0] * 8]


def test_a_finished_text_is_left_as_it_is(oracle):
    start = torch.zeros(1, 5, dtype=torch.int64)
    assert torch.equal(exact_sample(oracle, start, steps=2), start)


def test_what_cannot_be_drawn_is_refused(oracle):
    logits, start = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ExactError, match="temperature must be positive and finite, got 0"):
        counts(logits, None, 0.0)
    with pytest.raises(ExactError, match="must have 1 to 1048576 tokens to draw from, got 1"):
        counts(torch.zeros(1, 1), 0)
    with pytest.raises(ExactError, match=r"counts: logits is not finite at \[0, 1\]"):
        counts(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(DataError, match="steps must be at least 1, got 0"):
        exact_sample(oracle, start, steps=0)
    with pytest.raises(ExactError, match=r"counts: the excluded token must be in \[0, 4\), got 4"):
        counts(logits, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite, got inf"),
        ({"indices": []}, "indices must number each of the 1 sequences, got 0; none for 0, 1, ..."),
        ({"indices": [0, 1]}, "indices must number each of the 1 sequences, got 2; none for 0, 1, ..."),
        ({"indices": [-1]}, "index must be in [0, 2**63), got -1"),
        ({"seed": -1}, "seed must be in [0, 2**64), got -1"),
        (
            {"start": torch.zeros(5, dtype=torch.int64)},
            "start must be int64 [batch pos] and not empty, got int64 [5]",
        ),
        ({"start": torch.zeros(1, 0, dtype=torch.int64)}, "not empty, got int64 [1, 0]"),
        ({"start": torch.zeros(1, 5)}, "start must be int64 [batch pos] and not empty, got float32 [1, 5]"),
        (
            {"start": torch.full((1, 5), 61)},
            "token ids must be in [0, 61), got 61; was the text encoded with another",
        ),
        ({"start": torch.full((1, 5), -1)}, "token ids must be in [0, 61), got -1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_arguments_out_of_range_are_refused_whether_or_not_there_is_a_mask(
    arguments, message, is_masked, oracle, unchecked
):
    start = torch.full((1, 5), MASK if is_masked else 3)
    with pytest.raises(DataError, match=re.escape(message)):
        exact_sample(oracle, **{"start": start, "steps": 1, **arguments})


def test_a_bar_is_shown_if_tqdm_is_there_and_done_without_if_not(oracle, monkeypatch):
    start, shown = torch.full((1, 6), MASK), []
    real = tqdm.tqdm

    def bar(steps, **settings):
        shown.append((list(steps), settings["disable"]))
        return real(steps, **settings)

    monkeypatch.setattr(tqdm, "tqdm", bar)
    expected = exact_sample(oracle, start, steps=2)
    assert shown == []
    assert torch.equal(exact_sample(oracle, start, steps=2, progress=True), expected)
    assert shown == [([0, 1], None)]  # None: tqdm itself looks whether stderr is a terminal
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert torch.equal(exact_sample(oracle, start, steps=2, progress=True), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_a_hook_spoils_are_not_drawn_from(temperature, oracle):
    start = torch.full((1, 8), MASK)
    with (
        oracle.hooks({"hook_logits": lambda logits, hook: logits * float("nan")}),
        pytest.raises(ExactError, match=r"hook_logits: what the hooks left is not finite at \[0, 0, 0\]"),
    ):
        exact_sample(oracle, start, steps=2, temperature=temperature)
