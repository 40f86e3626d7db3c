"""Graphs along a trajectory: which step wrote what, whose graph is followed, and with what weight."""

import json
from dataclasses import replace

import pytest
import torch

from mdlm_interp.analysis import sigma_at
from mdlm_interp.decoding import Ancestral, ReMDM, Rewrite, Sampler, sample
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import ConfigError, DataError
from transcoder.attribution import CommitmentGraph, Targets, attribute, commitment_graph
from transcoder.attribution.influence import influence
from transcoder.attribution.steps import words, written_by


@pytest.fixture(scope="module")
def last(trajectory):
    """A position that the last step filled."""
    return int((trajectory.revealed_at[0] == trajectory.n_steps - 1).nonzero()[0, 0])


@pytest.fixture(scope="module")
def found(exact, trajectory, last):
    return commitment_graph(exact, trajectory, last, max_tokens=4, min_weight=0.0)


def test_what_was_written_last_is_what_the_trajectory_says(trajectory):
    assert trajectory.n_steps >= 4
    assert torch.equal(written_by(trajectory, 0)[-1], trajectory.revealed_at[0])


def test_of_a_token_that_was_taken_back_only_the_last_writing_counts(exact_model, state):
    start = torch.full_like(state, exact_model.config.mask_id)
    sampler = Sampler(schedule=ReMDM(grid=Ancestral(steps=12), eta=0.9))
    trajectory = sample(exact_model, start, sampler, seed=5)
    states, written = trajectory.states[:, 0], written_by(trajectory, 0)
    assert int((written[1:] > written[:-1]).sum()) > start.numel()  # some were written more than once
    for number in range(len(states)):
        for q in range(start.shape[1]):
            step = int(written[number, q])
            assert bool((states[step + 1 : number + 1, q] == states[number, q]).all())
            assert step < 0 or int(states[step, q]) != int(states[step + 1, q])


def test_the_root_is_the_graph_of_the_token_in_the_state_before_its_step(exact, trajectory, found, last):
    root = found.commitments[0]
    assert (root.step, root.position, root.weight) == (trajectory.n_steps - 1, last, 1.0)
    assert root.token == int(trajectory.final[0, last])
    state = trajectory.states[root.step]
    expected = attribute(
        exact, state, sigma_at(trajectory, root.step)[:1], targets=Targets(tokens={last: [root.token]})
    )
    assert torch.equal(root.graph.edges, expected.edges)
    assert torch.equal(root.graph.input_ids, state[0])


def test_a_committed_token_has_the_probability_that_the_sampler_saw(trajectory, found):
    for one in found.commitments:
        seen = float(trajectory.commit_confidence[0, one.position])
        # The sampler told the model sigma in float32.
        assert float(one.graph.probabilities[0]) == pytest.approx(seen, rel=1e-5)


def test_every_graph_is_of_a_state_before_those_it_leads_to(trajectory, found):
    assert len(found.commitments) == 4
    for link in found.links:
        earlier, later = found.commitments[link.earlier], found.commitments[link.later]
        assert earlier.step < later.step
        assert int(later.graph.input_ids[earlier.position]) == earlier.token
        assert link.embedding_node == later.graph.embedding_node(earlier.position)
        assert int(earlier.graph.input_ids[earlier.position]) == trajectory.mask_id
    assert found.links


def test_what_influence_begins_with_adds_up_to_one(found):
    for one in found.commitments:
        assert one.given + one.masks + one.committed + one.errors == pytest.approx(1.0, abs=1e-12)
        assert min(one.given, one.masks, one.errors) > 0


def test_weights_are_shares_passed_on_from_later_to_earlier(found):
    expected = [0.0] * len(found.commitments)
    expected[0] = 1.0
    for number in sorted(range(len(found.commitments)), key=lambda n: -found.commitments[n].step):
        for link in found.links:
            if link.later == number:
                expected[link.earlier] += expected[number] * link.share
    assert [one.weight for one in found.commitments] == pytest.approx(expected, rel=1e-12)
    assert all(0 < weight <= 1 for weight in expected)


def test_shares_are_those_of_the_graphs_embeddings(found):
    for link in found.links:
        graph = found.commitments[link.later].graph
        shares = influence(graph) / graph.probabilities.sum()
        assert link.share == pytest.approx(float(shares[link.embedding_node]), rel=1e-12)


