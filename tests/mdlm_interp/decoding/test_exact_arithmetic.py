"""The same samplers in the oracle's arithmetic: what is drawn is decided by integers, the same on every machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdlm_interp.decoding import (
    Ancestral,
    Draw,
    DrawArithmetic,
    Even,
    FirstHitting,
    Fixed,
    ReMDM,
    Sampler,
    sample,
)
from oracle import ExactDraws, Oracle, exact_sample


@pytest.fixture
def oracle(model) -> Oracle:
    return Oracle(model)


@pytest.fixture
def start(small_config) -> Tensor:
    start = torch.full((2, 7), small_config.mask_id)
    start[1, 3:5] = torch.tensor([5, 6])
    return start


def test_exact_draws_are_a_draw_arithmetic():
    assert isinstance(ExactDraws(), DrawArithmetic)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_ancestral_sampling_in_exact_arithmetic_is_the_oracle_s_own(oracle, start, steps, temperature):
    """Exact: SPEC's reverse process, section 6."""
    expected = exact_sample(oracle, start, steps=steps, seed=3, temperature=temperature, indices=[4, 7])
    sampler = Sampler(schedule=Ancestral(steps=steps), draw=Draw(temperature=temperature))
    found = sample(oracle.model, start, sampler, seed=3, indices=[4, 7], arithmetic=ExactDraws())
    assert torch.equal(found.final, expected)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(schedule=FirstHitting()),
        Sampler(schedule=Fixed(per_step=2), draw=Draw(temperature=0.6, top_k=9, top_p=0.8)),
        Sampler(schedule=Even(steps=4), order="margin", block_length=4),
        Sampler(schedule=Ancestral(steps=6, end=1e-5, joint=True)),
        Sampler(schedule=ReMDM(grid=Ancestral(steps=8), strategy="conf", eta=1.0)),
        Sampler(schedule=Even(steps=3), guidance=0.5),
    ],
    ids=["first hitting", "top-k, top-p", "margin in blocks", "analytic", "remdm conf", "guidance"],
)
def test_every_sampler_gives_the_same_bits_in_any_batch(oracle, start, sampler):
    """Exact, confidences included: alone or in company, in another order; float32's last bits would differ."""
    together = sample(oracle.model, start, sampler, seed=2, arithmetic=ExactDraws())
    for row in range(2):
        alone = sample(
            oracle.model, start[row : row + 1], sampler, seed=2, indices=[row], arithmetic=ExactDraws()
        )
        n = alone.n_steps
        assert torch.equal(together.states[: n + 1, row], alone.states[:, 0])
        assert torch.equal(
            together.confidence[:n, row].nan_to_num(nan=-1), alone.confidence[:, 0].nan_to_num(nan=-1)
        )
    native = sample(oracle.model, start, sampler, seed=2)
    assert torch.equal(native.final, together.final)


def test_a_draw_between_two_counts_is_decided_by_integers():
    """Exact: the first word that belongs to the second of two equal tokens is half of all words."""
    import numpy as np

    exact = ExactDraws()
    weights = exact.weights(torch.zeros(2, 2), 1.0)
    words = np.array([2**63 - 1, 2**63], np.uint64)
    assert exact.pick(weights, words).tolist() == [0, 1]
