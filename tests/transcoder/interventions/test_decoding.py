"""Interventions while decoding: windows of steps, and draws that stay where they are."""

from typing import Any

import pytest
import torch

from mdlm_interp.decoding import Ancestral, Even, FirstHitting, Record, Sampler, sample, start_tokens
from mdlm_interp.errors import DataError
from transcoder.interventions import Ablate, Knockout, Patch, Scale, Set, Spliced, Steer, interventions

SAMPLER = Sampler(schedule=Ancestral(steps=8))
LENGTH = 20


@pytest.fixture(scope="module")
def start(bundled, tokenizer):
    return start_tokens(bundled, LENGTH, tokenizer.encode("The dog"), n=2)


def same(one, two):
    return all(
        torch.equal(getattr(one, name).nan_to_num(-1.0), getattr(two, name).nan_to_num(-1.0))
        for name in ("states", "revealed_at", "confidence", "entropy")
    )


def test_no_edit_and_edits_outside_their_steps_leave_every_bit(bundled, beside, start):
    plain = sample(bundled, start, SAMPLER, seed=5)
    for edits in ([], [Ablate(feature=(1, 3), steps=[])], [Knockout(edge=(1, 0), keys=2, steps=())]):
        paths = interventions(beside, edits).decode(start, SAMPLER, seed=5)
        assert same(paths.before, plain)
        assert same(paths.after, plain)
        assert paths.before.n_forwards == plain.n_forwards == paths.after.n_forwards
        assert paths.first_difference == [None, None]
        assert paths.table() == "no final token differs"
    assert not same(sample(bundled, start, SAMPLER, seed=6), plain)  # the neighbour that fails


def test_steps_that_are_never_taken_are_refused_where_their_number_is_fixed(bundled, start):
    late = interventions(bundled, [Ablate(head=(0, 1), steps=[2]), Ablate(head=(0, 2), steps=range(8, 20))])
    with pytest.raises(
        DataError,
        match=r"Ablate\(head=\(0, 2\)\) acts in none of the 8 denoising steps, got steps range\(8, 20\)",
    ):
        late.decode(start, SAMPLER, seed=5)
    open_ended = Sampler(schedule=FirstHitting())
    paths = interventions(bundled, [Ablate(head=(0, 2), steps=[1000])]).decode(start, open_ended, seed=5)
    assert not bool(paths.changed.any())


def test_an_edit_in_a_window_leaves_the_steps_before_it(bundled, beside, start):
    edits = [Ablate(hook="blocks.*.hook_mlp_out")]
    paths = interventions(beside, edits, steps=range(4, 6)).decode(start, SAMPLER, seed=5)
    assert torch.equal(paths.before.states[:5], paths.after.states[:5])
    assert torch.equal(paths.before.confidence[:4].nan_to_num(-1), paths.after.confidence[:4].nan_to_num(-1))
    assert not torch.equal(
        paths.before.confidence[4].nan_to_num(-1), paths.after.confidence[4].nan_to_num(-1)
    )
    assert min(step for step in paths.first_difference if step is not None) >= 4
    assert bool(paths.changed.any())


def test_an_edit_shifts_no_draw(bundled, start):
    """With logits that no token can move, what is changed at one position is all that changes."""
    flat = Set(0.0, hook="hook_logits")
    word = torch.zeros(bundled.config.vocab_size)
    word[17] = 50.0
    free = (start == bundled.config.mask_id)[0].nonzero()[:, 0]
    position = int(free[7])
    base = interventions(bundled, [flat]).decode(start, SAMPLER, seed=5).after
    planted = interventions(bundled, [flat, Set(word, hook="hook_logits", positions=position)])
    found = planted.decode(start, SAMPLER, seed=5).after
    assert found.final[:, position].tolist() == [17, 17]
    assert torch.equal(found.revealed_at, base.revealed_at)
    others = [place for place in range(LENGTH) if place != position]
    assert torch.equal(found.states[:, :, others], base.states[:, :, others])
    assert len(set(base.final[0, free].tolist())) > 5  # drawn, not constant


