"""Schedules: pure functions of the step, with the shapes that their names promise."""

import math

import pytest

from transcoder.config import TrainConfig
from transcoder.schedules import active_features, learning_rate, sparsity_weight


def test_a_run_shorter_than_the_usual_warm_up_reaches_its_rate():
    short, long = TrainConfig(steps=10, decay="none", lr=1.0), TrainConfig(steps=100, decay="none", lr=1.0)
    assert [learning_rate(short, step) for step in (0, 9)] == [0.1, 1.0]
    assert [learning_rate(long, step) for step in (0, 49, 99)] == [0.02, 1.0, 1.0]


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    config = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - step / 20 for step in range(20)])


def test_the_learning_rate_may_fall_as_a_cosine_or_not_at_all():
    cosine = TrainConfig(steps=100, lr=2.0, warmup_steps=0, decay="cosine", decay_fraction=1.0)
    expected = [1 + math.cos(math.pi * step / 100) for step in range(100)]
    assert [learning_rate(cosine, step) for step in range(100)] == pytest.approx(expected)
    constant = TrainConfig(steps=100, lr=2.0, warmup_steps=0, decay="none")
    assert {learning_rate(constant, step) for step in range(100)} == {2.0}


def test_the_sparsity_weight_grows_from_zero_and_stays():
    config = TrainConfig(steps=40, sparsity="tanh", sparsity_coefficient=0.5, sparsity_warmup=0.5)
    weights = [sparsity_weight(config, step) for step in range(40)]
    assert weights == pytest.approx([0.5 * min(1, step / 20) for step in range(40)])
    cosine = TrainConfig(steps=40, sparsity="l1", sparsity_coefficient=0.5, sparsity_ramp="cosine")
    expected = [0.25 * (1 - math.cos(math.pi * step / 40)) for step in range(40)]
    assert [sparsity_weight(cosine, step) for step in range(40)] == pytest.approx(expected)
    at_once = TrainConfig(sparsity="l1", sparsity_coefficient=0.5, sparsity_warmup=0.0)
    assert sparsity_weight(at_once, 0) == 0.5
    assert sparsity_weight(TrainConfig(sparsity_coefficient=0.5), 999) == 0.0


def test_k_falls_in_equal_ratios_to_where_it_stays():
    config = TrainConfig(steps=100, k_start=256, k_anneal=0.4)
    found = [active_features(config, 4, step) for step in range(100)]
    assert found[:41:10] == [256, 91, 32, 11, 4]
    assert set(found[40:]) == {4}
    assert found == sorted(found, reverse=True)
    assert active_features(TrainConfig(), 4, 0) == 4
