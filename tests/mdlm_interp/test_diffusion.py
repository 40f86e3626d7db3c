"""Schedule, SUBS and losses against upstream's own values; corruption and times as pure functions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mdlm_interp.diffusion import (
    MIN_TIME,
    LogLinearSchedule,
    corrupt,
    masked_cross_entropy,
    nelbo_per_token,
    nelbo_per_token_discrete,
    sequence_times,
    stratified_times,
    subs_log_probs,
)
from mdlm_interp.errors import DataError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "subs_schedule.safetensors")
MASK_ID = {"last": 30, "inner": 4}
"""The mask token's id in each case: the last one, and one in the middle of the vocabulary."""

CASES = pytest.mark.parametrize("case", list(MASK_ID))


def golden(case: str, name: str) -> Tensor:
    return GOLDEN[f"{case}.{name}"]


def assert_bounded(found: Tensor, expected: Tensor, bound: float, relative: float = 0.0) -> None:
    """Every element within bound + relative * |expected|; equal infinities are equal."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach(), expected.detach()
    error = torch.where(found == expected, 0.0, (found - expected).abs() - relative * expected.abs())
    worst = int(error.argmax())
    assert float(error.max()) <= bound, (worst, found.flatten()[worst], expected.flatten()[worst])


@pytest.mark.parametrize("name", ["sigma", "dsigma", "move_chance", "alpha"])
def test_the_schedule_is_upstreams(name):
    """Bounded at 1e-12 in float64: a different order of the same few operations; dsigma reaches 1000."""
    found = getattr(LogLinearSchedule(), name)(GOLDEN["sched.t"])
    assert_bounded(found, GOLDEN[f"sched.{name}"], 1e-12, relative=1e-12)


def test_the_loss_weight_is_one_over_t():
    """Bounded at 1e-12 relative, and infinite at t = 0 as upstream's dsigma / expm1(sigma) is."""
    assert_bounded(
        LogLinearSchedule().loss_weight(GOLDEN["sched.t"]), GOLDEN["sched.loss_weight"], 0.0, 1e-12
    )


@pytest.mark.parametrize("name", ["sigma", "dsigma"])
def test_the_schedule_in_float32_is_upstreams(name):
    """Bounded at 1e-6 relative: the same operations, so only another machine's log1p may differ."""
    found = getattr(LogLinearSchedule(), name)(GOLDEN["sched.t"].float())
    assert_bounded(found, GOLDEN[f"sched.{name}_fp32"], 0.0, 1e-6)


def test_the_schedules_parts_agree_with_each_other():
    """Bounded by rounding: alpha = exp(-sigma), and dsigma is sigma's derivative."""
    schedule = LogLinearSchedule()
    t = torch.linspace(0, 1, 101, dtype=torch.float64).requires_grad_()
    sigma = schedule.sigma(t)
    assert_bounded(schedule.alpha(t), torch.exp(-sigma), 1e-14)
    assert_bounded(schedule.move_chance(t), 1 - schedule.alpha(t), 1e-15)
    assert_bounded(torch.autograd.grad(sigma.sum(), t)[0], schedule.dsigma(t), 0.0, 1e-12)


@pytest.mark.parametrize("n", [4, 8])
def test_stratified_times_are_upstreams(n):
    found = stratified_times(GOLDEN[f"tsample.{n}.u"])
    assert_bounded(found, GOLDEN[f"tsample.{n}.t_low_discrepancy"], 1e-12)


@CASES
def test_the_golden_corruption_is_masking_below_the_move_chance(case):
    """Exact: what upstream masked, given its uniforms."""
    chance = LogLinearSchedule().move_chance(golden(case, "t"))[:, None]
    masked = torch.where(golden(case, "u_move") < chance, MASK_ID[case], golden(case, "x0"))
    assert torch.equal(masked, golden(case, "xt"))