def test_edits_of_features_in_a_window_are_those_of_single_passes(beside, start):
    """Step by step with one pass each: the state before a step and the edit give the confidence of that step."""
    model = beside.model
    place: dict[str, Any] = {"feature": (1, 3), "positions": lambda x: x == model.config.mask_id}
    edits = [Set(30.0, **place), Scale(2.0, **place)]
    sampler = Sampler(schedule=Even(steps=6))
    after = interventions(beside, edits, steps=(1, 2)).decode(start, sampler, seed=5).after
    for step in range(4):
        x = after.states[step]
        with torch.no_grad():
            logits = interventions(beside, edits if step in (1, 2) else [])(x)
        p = logits.double()[..., :-1].softmax(-1)
        written = after.states[step] != after.states[step + 1]
        tokens = after.states[step + 1]
        own = p.gather(-1, tokens.clamp(max=p.shape[-1] - 1)[..., None])[..., 0]
        torch.testing.assert_close(after.confidence[step][written], own[written], rtol=1e-9, atol=0)
        with torch.no_grad():
            plain = model(x).double()[..., :-1].softmax(-1)
        assert torch.equal(plain, p) == (step not in (1, 2))


def test_a_trajectory_is_patched_step_by_step(bundled, start):
    hook = "blocks.2.hook_mlp_out"
    donor = sample(bundled, start, SAMPLER, seed=9, record=Record(hooks=(hook,)))
    record = Record(hooks=("blocks.2.hook_mlp_out",))
    patched = interventions(bundled, [Patch(donor, hook=hook, steps=range(2, 5))])
    after = patched.decode(start, SAMPLER, seed=5, record=record).after
    for step in range(8):
        taken = torch.equal(after.activations[hook][step], donor.activations[hook][step])
        # All are masks in the first step, so that both runs have the same activations there.
        assert taken == (step in (0, 2, 3, 4))


def test_steps_that_a_trajectory_did_not_record_are_refused(bundled, start):
    hook = "blocks.2.hook_mlp_out"
    donor = sample(bundled, start, SAMPLER, seed=9, record=Record(hooks=(hook,), steps=[1]))
    with pytest.raises(DataError, match=r"recorded the activations of steps \[1\], got 2; record them"):
        interventions(bundled, [Patch(donor, hook=hook, steps=[1, 2])])
    bare = sample(bundled, start, SAMPLER, seed=9)
    with pytest.raises(DataError, match=r"steps \[\], got none"):
        interventions(bundled, [Patch(bare, hook=hook)])
    with pytest.raises(DataError, match="limited to denoising steps"):
        interventions(bundled, [Patch(donor, hook=hook)])(start)


def test_the_baseline_of_an_edge_edit_that_cuts_nothing_is_the_same_to_the_bit(bundled, start):
    nothing = Knockout(edge=(1, 0), positions=[], keys=[3])
    paths = interventions(bundled, [nothing], steps=range(3)).decode(start, SAMPLER, seed=5)
    assert same(paths.before, paths.after)
    compared = interventions(bundled, [nothing]).compare(start)
    assert torch.equal(compared.logits_before, compared.logits_after)


def test_the_spliced_model_decodes_by_its_own_passes(replacement):
    x = start_tokens(replacement.model, 12)
    paths = interventions(Spliced(replacement), [Ablate(feature=(0, 1), steps=[2])]).decode(
        x, SAMPLER, seed=1
    )
    with replacement.spliced():
        expected = sample(replacement.model, x, SAMPLER, seed=1)
    assert torch.equal(paths.before.states, expected.states)
    assert not torch.equal(paths.before.states, sample(replacement.model, x, SAMPLER, seed=1).states)


def test_a_position_outside_the_sequences_is_named(beside, start, listening):
    with pytest.raises(DataError, match=rf"Ablate\(feature=\(1, 3\)\): positions .* \[0, {LENGTH}\), got 99"):
        interventions(beside, [Ablate(feature=(1, 3), positions=99)]).decode(start, SAMPLER)
    assert listening(beside.model) == 0
    assert not beside.model._forward_pre_hooks


def test_texts_and_table_are_of_the_final_tokens(bundled, tokenizer, start):
    steer = torch.zeros(bundled.config.vocab_size)
    word = tokenizer.encode(" house")[0]
    steer[word] = 60.0
    paths = interventions(bundled, [Steer(steer, hook="hook_logits", positions=6)]).decode(
        start, SAMPLER, seed=5
    )
    assert [row[6] for row in paths.after.final.tolist()] == [word, word]
    texts = paths.texts(tokenizer)
    assert texts[0] == (tokenizer.decode(paths.before.final[0]), tokenizer.decode(paths.after.final[0]))
    lines = paths.table(tokenizer).splitlines()
    assert len(lines) == 1 + int(paths.changed.sum())
    row = next(line for line in lines if line.startswith("0:6 "))
    assert repr(" house") in row
    assert f"{float(paths.after.commit_confidence[0, 6]):.4f}" in row
    late = interventions(bundled, [Steer(steer, hook="hook_logits", steps=7)]).decode(start, SAMPLER, seed=5)
    assert late.first_difference == [7, 7]
