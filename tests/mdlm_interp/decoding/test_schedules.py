"""How many positions are filled when, and which are taken back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from mdlm_interp.decoding import (
    Ancestral,
    Draw,
    Even,
    FirstHitting,
    Fixed,
    Record,
    ReMDM,
    Rewrite,
    Sampler,
    TakeBack,
    Threshold,
    sample,
)
from mdlm_interp.decoding.draws import Float64Draws, Measured
from mdlm_interp.decoding.schedules import Step, below, reveal_chance
from mdlm_interp.errors import ConfigError
from tests.mdlm_interp.decoding.chain import MarkovChain

LONG = MarkovChain(n_tokens=4, length=11, coupling=1.5, seed=7)


def filled(trajectory) -> list[int]:
    """Positions of the first sequence that each step fills."""
    return [int((trajectory.revealed_at[0] == step).sum()) for step in range(trajectory.n_steps)]


def test_words_are_compared_with_a_chance_exactly():
    words = np.array([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], np.uint64)
    assert below(words, Fraction(1, 4)).tolist() == [True, True, False, False, False]
    assert below(words, Fraction(1, 4) + Fraction(1, 2**64)).tolist() == [True, True, True, False, False]
    third = np.array([2**64 // 3, 2**64 // 3 + 1], np.uint64)  # 2^64 / 3 lies between them
    assert below(third, Fraction(1, 3)).tolist() == [True, False]
    assert below(words, 1.0).tolist() == [True] * 5
    assert below(words, 0.0).tolist() == [False] * 5


@pytest.mark.parametrize(("masks", "steps"), [(11, 3), (11, 4), (11, 11), (11, 20), (11, 1)])
def test_even_steps_are_llada_s_first_steps_take_one_more(masks, steps):
    trajectory = sample(LONG, LONG.masks(1), Sampler(schedule=Even(steps=steps)))
    base, more = divmod(masks, steps)
    expected = [base + (step < more) for step in range(steps)]
    assert filled(trajectory) == [count for count in expected if count or steps <= masks]


def test_even_steps_rounded_down_are_dream_s():
    trajectory = sample(LONG, LONG.masks(1), Sampler(schedule=Even(steps=4, rounding="down")))
    left, expected = 11, []
    for step in range(4):
        t, s = 1 - step / 4, 1 - (step + 1) / 4
        expected.append(int(left * (1 - s / t) + 1e-9) if step < 3 else left)
        left -= expected[-1]
    assert filled(trajectory) == expected == [2, 3, 3, 3]


def test_fixed_steps_fill_k_positions_and_what_is_left_at_last():
    assert filled(sample(LONG, LONG.masks(2), Sampler(schedule=Fixed(per_step=4)))) == [4, 4, 3]


def test_a_threshold_fills_what_is_sure_and_at_least_one():
    draw = Draw(temperature=0.0)
    trajectory = sample(LONG, LONG.masks(3), Sampler(schedule=Threshold(probability=0.6), draw=draw))
    for step in range(trajectory.n_steps):
        for row in range(3):
            chosen = trajectory.revealed_at[row] == step
            sure = trajectory.confidence[step, row] >= 0.6  # NaN, where nothing could be filled, is not
            if bool((trajectory.states[step, row] == LONG.mask_id).any()):
                assert int(chosen.sum()) == max(1, int(sure.sum()))
                assert bool((chosen >= sure).all())
    assert trajectory.n_steps < 11
    assert sample(LONG, LONG.masks(1), Sampler(schedule=Threshold(probability=0.0))).n_steps == 1


@pytest.mark.parametrize("of_drawn", [False, True])
def test_a_threshold_is_the_best_tokens_and_as_published_the_drawn_ones(of_drawn):
    """Exact: above temperature 0 the two differ."""
    chain = MarkovChain(n_tokens=2, length=6, coupling=2.0, seed=1)
    sampler = Sampler(schedule=Threshold(probability=0.55, of_drawn=of_drawn), order="left_to_right")
    found = sample(chain, chain.masks(40), sampler, seed=3, record=Record(alternatives=1))
    best, drawn = found.top_probabilities[0, ..., 0] >= 0.55, found.confidence[0] >= 0.55
    assert not torch.equal(best, drawn)
    expected = (drawn if of_drawn else best).clone()
    expected[:, 0] = True
    assert torch.equal(found.revealed_at == 0, expected)


def test_first_hitting_fills_one_at_random_at_the_times_of_the_reverse_process():
    """Behavioural: the first of m times is the largest of m uniforms, with mean m / (m + 1)."""
    trajectory = sample(LONG, LONG.masks(2000), Sampler(schedule=FirstHitting()), seed=1)
    assert filled(trajectory) == [1] * 11
    assert bool((trajectory.t.diff(dim=0) < 0).all())
    for step, mean in ((0, 11 / 12), (10, 1 / 12)):
        assert float(trajectory.t[step].mean()) == pytest.approx(mean, abs=4.5 * 0.08 / 2000**0.5)
    first = torch.bincount(trajectory.revealed_at.argmin(1), minlength=11).double()
    assert float(((first - 2000 / 11) ** 2 / (2000 / 11)).sum()) < 10 + 4.5 * 20**0.5


@pytest.mark.parametrize("length", [3, 4])
def test_blocks_are_filled_from_left_to_right(length):
    start = LONG.masks(2)
    start[1, :2] = 1  # blocks are counted from each sequence's first mask
    for schedule in (Fixed(), Even(steps=2), Ancestral(steps=3), Threshold(probability=0.5)):
        trajectory = sample(LONG, start, Sampler(schedule=schedule, block_length=length), seed=4)
        for row, first in ((0, 0), (1, 2)):
            revealed = trajectory.revealed_at[row, first:].tolist()
            blocks = [revealed[i : i + length] for i in range(0, len(revealed), length)]
            for before, after in itertools.pairwise(blocks):
                assert max(before) < min(after)
        assert bool((trajectory.final != LONG.mask_id).all())


def test_blocks_of_one_are_left_to_right_and_one_block_is_none():
    def final(**keywords):
        return sample(LONG, LONG.masks(3), Sampler(schedule=Fixed(), **keywords), seed=2)

    by_block, by_order = final(block_length=1), final(order="left_to_right")
    assert torch.equal(by_block.states, by_order.states)
    assert torch.equal(final(block_length=11).states, final().states)
    assert not torch.equal(final().states, by_order.states)


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf"])
def test_remdm_without_strength_is_ancestral_sampling_bit_for_bit(strategy):
    grid = Ancestral(steps=9)
    plain = sample(LONG, LONG.masks(20), Sampler(schedule=grid), seed=6)
    none = sample(
        LONG, LONG.masks(20), Sampler(schedule=ReMDM(grid=grid, strategy=strategy, eta=0.0)), seed=6
    )
    some = sample(
        LONG, LONG.masks(20), Sampler(schedule=ReMDM(grid=grid, strategy=strategy, eta=0.8)), seed=6
    )
    assert torch.equal(none.states[: plain.n_steps + 1], plain.states)
    assert torch.equal(none.final, plain.final)
    assert not torch.equal(some.states, none.states)


def test_the_loop_without_strength_only_waits():
    """Exact: with eta = 0 nothing is filled or taken back between t_on and t_off."""
    schedule = ReMDM(grid=Ancestral(steps=20), strategy="loop", eta=0.0)
    states = sample(LONG, LONG.masks(50), Sampler(schedule=schedule), seed=6).states
    inside = [step for step in range(20) if 0.05 < 1 - step / 20 <= 0.55 and 1 - (step + 1) / 20 >= 0.05]
    assert len(inside) >= 9
    for step in inside[:-1]:
        assert torch.equal(states[step], states[step + 1])


@pytest.mark.parametrize("noise", ["linear", "log_linear"])
@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.1), ("rescale", 0.5), ("loop", 0.1)])
def test_remdm_keeps_the_share_of_masks(strategy, eta, noise):
    """Behavioural: after each step the share of masks is 1 - alpha, within 4.5 standard errors."""
    schedule = ReMDM(grid=Ancestral(steps=16, noise=noise), strategy=strategy, eta=eta)
    trajectory = sample(LONG, LONG.masks(600), Sampler(schedule=schedule), seed=7)
    states, n = trajectory.states, 600 * LONG.length
    assert int(((states[:-1] != LONG.mask_id) & (states[1:] == LONG.mask_id)).sum()) > 300
    for step in range(15):
        t, s = schedule.grid.times(step)
        expected = float(1 - schedule.alphas(t, s)[1])
        share = float((states[step + 1] == LONG.mask_id).double().mean())
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / n) ** 0.5 + 1e-9
    assert bool((trajectory.final != LONG.mask_id).all())


def test_remdm_s_formulae_are_the_paper_s():
    """Exact fractions at t = 1/2, s = 3/8: sigma_max = (1 - alpha_s) / alpha_t = 3/4."""
    t, s = Fraction(1, 2), Fraction(3, 8)
    assert ReMDM(strategy="cap", eta=0.25).sigma(t, s) == Fraction(1, 4)
    assert ReMDM(strategy="cap", eta=1.0).sigma(t, s) == Fraction(3, 4)
    assert ReMDM(strategy="rescale", eta=0.5).sigma(t, s) == Fraction(3, 8)
    # Masks are filled with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
    assert reveal_chance(1 - t, 1 - s, Fraction(1, 4)) == (Fraction(5, 8) - Fraction(3, 8)) / Fraction(1, 2)
    loop = ReMDM(strategy="loop", eta=0.02, t_on=0.5, t_off=0.25, alpha_on=0.75)
    assert loop.alphas(Fraction(3, 4), Fraction(5, 8)) == (Fraction(3, 8), Fraction(9, 16))
    assert loop.alphas(Fraction(1, 2), Fraction(3, 8)) == (Fraction(3, 4), Fraction(3, 4))
    assert loop.alphas(Fraction(1, 4), Fraction(1, 8)) == (Fraction(3, 4), Fraction(7, 8))


def test_the_published_loop_overshoots_where_it_leaves_a_phase():
    """A step from the draft into the loop ends at alpha_on; as published it goes on along the draft's line."""
    t, s = Fraction(5, 8), Fraction(3, 8)
    loop = ReMDM(strategy="loop", t_on=0.5, t_off=0.25, alpha_on=0.75)
    assert loop.alphas(t, s)[1] == Fraction(3, 4)
    assert replace(loop, as_published=True).alphas(t, s)[1] == Fraction(15, 16)


