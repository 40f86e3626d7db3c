"""Samplers against an exact denoiser of a known Markov chain: one token a step reproduces its law.

Behavioural, with fixed seeds: chi-square over all 81 sequences, whose excess over its mean, in standard deviations, is
below 4.5 for samples of the law. What is known to be biased stands beside it, and is found.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from mdlm_interp.decoding import (
    Ancestral,
    Draw,
    Even,
    FirstHitting,
    Fixed,
    ReMDM,
    Sampler,
    Threshold,
    sample,
)
from tests.mdlm_interp.decoding.chain import MarkovChain, chi_square, excess

N = 6000
BOUND = 4.5
ONE_A_STEP = {
    "first hitting": Sampler(schedule=FirstHitting()),
    "confidence": Sampler(schedule=Fixed()),
    "margin": Sampler(schedule=Fixed(), order="margin"),
    "entropy": Sampler(schedule=Fixed(), order="entropy"),
    "random": Sampler(schedule=Fixed(), order="random"),
    "left to right": Sampler(schedule=Fixed(), order="left_to_right"),
    "given": Sampler(schedule=Fixed(), order=(2, 0, 3, 1)),
    "even": Sampler(schedule=Even(steps=4), order="entropy"),
    "blocks": Sampler(schedule=Fixed(), order="random", block_length=2),
    "high threshold": Sampler(schedule=Threshold(probability=1.0)),
}


def test_the_chains_posterior_is_that_of_its_law(chain):
    """Bounded at 1e-12: forward-backward against sums over all sequences, for every pattern of masks."""
    sequences = torch.tensor(chain.sequences())
    law = chain.law()
    for seen in itertools.product((False, True), repeat=chain.length):
        x = torch.where(torch.tensor(seen), sequences[17], chain.mask_id)[None]
        agrees = ((sequences == x) | (x == chain.mask_id)).all(1)
        found = chain(x, torch.zeros(1))[0].exp()
        for position, token in itertools.product(range(chain.length), range(chain.mask_id)):
            chance = law[agrees & (sequences[:, position] == token)].sum() / law[agrees].sum()
            assert float(found[position, token]) == pytest.approx(float(chance), abs=1e-12)


@pytest.mark.parametrize("name", ONE_A_STEP)
def test_one_token_a_step_reproduces_the_law(chain, name):
    trajectory = sample(chain, chain.masks(N), ONE_A_STEP[name], seed=1)
    assert trajectory.n_steps == chain.length
    assert excess(trajectory.final, chain.law(), chain.mask_id) < BOUND


def test_many_steps_of_the_reverse_process_reproduce_the_law(chain):
    """With 150 steps two of the four tokens share one in 4 of 100 samples, which 1,000 samples cannot tell."""
    trajectory = sample(chain, chain.masks(1000), Sampler(schedule=Ancestral(steps=150)), seed=2)
    assert excess(trajectory.final, chain.law(), chain.mask_id) < BOUND


def test_revising_tokens_keeps_the_law(chain):
    """Much is remasked, and what comes of it is still the law's, to what 1,000 samples can tell."""
    sampler = Sampler(schedule=ReMDM(grid=Ancestral(steps=150), strategy="cap", eta=0.02))
    trajectory = sample(chain, chain.masks(1000), sampler, seed=3)
    states = trajectory.states
    remasked = ((states[:-1] != chain.mask_id) & (states[1:] == chain.mask_id)).sum()
    assert int(remasked) > 2000
    assert excess(trajectory.final, chain.law(), chain.mask_id) < BOUND


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(schedule=Fixed(per_step=2)),
        Sampler(schedule=Even(steps=1)),
        Sampler(schedule=Ancestral(steps=2)),
        Sampler(schedule=Fixed(), order="drawn_confidence"),
        Sampler(schedule=Fixed(), draw=Draw(temperature=0.8)),
        Sampler(schedule=Fixed(), draw=Draw(top_p=0.9)),
    ],
    ids=["two a step", "all at once", "two ancestral steps", "order by the draw", "temperature", "top-p"],
)
def test_what_is_not_exact_is_found(chain, sampler):
    """The control: several tokens a step, an order that looks at the draw, and other probabilities all show."""
    found = sample(chain, chain.masks(N), sampler, seed=1).final
    assert excess(found, chain.law(), chain.mask_id) > 2 * BOUND


def test_a_wrong_order_of_equal_words_would_be_found(chain, monkeypatch):
    """A mutant: the random order and the tokens share their random numbers."""
    words = "mdlm_interp.decoding.sampler._Run.words"
    from mdlm_interp.decoding.sampler import _Run

    original = _Run.words
    monkeypatch.setattr(words, lambda self, stream, number: original(self, "token", number))
    found = sample(chain, chain.masks(N), ONE_A_STEP["random"], seed=1).final
    assert excess(found, chain.law(), chain.mask_id) > 2 * BOUND


def test_the_statistic_is_that_of_the_textbook():
    law = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    samples = torch.tensor([[0]] * 44 + [[1]] * 31 + [[2]] * 25)
    assert chi_square(samples, law, 3) == pytest.approx((36 / 50 + 36 / 25 + 0, 3 - 1))


def test_infilling_follows_the_law_given_what_is_fixed(chain):
    """The tokens at both ends and in the middle stay; the rest has the conditional law."""
    fixed = torch.tensor([2, chain.mask_id, chain.mask_id, 0])
    found = sample(chain, fixed.expand(N, -1), Sampler(schedule=FirstHitting()), seed=5).final
    assert bool((found[:, [0, 3]] == fixed[[0, 3]]).all())
    sequences = torch.tensor(chain.sequences())
    agrees = ((sequences == fixed) | (fixed == chain.mask_id)).all(1)
    conditional = torch.where(agrees, chain.law(), 0.0)
    assert excess(found, conditional / conditional.sum(), chain.mask_id) < BOUND
    assert excess(found, chain.law(), chain.mask_id) > 2 * BOUND


def test_the_orders_differ(chain):
    """Not vacuous: on a longer chain the orders fill positions in different sequences."""
    long = MarkovChain(n_tokens=5, length=8, coupling=1.0, seed=8)
    revealed = [
        sample(long, long.masks(1), Sampler(schedule=Fixed(), order=order), seed=3).revealed_at[0].tolist()
        for order in ("confidence", "entropy", "random", "left_to_right", (7, 6, 5, 4, 3, 2, 1, 0))
    ]
    assert len({tuple(order) for order in revealed}) == 5
    assert revealed[3] == list(range(8))
    assert revealed[4] == list(range(7, -1, -1))