def test_the_most_influential_are_followed_and_the_others_listed(exact, trajectory, last, found):
    one = commitment_graph(exact, trajectory, last, max_tokens=1, min_weight=0.0)
    assert len(one.commitments) == 1
    best = max(one.left_out, key=lambda each: each[2])
    second = found.commitments[1]
    assert (second.position, second.step) == best[:2]
    committed = (trajectory.revealed_at[0] >= 0) & (trajectory.revealed_at[0] < trajectory.n_steps - 1)
    assert {position for position, _, _ in one.left_out} == set(committed.nonzero()[:, 0].tolist())
    assert sum(weight for _, _, weight in one.left_out) == pytest.approx(
        one.commitments[0].committed, rel=1e-12
    )
    none = commitment_graph(exact, trajectory, last, max_tokens=4, min_weight=1.0)
    assert len(none.commitments) == 1


def test_sigma_is_what_the_sampler_told_the_model(exact_model, state):
    schedule, seen = LogLinearSchedule(), []

    def model(ids, sigma):
        seen.append(sigma)
        return exact_model(ids, sigma.double())

    start = torch.full_like(state, exact_model.config.mask_id)
    for told in ("share", "time"):
        seen.clear()
        sampler = Sampler(schedule=Ancestral(steps=6), sigma=told, cache=False)
        trajectory = sample(model, start, sampler, seed=2, mask_id=exact_model.config.mask_id)
        assert len(seen) == trajectory.n_steps
        for step in range(trajectory.n_steps):
            assert torch.equal(sigma_at(trajectory, step)[:1], seen[step])
    assert float(schedule.sigma(torch.tensor(0.5))) > 0


def test_graphs_and_links_come_back_from_disk(found, tmp_path):
    found.save(tmp_path / "found")
    loaded = CommitmentGraph.load(tmp_path / "found")
    assert (loaded.links, loaded.left_out) == (found.links, found.left_out)
    for ours, theirs in zip(found.commitments, loaded.commitments, strict=True):
        assert torch.equal(ours.graph.edges, theirs.graph.edges)
        assert {**vars(ours), "graph": None} == {**vars(theirs), "graph": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is not mdlm-interp commitment graph of version 1"),
        ({"links": [{"earlier": 0}]}, "does not say what it should"),
        ({"commitments": [{"step": 99, "position": 0}]}, "has no graph.json"),
    ],
)
def test_damage_is_told(found, tmp_path, change, message):
    found.save(tmp_path / "found")
    path = tmp_path / "found" / "commitments.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        CommitmentGraph.load(tmp_path / "found")
    path.unlink()
    with pytest.raises(DataError, match="is it a commitment graph"):
        CommitmentGraph.load(tmp_path / "found")


def test_words_tell_each_step_in_order(trajectory, found):
    lines = words([f"t{token}" for token in trajectory.final[0].tolist()], found)
    steps = [int(line.split(":")[0].removeprefix("step ")) for line in lines]
    assert steps == sorted(steps)
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("position", "row", "message"),
    [
        (12, 0, r"position must be in \[0, 12\), got 12"),
        (4, 1, r"row must be in \[0, 1\), got 1"),
        (1, 0, "position 1 was given from the start"),
    ],
)
def test_a_token_that_was_not_committed_is_refused(exact, trajectory, position, row, message):
    with pytest.raises(DataError, match=message):
        commitment_graph(exact, trajectory, position, row=row)


def test_what_is_no_prediction_of_a_mask_is_refused(exact, exact_model, trajectory, last, state):
    unfinished = replace(trajectory, states=trajectory.states[:-1], **shortened(trajectory))
    with pytest.raises(DataError, match=f"position {last} is still a mask at the end"):
        commitment_graph(exact, unfinished, last)
    with pytest.raises(DataError, match=r"the trajectory's mask is token 3, the model's \d+"):
        commitment_graph(exact, replace(trajectory, mask_id=3), last)
    with pytest.raises(ConfigError, match="max_tokens must be at least 1"):
        commitment_graph(exact, trajectory, last, max_tokens=0)
    start = torch.full_like(state, exact_model.config.mask_id)
    rewritten = sample(exact_model, start, Sampler(schedule=Rewrite(steps=6)), seed=1)
    changed = (written_by(rewritten, 0)[-1] >= 0).nonzero()[0, 0]
    with pytest.raises(DataError, match=r"wrote position \d+ over token \d+, and only masks are predicted"):
        commitment_graph(exact, rewritten, int(changed))


def shortened(trajectory):
    """The fields that have a step's axis, without the last."""
    names = ("confidence", "entropy", "t", "top_tokens", "top_probabilities")
    return {name: getattr(trajectory, name)[:-1] for name in names}