def test_conf_shares_sigma_out_by_the_confidence_at_commit():
    """Bounded by one word of 4,000 evenly spread: position i is taken back with sigma_max softmax(-p)_i."""
    n, p = 4000, torch.tensor([0.1, torch.nan, 0.9, 0.5], dtype=torch.float64)
    words = (np.arange(n, dtype=np.float64) / n * 2.0**53).astype(np.uint64) << np.uint64(11)
    filled_here = torch.tensor([True, False, True, True]).expand(n, -1)
    nothing = torch.zeros(n, 4, dtype=torch.float64)
    at = Step(
        number=5,
        in_block=5,
        x=torch.zeros(n, 4, dtype=torch.int64),
        is_open=~filled_here,
        revocable=filled_here,
        measured=Measured(nothing.long(), nothing, nothing, nothing, nothing),
        score=nothing,
        committed=p.expand(n, -1),
        words=lambda stream: np.repeat(words[:, None], 4, 1),
    )
    schedule = ReMDM(grid=Ancestral(steps=8), strategy="conf", eta=1.0)
    t, s = schedule.grid.times(5)
    shares = (-p[[0, 2, 3]]).softmax(0) * float((1 - schedule.grid.alpha(s)) / schedule.grid.alpha(t))
    found = schedule.take_back(at, Float64Draws()).double().mean(0)
    assert found[1] == 0
    assert found[[0, 2, 3]].tolist() == pytest.approx(shares.tolist(), abs=2 / n)


