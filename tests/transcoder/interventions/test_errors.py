"""What cannot be meant is refused with the rule, what came and the remedy, before anything runs."""

import pytest
import torch

from mdlm_interp.errors import DataError, HookError
from oracle import Oracle
from transcoder.interventions import (
    Ablate,
    Knockout,
    LocalReplacement,
    Patch,
    Scale,
    Set,
    Steer,
    interventions,
)
from transcoder.interventions.edits import fitting
from transcoder.interventions.session import edit_list
from transcoder.interventions.sites import feature_place
from transcoder.interventions.subjects import ground_of


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Ablate(feature=(3, 0)), r"Ablate\(feature=\(3, 0\)\): layer must be in \[0, 3\), got 3; "),
        (Ablate(feature=(-1, 0)), r"layer must be in \[0, 3\), got -1"),
        (
            Scale(2.0, feature=(2, 64)),
            r"Scale\(feature=\(2, 64\)\): feature must be in \[0, 64\), got 64; it is",
        ),
        (Ablate(head=(0, 2)), r"head must be in \[0, 2\), got 2; heads count from 0"),
        (Knockout(edge=(3, None)), r"layer must be in \[0, 3\), got 3"),
        (Knockout(edge=(0, 2)), r"head must be in \[0, 2\), got 2"),
        (Ablate(head=(0, True)), r"a head is \(layer, head\), two whole numbers, got \(0, True\)"),
        (
            Ablate(hook="hook_cond", positions=3),
            r"hook_cond is the same at every position; leave positions out",
        ),
    ],
)
def test_a_place_that_is_not_there_is_refused_when_it_is_named(replacement, edit, message):
    with pytest.raises(DataError, match=message):
        interventions(replacement, [edit])


def test_a_hook_that_is_not_there_is_refused_with_the_nearest(replacement):
    with pytest.raises(HookError, match=r"no hook point matches 'blocks.1.hook_mlp_ot'; did you mean"):
        interventions(replacement, [Ablate(hook="blocks.1.hook_mlp_ot")])


@pytest.mark.parametrize(
    "place", [{"feature": (1, 0)}, {"hook": "hook_embed"}, {"head": (0, 0)}, {"edge": (0, 0)}]
)
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (24, r"positions must be whole numbers in \[0, 24\), got 24; they count from 0"),
        ([3, -1], r"in \[0, 24\), got -1"),
        (torch.tensor([1.5]), r"in \[0, 24\), got 1\.5"),
        (torch.zeros(2, 23, dtype=torch.bool), r"tokens' shape \[2, 24\] or \[24\], got \[2, 23\]"),
        (lambda x: x[:, 0] == 1, r"tokens' shape \[2, 24\] or \[24\], got \[2\]"),
        (lambda x: x, r"returns booleans \[2, 24\], got int64"),
    ],
)
def test_a_position_outside_is_refused(replacement, ids, sigma, place, positions, message, listening):
    with pytest.raises(DataError, match=rf"Ablate\({next(iter(place))}=.*{message}"):
        interventions(replacement, [Ablate(**place, positions=positions)])(ids, sigma)
    assert listening(replacement.model) == 0


def test_positions_are_checked_before_the_pass_begins(replacement, ids, sigma):
    reached = []
    edits = [Ablate(feature=(2, 0), positions=99)]
    with (
        replacement.model.hooks({"hook_embed": lambda t, h: reached.append(1)}),
        pytest.raises(DataError, match="got 99"),
    ):
        interventions(replacement, edits)(ids, sigma)
    assert reached == []


def test_keys_outside_are_refused_and_are_an_edges(replacement, ids, sigma):
    with pytest.raises(DataError, match=r"keys: positions must be .* got 30"):
        interventions(replacement, [Knockout(edge=(0, 0), keys=30)])(ids, sigma)
    with pytest.raises(DataError, match="keys are an edge's"):
        Ablate(head=(0, 0), keys=3)


