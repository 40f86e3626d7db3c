"""States are run as the sampler ran them, and commits are what wrote a final token over a mask."""

from dataclasses import replace

import pytest
import torch

from mdlm_interp.analysis import filled, logit_lens, prediction_stability, replay, sigma_at
from mdlm_interp.decoding import Ancestral, FirstHitting, ReMDM, Rewrite, Sampler, sample
from mdlm_interp.decoding.settings import Schedule
from mdlm_interp.errors import DataError

SCHEDULES: dict[str, Schedule] = {
    "FirstHitting": FirstHitting(),
    "Ancestral": Ancestral(steps=5),
    "ReMDM": ReMDM(grid=Ancestral(steps=10), eta=0.9),
}


@pytest.mark.parametrize("name", ["trajectory", "timed", "revised"])
def test_sigma_is_what_the_sampler_told_the_model(exact, start, name, request):
    expected = request.getfixturevalue(name)
    seen = []

    def model(ids, sigma):
        seen.append((ids.clone(), sigma.clone()))
        return exact(ids, sigma)

    schedule = SCHEDULES[expected.sampler["schedule"]["kind"]]
    sampler = Sampler(schedule=schedule, sigma=expected.sampler["sigma"], cache=False)
    rebuilt = sample(model, start, sampler, seed=expected.seed, mask_id=exact.config.mask_id)
    assert torch.equal(rebuilt.states, expected.states)
    assert len(seen) == expected.n_steps
    for step, (ids, sigma) in enumerate(seen):
        assert torch.equal(ids, expected.states[step])
        assert torch.equal(sigma, sigma_at(expected, step))


@pytest.mark.parametrize("name", ["trajectory", "timed", "revised"])
def test_the_probability_at_the_commit_is_what_the_sampler_recorded(exact, name, request):
    trajectory = request.getfixturevalue(name)
    lens = logit_lens(exact, trajectory)
    rows, positions = filled(trajectory).nonzero().T
    commits = trajectory.revealed_at[rows, positions]
    found = lens.probability[commits, -1, rows, positions]
    # The sampler ran both sequences together, as the lens does: the same kernels on the same shapes.
    torch.testing.assert_close(found, trajectory.commit_confidence[rows, positions], rtol=1e-12, atol=0)


def test_the_final_state_is_told_the_sigma_of_a_text_without_masks(exact, trajectory, timed):
    for one in (trajectory, timed):
        assert sigma_at(one, one.n_steps).tolist() == [0.0, 0.0]
        (last,) = replay(exact, one, steps=[one.n_steps], rows=[1])
        assert torch.equal(last.x, one.final[1:])
        assert not bool(last.is_masked.any())
        assert not last.cache


def test_only_a_token_written_over_a_mask_has_a_commit(exact, trajectory, start):
    assert torch.equal(filled(trajectory), start == exact.config.mask_id)
    rewritten = sample(exact, start, Sampler(schedule=Rewrite(steps=6)), seed=1)
    assert bool((rewritten.revealed_at >= 0).any())
    assert not bool(filled(rewritten).any())
    with pytest.raises(DataError, match=r"no mask of rows \[0, 1\] was filled"):
        prediction_stability(exact, rewritten)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [0, 99]}, r"steps must be in \[0, \d+\), got 99"),
        ({"steps": [-1]}, r"steps must be in \[0, \d+\), got -1"),
        ({"rows": [2]}, r"rows must be in \[0, 2\), got 2"),
        ({"positions": [9]}, r"positions must be in \[0, 9\), got 9"),
        ({"positions": [1, 1]}, r"positions must be one or more different numbers, got \[1, 1\]"),
        ({"rows": []}, r"rows must be one or more different numbers, got \[\]"),
    ],
)
def test_what_is_out_of_range_is_named(exact, trajectory, settings, message):
    with pytest.raises(DataError, match=message):
        logit_lens(exact, trajectory, **settings)


def test_another_models_trajectory_is_refused(exact, trajectory, make_model, small_config):
    with pytest.raises(DataError, match=r"the trajectory's mask is token 3, the model's 40"):
        logit_lens(exact, replace(trajectory, mask_id=3))
    dropping = make_model(replace(small_config, dropout=0.1)).double().train()
    with pytest.raises(DataError, match=r"call model.eval\(\) first"):
        logit_lens(dropping, trajectory)
    nothing = sample(exact, torch.full((1, 3), 5), seed=0)
    with pytest.raises(DataError, match="has at least 1 step, got 0"):
        logit_lens(exact, nothing)