@pytest.mark.parametrize("schedule", [Even(steps=8), Ancestral(steps=8)])
@pytest.mark.parametrize("by", ["low_confidence", "random"])
def test_taking_back_removes_the_least_sure_and_ends_without_masks(schedule, by):
    sampler = Sampler(schedule=schedule, take_back=TakeBack(by=by, per_step=2))
    start = LONG.masks(5)
    start[:, 4] = 2
    trajectory = sample(LONG, start, sampler, seed=3)
    committed = torch.full(trajectory.final.shape, torch.nan, dtype=torch.float64)
    for step in range(trajectory.n_steps):
        before, after = trajectory.states[step], trajectory.states[step + 1]
        back = (before != LONG.mask_id) & (after == LONG.mask_id)
        had = (before != LONG.mask_id).sum(1) - 1  # the given token is never taken
        assert torch.equal(back.sum(1), torch.zeros_like(had) if step == 7 else had.clamp(max=2))
        if by == "low_confidence":
            for row in range(5):
                stayed = committed[row][(before[row] != LONG.mask_id) & ~back[row]].nan_to_num(nan=9.0)
                assert not back[row].any() or committed[row][back[row]].max() <= stayed.min()
        new = (before == LONG.mask_id) & (after != LONG.mask_id)
        committed = torch.where(new, trajectory.confidence[step], committed).masked_fill(back, torch.nan)
    assert bool((trajectory.final != LONG.mask_id).all())
    assert trajectory.final[:, 4].tolist() == [2] * 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ancestral(steps=0), "steps must be at least 1, got 0"),
        (lambda: Ancestral(end=1.0), r"end must be a time in \[0, 1\), got 1.0"),
        (lambda: Fixed(per_step=0), "per_step must be at least 1, got 0"),
        (lambda: Threshold(probability=1.5), r"threshold must be a probability in \[0, 1\], got 1.5"),
        (lambda: ReMDM(eta=2.0), r"eta must be in \[0, 1\], got 2.0"),
        (lambda: ReMDM(t_on=0.1, t_off=0.2), "the loop needs 0 < t_off < t_on < 1, got 0.2 and 0.1"),
        (lambda: ReMDM(grid=Ancestral(joint=True)), "leave joint off"),
        (lambda: TakeBack(per_step=0), "per_step must be at least 1, got 0; leave remasking off"),
        (lambda: Rewrite(steps=0), "steps must be at least 1, got 0"),
        (
            lambda: Rewrite(version="most_confident", threshold=0.5),
            "most_confident rewrites whatever the confidence, got the threshold 0.5; leave it out",
        ),
        (lambda: Ancestral(noise="lin"), "noise: 'lin' is not a choice; did you mean 'linear'"),  # type: ignore[arg-type]
        (lambda: Ancestral(finish="greedy"), "finish: 'greedy' is not a choice; known: 'draw', 'argmax'"),  # type: ignore[arg-type]
        (lambda: Ancestral(steps=2.5), "steps must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: Even(rounding="floor"), "rounding: 'floor' is not a choice; known: 'up', 'down'"),  # type: ignore[arg-type]
        (lambda: Fixed(per_step=2.0), "per_step must be a whole number, got 2.0"),  # type: ignore[arg-type]
        (lambda: ReMDM(strategy="capp"), "strategy: 'capp' is not a choice; did you mean 'cap'"),  # type: ignore[arg-type]
        (lambda: TakeBack(by="worst"), "by: 'worst' is not a choice; known: 'low_confidence'"),  # type: ignore[arg-type]
        (lambda: Rewrite(version="most"), "version: 'most' is not a choice"),  # type: ignore[arg-type]
        (lambda: Sampler(sigma="t"), "sigma: 't' is not a choice; known: 'share', 'time'"),  # type: ignore[arg-type]
        (
            lambda: Sampler(schedule=Fixed(), order="confidenc"),  # type: ignore[arg-type]
            "order: 'confidenc' is not a choice; did you mean 'confidence'",
        ),
        (lambda: Sampler(schedule=Fixed(), order=[1, 0]), r"got a list; take tuple\(\[1, 0\]\)"),  # type: ignore[arg-type]
        (lambda: Record(alternatives=-1), "alternatives must be at least 0, got -1"),
        (lambda: Draw(top_k=2.5), "top_k must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: Sampler(order="random"), "Ancestral chooses positions by itself, got the order 'random'"),
        (
            lambda: Sampler(schedule=Fixed(), take_back=TakeBack()),
            "taking back needs a schedule with a number",
        ),
        (lambda: Sampler(block_length=0), "block_length must be at least 1, or none; got 0"),
        (lambda: Sampler(schedule=Rewrite(), block_length=2), "rewriting has no masks to count blocks by"),
        (lambda: Sampler(guidance=-1.0), "guidance must be at least 0 and finite, got -1.0"),
        (lambda: Draw(top_k=0), "top_k must be at least 1, or none for all tokens; got 0"),
        (lambda: Draw(top_p=0.0), r"top_p must be in \(0, 1\], or none for all tokens; got 0.0"),
        (lambda: Draw(suppress=(3, -1)), "suppressed token ids must be at least 0, got -1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(unchecked, build, message):
    with pytest.raises(ConfigError, match=message):
        build()
