"""What the page of a trajectory carries."""

from __future__ import annotations

import json
import re

import pytest

from mdlm_interp.decoding import Even, Record, Sampler, sample, start_tokens
from mdlm_interp.errors import DataError
from mdlm_interp.viewer import trajectory_page
from tests.mdlm_interp.viewer.vocabulary import (
    COMMA,
    DAY,
    HALF,
    MASK,
    ONE,
    OTHER_HALF,
    STORY,
    TIM,
    WORDS,
    Vocabulary,
    written,
)


def data_of(page: str) -> dict:
    (text,) = re.findall('id="page-data">(.*)</script>\n', page)
    found: dict = json.loads(text)
    return found


def test_the_states_can_be_rebuilt_from_the_changes():
    (sequence,) = data_of(trajectory_page(written(STORY), WORDS))["sequences"]
    state = list(sequence["start"])
    states = [list(state)]
    for changes in sequence["changes"]:
        for position, token in changes:
            state[position] = token
        states.append(list(state))
    assert states == STORY
    assert sequence["given"] == [True, True, False, False, False, False]
    assert sequence["revealed"] == [-1, -1, 3, 1, 2, 3]


def test_figures_are_those_of_the_trajectory_with_null_where_there_are_none(model):
    record = Record(alternatives=3)
    trajectory = sample(
        model, start_tokens(model, 7, [3], n=2), Sampler(schedule=Even(steps=3)), seed=1, record=record
    )
    tokenizer = Vocabulary(*(f" {number}" for number in range(model.config.mask_id)))
    (sequence,) = data_of(trajectory_page(trajectory, tokenizer, sequences=[1]))["sequences"]
    assert sequence["number"] == 1
    for step in range(3):
        for position in range(7):
            expected = trajectory.confidence[step, 1, position].item()
            shown = sequence["confidence"][step][position]
            top = sequence["top"][step].get(str(position))
            if expected != expected:
                assert shown is top is None
                continue
            assert shown == pytest.approx(expected, abs=5e-5)
            assert [token for token, _ in top] == trajectory.top_tokens[step, 1, position].tolist()
            assert [p for _, p in top] == pytest.approx(
                trajectory.top_probabilities[step, 1, position].tolist(), abs=5e-5
            )


def test_words_follow_white_space_and_the_prompt():
    final = [ONE, DAY, COMMA, TIM, 4, 5, ONE, 4]
    start = [ONE, DAY, *[MASK] * 6]
    (sequence,) = data_of(trajectory_page(written([start, final]), WORDS))["sequences"]
    # "One" " day" | "," " Timmy" "\n" "Onemy": the comma is not the prompt's.
    assert sequence["words"] == [[0], [1], [2], [3, 4], [5], [6, 7]]


def test_halves_of_a_character_are_joined_in_words_only():
    data = data_of(trajectory_page(written([[MASK] * 3, [ONE, HALF, OTHER_HALF]]), WORDS))
    assert data["joined"] == {f"{ONE},{HALF},{OTHER_HALF}": "Oneé"}
    assert data["tokens"][str(HALF)] == "\ufffd"


def test_the_sampler_is_described_and_escaped():
    page = trajectory_page(written(STORY), WORDS, title="<b>")
    assert "<h1>&lt;b&gt;</h1>" in page
    assert ["schedule", "Even (steps 4)"] in data_of(page)["about"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": [1]}, r"sequences must be in \[0, 1\), the trajectory's rows; got 1"),
        ({"sequences": [-1]}, "got -1"),
        ({"sequences": []}, "at least one sequence, got none"),
        (
            {"tokenizer": Vocabulary("a")},
            "mask is token 11, the tokenizer's 1; name the tokenizer of the model",
        ),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(DataError, match=message):
        trajectory_page(written(STORY), **{"tokenizer": WORDS, **arguments})