@CASES
def test_subs_probabilities_are_upstreams_and_the_logits_stay_as_they_were(case):
    """Bounded at 1e-12, impossible tokens exactly zero; exact for the untouched logits."""
    logits = golden(case, "logits")
    before = logits.clone()
    log_probs = subs_log_probs(logits, golden(case, "xt"), MASK_ID[case])
    assert torch.equal(logits, before)
    probs = log_probs.exp()
    assert_bounded(probs, golden(case, "probs"), 1e-12)
    possible = golden(case, "log_probs") > -1e5
    assert torch.equal(possible, probs > 0)
    assert_bounded(log_probs[possible], golden(case, "log_probs")[possible], 1e-12, relative=1e-12)


@CASES
def test_subs_never_predicts_the_mask_and_keeps_what_is_shown(case):
    """Exact, and the rest sums to one within rounding."""
    x_t, mask_id = golden(case, "xt"), MASK_ID[case]
    probs = subs_log_probs(golden(case, "logits"), x_t, mask_id).exp()
    assert not probs[x_t == mask_id][:, mask_id].any()
    shown = x_t != mask_id
    assert torch.equal(probs[shown], torch.nn.functional.one_hot(x_t[shown], probs.shape[-1]).double())
    assert_bounded(probs.sum(-1), torch.ones_like(probs[..., 0]), 1e-14)


@CASES
def test_the_continuous_bound_is_upstreams_per_token_and_in_sum_and_mean(case):
    """Bounded at 1e-12 relative; the mean is over all positions, not only the masked ones."""
    logits = golden(case, "logits")
    before = logits.clone()
    losses = nelbo_per_token(logits, golden(case, "x0"), golden(case, "xt"), golden(case, "t"), MASK_ID[case])
    assert torch.equal(logits, before)
    assert_bounded(losses, golden(case, "loss_per_token"), 1e-12, relative=1e-12)
    kept = losses * golden(case, "attention_mask")
    assert_bounded(kept.sum()[None], golden(case, "loss_masked_sum"), 0.0, 1e-12)
    mean = kept.sum() / golden(case, "attention_mask").sum()
    assert_bounded(mean[None], golden(case, "loss_mean"), 0.0, 1e-12)


@CASES
def test_the_thousand_step_bound_is_upstreams(case):
    """Relative 1e-5: upstream's t / T is a float32 there."""
    losses = nelbo_per_token_discrete(
        golden(case, "logits"), golden(case, "x0"), golden(case, "xt"), golden(case, "t"), MASK_ID[case], 1000
    )
    assert_bounded(losses, golden(case, "loss_per_token_T1000"), 0.0, 1e-5)


@CASES
def test_cross_entropy_is_zero_where_unmasked_and_has_a_gradient_where_masked(case):
    logits = golden(case, "logits").clone().requires_grad_()
    is_masked = golden(case, "xt") == MASK_ID[case]
    losses = masked_cross_entropy(logits, golden(case, "x0"), is_masked, MASK_ID[case])
    assert not losses[~is_masked].any()
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(gradient.abs().sum(-1) > 0, is_masked)
    assert not gradient[..., MASK_ID[case]].any()


def test_a_batch_with_nothing_masked_costs_nothing():
    x = torch.arange(6).reshape(2, 3)
    assert not nelbo_per_token(torch.randn(2, 3, 9), x, x, torch.tensor([0.1, 0.2]), 8).any()


LENGTH, MASK = 16, 50
TEXT = torch.arange(100 * LENGTH).reshape(100, LENGTH) % MASK
"""A hundred numbered sequences."""

CHANCE = LogLinearSchedule().move_chance(sequence_times(7, range(100)))


def corrupted(indices: list[int], seed: int = 3) -> Tensor:
    return corrupt(TEXT[indices], CHANCE[indices], MASK, seed=seed, indices=indices)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12))
def test_a_sequence_is_masked_alike_in_any_batch(indices):
    """Exact: whatever the batch's size, order or other members, repeats included."""
    together = corrupted(indices)
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, corrupted([index])[0])


