"""FlowLM's corruption: how often it flips a token, and the level that flips as often as asked."""

from __future__ import annotations

import math

import pytest
import torch

from mdlm_interp.errors import DataError
from mdlm_interp.training.flowlm_noise import (
    TEMPERATURE_FLOOR,
    flip_probability,
    gaussian_noise,
    keep_probability,
    level_for_flip,
    shares,
    soft_tokens,
    temperature_at,
    view_scale,
)

MIXINGS = ("variance_preserving", "linear")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_tokens_have_a_closed_form():
    """Bounded: P(a + s z0 > s z1) = Phi(a / (s sqrt 2)), to 1e-13."""
    ratio = torch.linspace(0, 6, 25, dtype=torch.float64)
    expected = torch.special.ndtr(ratio / math.sqrt(2))
    assert float((keep_probability(ratio, 2) - expected).abs().max()) < 1e-13


@pytest.mark.parametrize("vocab_size", [2, 3, 50, 50_368])
def test_pure_noise_keeps_one_token_in_the_vocabulary(vocab_size):
    assert float(keep_probability(tensor(0.0), vocab_size)) == pytest.approx(1 / vocab_size, rel=1e-9)


@pytest.mark.parametrize("vocab_size", [3, 4, 1000, 50_368])
def test_the_quadrature_has_converged(vocab_size, monkeypatch):
    """Bounded: eight times the nodes and a wider range move no probability by 1e-12."""
    ratio = torch.linspace(0, 9, 19, dtype=torch.float64)
    usual = keep_probability(ratio, vocab_size)
    monkeypatch.setattr("mdlm_interp.training.flowlm_noise.NODES", 9601)
    monkeypatch.setattr("mdlm_interp.training.flowlm_noise.HALF_WIDTH", 12.0)
    assert float((keep_probability(ratio, vocab_size) - usual).abs().max()) < 1e-12


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("vocab_size", "n"), [(4, 200_000), (300, 20_000)])
def test_the_flip_probability_is_that_of_drawn_noise(mixing, vocab_size, n):
    """Behavioural: within 4.5 standard deviations of a Monte Carlo estimate that mixes as the recipe does."""
    for t in (0.06, 0.2, 0.5):
        noise = gaussian_noise(0, "test", int(1000 * t), 1, n, vocab_size)
        ids = torch.zeros(1, n, dtype=torch.int64)
        soft = soft_tokens(ids, noise, tensor(t), mixing, TEMPERATURE_FLOOR)
        found = float((soft.argmax(-1) != 0).double().mean())
        chance = float(flip_probability(tensor(t), vocab_size, mixing))
        assert abs(found - chance) < 4.5 * math.sqrt(chance * (1 - chance) / n) + 1e-9


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("vocab_size", [2, 31, 50_368])
def test_the_level_for_a_flip_probability_has_it(mixing, vocab_size):
    """Bounded: 1e-10."""
    flip = torch.linspace(0.001, 0.49, 40, dtype=torch.float64)
    flip = flip if vocab_size == 2 else 1.9 * flip
    level = level_for_flip(flip, vocab_size, mixing)
    assert float((flip_probability(level, vocab_size, mixing) - flip).abs().max()) < 1e-10
    assert bool((level.diff() > 0).all())


@pytest.mark.parametrize("flip", [0.0, 0.75, 0.9, 1.0])
def test_a_flip_probability_above_chance_is_refused(flip):
    with pytest.raises(DataError, match=r"between 0 and 1 - 1/4 = 0.75, got"):
        level_for_flip(tensor(0.5, flip), 4, "linear")


def test_the_published_levels_flip_what_the_reference_says():
    """Bounded: the figures of the reference, half a percent."""
    at = tensor(0.03, 0.06, 0.15)
    large, small = (flip_probability(at, v, "variance_preserving").tolist() for v in (50_000, 4))
    assert large == pytest.approx([0.59, 0.92, 0.994], abs=0.005)
    assert small == pytest.approx([0.007, 0.06, 0.27], abs=0.005)
    blog = flip_probability(tensor(0.15, 0.2, 0.25), 50_000, "linear").tolist()
    assert blog == pytest.approx([0.08, 0.59, 0.88], abs=0.005)


def test_variance_preserving_shares_have_squares_that_add_up_to_one():
    a, s = shares(tensor(0.0, 0.1, 0.7, 1.0), "variance_preserving")
    assert torch.allclose(a**2 + s**2, torch.ones(4, dtype=torch.float64))
    a, s = shares(tensor(0.25), "linear")
    assert (float(a), float(s)) == (0.75, 0.25)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_soft_tokens_are_the_softmax_of_the_mixture_written_out(mixing):
    """Bounded: float32 against float64, 1e-6."""
    ids, t, vocab_size = torch.tensor([[3, 0], [1, 4]]), tensor(0.1, 0.4), 5
    noise = gaussian_noise(1, "x", 0, 2, 2, vocab_size)
    found = soft_tokens(ids, noise, t, mixing, 0.3)
    for row in range(2):
        a = 1 - float(t[row])
        s = math.sqrt(1 - a**2) if mixing == "variance_preserving" else float(t[row])
        hot = torch.nn.functional.one_hot(ids[row], vocab_size).double()
        expected = ((a * hot + s * noise[row].double()) / 0.3).softmax(-1)
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-6)


def test_at_the_floor_of_the_temperature_soft_tokens_are_one_hot():
    noise = gaussian_noise(1, "x", 0, 1, 50, 20)
    soft = soft_tokens(torch.zeros(1, 50, dtype=torch.int64), noise, tensor(0.1), "linear", TEMPERATURE_FLOOR)
    assert bool(((soft == 0) | (soft == 1)).all())
    assert bool((soft.sum(-1) == 1).all())


def test_the_temperature_falls_in_a_line_to_its_floor_or_stays():
    assert temperature_at(0, 1e-3, 500_000) == 1e-3 + 1e-8
    assert temperature_at(250_000, 1e-3, 500_000) == pytest.approx(5e-4 + 1e-8)
    assert temperature_at(500_000, 1e-3, 500_000) == temperature_at(900_000, 1e-3, 500_000) == 1e-8
    assert temperature_at(900_000, 1.0, None) == 1.0


def test_noise_is_a_function_of_seed_stream_and_index():
    one = gaussian_noise(0, "a", 5, 2, 3)
    assert torch.equal(one, gaussian_noise(0, "a", 5, 2, 3))
    for other in (
        gaussian_noise(1, "a", 5, 2, 3),
        gaussian_noise(0, "b", 5, 2, 3),
        gaussian_noise(0, "a", 6, 2, 3),
    ):
        assert not torch.equal(one, other)


def test_noise_does_not_touch_the_global_generator():
    before = torch.random.get_rng_state()
    gaussian_noise(0, "a", 0, 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_view_scale_tends_to_one_with_the_noise_and_not_without_it():
    """The published remark has it backwards; figures of the reference at V = 50,368."""
    found = view_scale(tensor(0.03, 0.15, 0.9, 1.0), 50_368).tolist()
    assert found == pytest.approx([6.14e-7, 3.50e-6, 1.787e-4, 1.0], rel=2e-3)