def test_an_edit_names_one_place():
    with pytest.raises(DataError, match="names one of hook, feature, head, edge; got none"):
        Ablate()
    with pytest.raises(DataError, match="got feature and head"):
        Ablate(feature=(0, 0), head=(0, 0))
    with pytest.raises(DataError, match="a knockout is of an edge or a head"):
        Knockout(hook="hook_embed")


@pytest.mark.parametrize("steps", [-1, [3, -1], range(-1, 10**12)])
def test_steps_count_from_zero(steps):
    with pytest.raises(
        DataError, match=r"Ablate\(head=\(0, 0\)\): steps count from 0, got -1; the last of n"
    ):
        Ablate(head=(0, 0), steps=steps)


def test_features_need_a_transcoder_and_a_subject_is_one(model, replacement):
    with pytest.raises(DataError, match="features need a transcoder"):
        interventions(model, [Ablate(feature=(0, 0))])
    with pytest.raises(DataError, match=r"got Oracle; of an Oracle hand in its \.model"):
        ground_of(Oracle(model))
    for wrong in ("x", [Ablate], [None], Ablate):
        with pytest.raises(DataError, match=r"an edit is an Ablate\(...\), .*, got"):
            edit_list(wrong)
    for pair in ((1,), 1, "12", (1, 2.0)):
        with pytest.raises(DataError, match=r"a feature is \(layer, feature\), two whole numbers, got"):
            feature_place(pair, replacement.clt, "here")


@torch.no_grad()
def test_a_source_without_the_hook_or_of_another_length_is_refused(replacement, ids, sigma):
    _, short = replacement.model.run_with_cache(ids[:, :20], ["hook_embed"], timesteps=sigma)
    with pytest.raises(DataError, match=r"has \[2, 20, 32\] there, this one \[2, 24, 32\]"):
        interventions(replacement, [Patch(short, hook="hook_embed")])(ids, sigma)
    with pytest.raises(DataError, match=r"kept no 'blocks.0.mlp.hook_in'.*name it in run_with_cache"):
        interventions(replacement, [Patch(short, feature=(0, 1))])(ids, sigma)


@torch.no_grad()
@pytest.mark.parametrize(
    "edit", [Set(torch.zeros(31), hook="hook_embed"), Steer(torch.zeros(1, 2, 24, 32), hook="hook_embed")]
)
def test_an_amount_that_does_not_fit_is_refused(replacement, ids, sigma, edit):
    with pytest.raises(DataError, match=r"must broadcast to \[2, 24, 32\], got"):
        interventions(replacement, [edit])(ids, sigma)


@pytest.mark.parametrize("amount", ["3", None, [[1.0], [2.0, 3.0]]])
def test_an_amount_that_is_no_number_is_refused(amount):
    with pytest.raises(DataError, match=r"^here: by must be a number or a tensor, got"):
        fitting(amount, torch.zeros(2), "here: by")


@torch.no_grad()
def test_cutting_every_key_of_a_query_leaves_nothing_to_renormalise(replacement, ids, sigma):
    with pytest.raises(DataError, match="query 3 has no key left"):
        interventions(replacement, [Knockout(edge=(0, 1), positions=3)])(ids, sigma)
    interventions(replacement, [Knockout(edge=(0, 1), positions=3, renormalise=False)])(ids, sigma)


def test_steps_mean_something_only_while_decoding(replacement, ids, sigma):
    limited = interventions(replacement, [Ablate(feature=(0, 1))], steps=range(2))
    with pytest.raises(DataError, match=r"limited to denoising steps.*use decode"):
        limited(ids, sigma)
    with pytest.raises(DataError, match="a local replacement model is of one masked state and decoding"):
        interventions(LocalReplacement(replacement, ids, sigma), []).decode(ids)


@torch.no_grad()
def test_interventions_in_effect_are_not_installed_twice(replacement, ids):
    changed = interventions(replacement, [Ablate(feature=(0, 1))])
    with changed, pytest.raises(DataError, match="in effect already"), changed:
        pass
