"""Steps of the reverse process against upstream's tables, and the sampler against its own."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mdlm_interp.decoding import Ancestral, Draw, Even, Sampler, sample
from mdlm_interp.decoding.posteriors import analytic_posterior, ancestral_posterior

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "subs_schedule.safetensors")
MASK_ID = {"last": 30, "inner": 4}
CASES = pytest.mark.parametrize("case", list(MASK_ID))
STEPS = pytest.mark.parametrize("step", ["rev_first", "rev_mid", "rev_last"])
NOISES = pytest.mark.parametrize("noise", ["linear", "log_linear"])


def golden(case: str, name: str) -> Tensor:
    return GOLDEN[f"{case}.{name}"]


def times(case: str, step: str) -> tuple[float, float]:
    t, dt = golden(case, f"{step}.t_dt").tolist()
    return t, t - dt


@CASES
@STEPS
@NOISES
def test_the_ancestral_posterior_is_upstreams(case, step, noise):
    """Bounded at 1e-12; the log-linear noise's eps cancels."""
    found = ancestral_posterior(
        golden(case, "probs"),
        golden(case, "xt"),
        Ancestral(noise=noise),
        *times(case, step),
        MASK_ID[case],
    )
    assert float((found - golden(case, f"{step}.posterior")).abs().max()) < 1e-12


@CASES
@STEPS
def test_the_analytic_posterior_is_upstreams_and_equals_the_ancestral_one(case, step):
    """Bounded at 1e-11: scores up to 1e5 are multiplied with chances down to 1e-5."""
    t, s = times(case, step)
    found = analytic_posterior(golden(case, "probs"), golden(case, "xt"), t, s, MASK_ID[case])
    assert float((found - golden(case, f"{step}.analytic_probs")).abs().max()) < 1e-11
    assert float((found - golden(case, f"{step}.posterior")).abs().max()) < 1e-11
    other = analytic_posterior(golden(case, "probs"), golden(case, "xt"), t, 0.9 * s, MASK_ID[case])
    assert float((other - golden(case, f"{step}.analytic_probs")).abs().max()) > 1e-6 or step == "rev_last"


@CASES
def test_noise_removal_is_the_samplers_last_step_by_argmax(case):
    """Exact: what upstream's argmax at t = 1e-5 leaves, by the grid's last step and by one step at temperature 0."""
    logits, x_t, mask_id = golden(case, "logits"), golden(case, "xt"), MASK_ID[case]
    nearly_all = Ancestral(steps=1, end=0.999999999, finish="argmax")
    for sampler in (
        Sampler(schedule=Even(steps=1), draw=Draw(temperature=0.0)),
        Sampler(schedule=nearly_all),
    ):
        found = sample(lambda x, sigma: logits, x_t, sampler, mask_id=mask_id)
        assert torch.equal(found.final, golden(case, "noise_removal_argmax"))
    drawn = sample(lambda x, sigma: logits, x_t, Sampler(schedule=Ancestral(steps=1)), mask_id=mask_id).final
    assert not torch.equal(drawn, golden(case, "noise_removal_argmax"))


@pytest.mark.parametrize("joint", [False, True], ids=["ancestral", "analytic"])
def test_a_step_of_the_sampler_follows_its_table(chain, joint):
    """Behavioural: chi-square of 8,000 first steps at one position, staying masked included."""
    n = 8000
    grid = Ancestral(steps=3, joint=joint, noise="log_linear", end=1e-5 if joint else 0.0)
    state = sample(chain, chain.masks(n), Sampler(schedule=grid), seed=8).states[1]
    probabilities = chain(chain.masks(1), torch.zeros(1)).exp()
    probabilities[..., chain.mask_id] = 0
    table = ancestral_posterior(probabilities, chain.masks(1), grid, *grid.times(0), chain.mask_id)
    for position in range(chain.length):
        law = table[0, position]
        counts = torch.bincount(state[:, position], minlength=len(law)).double()
        statistic = float(((counts - n * law) ** 2 / (n * law)).sum())
        assert statistic < 3 + 4.5 * 6**0.5
    # The control: the table of another step.
    other = ancestral_posterior(probabilities, chain.masks(1), grid, *grid.times(1), chain.mask_id)[0, 0]
    counts = torch.bincount(state[:, 0], minlength=len(other)).double()
    assert float(((counts - n * other) ** 2 / (n * other)).sum()) > 100


@NOISES
def test_the_chance_of_filling_is_the_step_over_the_time(noise):
    """Exact fractions: (t - s) / t."""
    grid = Ancestral(steps=7, noise=noise)
    for step in range(7):
        t, s = grid.times(step)
        assert grid.chance(t, s) == (t - s) / t == Fraction(1, 7 - step)
