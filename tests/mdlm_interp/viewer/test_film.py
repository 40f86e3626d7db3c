"""Frames: what each position is after each step."""

from __future__ import annotations

import pytest

from mdlm_interp.decoding import Ancestral, Even, ReMDM, Rewrite, Sampler, Seen, sample, start_tokens
from mdlm_interp.errors import DataError
from mdlm_interp.viewer import Film, State
from tests.mdlm_interp.viewer.vocabulary import STORY, written

LETTERS = {"given": "g", "mask": ".", "new": "n", "settled": "s", "back": "b"}


def test_each_position_is_what_the_step_made_of_it():
    film = Film.of(written(STORY))
    found = ["".join(LETTERS[state] for state in film.frame(n).states) for n in range(5)]
    assert found == ["gg....", "ggn...", "ggsn.n", "ggbsns", "ggnssn"]
    assert [film.frame(n).tokens for n in range(5)] == [tuple(state) for state in STORY]
    assert [film.frame(n).t for n in range(5)] == [None, 1.0, 0.75, 0.5, 0.25]
    assert (film.last, film.batch, film.n_steps) == (4, 1, 4)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(schedule=Even(steps=4), order="entropy"),
        Sampler(schedule=Even(steps=2), block_length=3),
        Sampler(schedule=ReMDM(grid=Ancestral(steps=8), strategy="cap", eta=1.0)),
        Sampler(schedule=Rewrite(version="least_confident", steps=4, per_step=2, threshold=0.9)),
    ],
    ids=["even", "blocks", "remdm", "rewrite"],
)
def test_a_run_under_way_shows_what_its_trajectory_shows(model, sampler):
    """Exact: every frame of every sequence, given positions in the middle included."""
    start = start_tokens(model, 9, [3, 4], n=2)
    start[1, 6] = 5
    live = Film(model.config.mask_id)
    trajectory = sample(model, start, sampler, seed=2, watch=live.add)
    later = Film.of(trajectory)
    assert live.last == later.last == trajectory.n_steps > 1
    for row in range(2):
        for number in range(live.last + 1):
            ours, theirs = live.frame(number, row), later.frame(number, row)
            assert (ours.tokens, ours.states, ours.t) == (theirs.tokens, theirs.states, theirs.t)
    assert [n for n, state in enumerate(live.frame(live.last, 1).states) if state == "given"] == [0, 1, 6]
    if sampler.schedule.n_steps is not None:
        assert (live.n_steps or 0) >= trajectory.n_steps


def test_a_run_that_revises_is_seen_to(model):
    sampler = Sampler(schedule=ReMDM(grid=Ancestral(steps=8), strategy="cap", eta=1.0))
    film = Film.of(sample(model, start_tokens(model, 12), sampler, seed=0))
    assert any(film.frame(number).count(State.TAKEN_BACK) for number in range(film.last + 1))


def test_steps_come_in_order(model):
    seen: list[Seen] = []
    sample(model, start_tokens(model, 4), Sampler(schedule=Even(steps=3)), watch=seen.append)
    film = Film(model.config.mask_id)
    film.add(seen[0])
    with pytest.raises(DataError, match="told of its steps in order: expected 1, got 2"):
        film.add(seen[2])