def test_corruption_only_puts_masks_and_leaves_its_input():
    before = TEXT.clone()
    masked = corrupted(list(range(100)))
    assert torch.equal(TEXT, before)
    assert torch.equal(masked[masked != MASK], TEXT[masked != MASK])
    assert masked.dtype == torch.int64


def test_seeds_streams_and_sequences_draw_different_masks():
    base = corrupted([5])
    assert not torch.equal(base, corrupted([5], seed=4))
    renamed = corrupt(TEXT[[5]], CHANCE[[5]], MASK, seed=3, indices=[5], stream="other")
    renumbered = corrupt(TEXT[[5]], CHANCE[[5]], MASK, seed=3, indices=[6])
    assert not torch.equal(base, renamed)
    assert not torch.equal(base, renumbered)


@pytest.mark.parametrize("chance", [0.05, 0.5, 0.95])
def test_the_share_of_masks_is_the_move_chance(chance):
    """Bounded: within four standard deviations of a binomial over 200 x 500 tokens, at a fixed seed."""
    n, length = 200, 500
    x_0 = torch.zeros(n, length, dtype=torch.int64)
    masked = corrupt(x_0, torch.full((n,), chance), 1, seed=0, indices=range(n)) == 1
    assert abs(masked.double().mean() - chance) <= 4 * math.sqrt(chance * (1 - chance) / (n * length))
    # Positions are independent: the number of masks in a sequence has a binomial's variance.
    assert masked.sum(1).double().var() == pytest.approx(length * chance * (1 - chance), rel=0.35)


def test_chances_zero_and_one_mask_nothing_and_everything():
    x_0 = TEXT[:2]
    assert torch.equal(corrupt(x_0, torch.zeros(2), MASK, seed=0, indices=[0, 1]), x_0)
    assert (corrupt(x_0, torch.ones(2), MASK, seed=0, indices=[0, 1]) == MASK).all()


def test_one_index_a_sequence_is_required():
    with pytest.raises(DataError, match="corrupt needs one index a sequence: got 3 for a batch of 2"):
        corrupt(TEXT[:2], CHANCE[:2], MASK, seed=0, indices=[0, 1, 2])


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_a_sequences_time_is_in_range_and_its_own(seed, indices):
    """Exact: the same number whatever else is asked for with it."""
    times = sequence_times(seed, indices)
    assert times.dtype == torch.float64
    assert bool(((times >= MIN_TIME) & (times <= 1)).all())
    assert times.tolist() == [sequence_times(seed, [index]).item() for index in indices]


def discrepancy(times: Tensor) -> float:
    """Star discrepancy of points in [0, 1): the largest error of their empirical distribution."""
    points = ((times - MIN_TIME) / (1 - MIN_TIME)).sort().values
    steps = torch.arange(len(points) + 1, dtype=torch.float64) / len(points)
    return float(torch.maximum((steps[1:] - points).abs(), (points - steps[:-1]).abs()).max())


@pytest.mark.parametrize(("start", "n"), list(itertools.product([0, 10_000_019, 2**61], [8, 64, 512])))
def test_any_run_of_consecutive_times_is_spread_more_evenly_than_independent_draws(start, n):
    """Behavioural, against the median of 99 independent samples of that size."""
    independent = [
        discrepancy(MIN_TIME + (1 - MIN_TIME) * torch.rand(n, dtype=torch.float64)) for _ in range(99)
    ]
    ours = discrepancy(sequence_times(11, range(start, start + n)))
    assert ours < sorted(independent)[49]
    assert (
        ours <= 3.5 * math.log(n) / n
    )  # a low-discrepancy sequence's rate; independent draws have 1 / sqrt(n)


def test_seeds_shift_the_times():
    assert not torch.equal(sequence_times(0, range(8)), sequence_times(1, range(8)))
    assert not torch.equal(sequence_times(0, range(8)), sequence_times(0, range(8), stream="other"))
