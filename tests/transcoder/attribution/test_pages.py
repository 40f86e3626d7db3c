"""A commitment graph as a page: its shares and weights are the graphs', and it belongs to one trajectory."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from mdlm_interp import load_tokenizer
from mdlm_interp.decoding import Ancestral, ReMDM, Sampler, sample
from mdlm_interp.errors import DataError
from mdlm_interp.viewer.text import visible
from transcoder.attribution import commitment_graph, prune
from transcoder.attribution.pages import commitment_graph_page
from transcoder.attribution.steps import written_by


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return load_tokenizer(model_directory)


@pytest.fixture(scope="module")
def found(exact, trajectory):
    position = int((trajectory.revealed_at[0] == trajectory.n_steps - 1).nonzero()[0, 0])
    return commitment_graph(exact, trajectory, position, max_tokens=3, min_weight=0.0)


def data_of(page):
    (text,) = re.findall('id="page-data">(.*)</script>\n', page)
    return json.loads(text)


def test_shares_by_position_add_up_to_the_shares_by_origin(found, trajectory, tokenizer):
    data = data_of(commitment_graph_page(found, trajectory, tokenizer))
    assert data["nSteps"] == trajectory.n_steps
    assert len(data["commitments"]) == 3
    for one, ours in zip(data["commitments"], found.commitments, strict=True):
        given, committed, masks, errors = one["shares"]
        assert errors == ours.errors
        by_origin = {"given": 0.0, "committed": 0.0, "masks": 0.0}
        for share, writer, mask in zip(one["at"], one["writers"], one["masked"], strict=True):
            by_origin["masks" if mask else "committed" if writer >= 0 else "given"] += share
        assert by_origin["given"] == pytest.approx(given, abs=1e-12)
        assert by_origin["committed"] == pytest.approx(committed, abs=1e-12)
        assert by_origin["masks"] == pytest.approx(masks, abs=1e-12)
        assert one["masked"] == (ours.graph.input_ids == trajectory.mask_id).tolist()


def test_links_lead_from_a_tokens_embedding_to_its_own_commitment(found, trajectory, tokenizer):
    data = data_of(commitment_graph_page(found, trajectory, tokenizer))
    assert [tuple(link) for link in data["links"]] == [
        (one.earlier, one.later, one.share) for one in found.links
    ]
    for link in found.links:
        later = data["commitments"][link.later]
        position = found.commitments[link.earlier].position
        assert data["origins"][link.later][str(position)] == link.earlier
        assert later["at"][position] == pytest.approx(link.share, rel=1e-12)
        assert later["writers"][position] == found.commitments[link.earlier].step
        assert any(
            node["kind"] == "embedding" and node["position"] == position for node in later["graph"]["nodes"]
        )


def test_what_was_not_followed_is_listed_with_its_token(found, trajectory, tokenizer):
    left = data_of(commitment_graph_page(found, trajectory, tokenizer))["leftOut"]
    assert left
    assert [(one["position"], one["step"], one["weight"]) for one in left] == found.left_out
    for one in left:
        token = int(trajectory.states[one["step"] + 1, 0, one["position"]])
        assert one["token"] == visible(tokenizer.token(token))


def test_the_kept_part_of_the_graphs_can_be_chosen(found, trajectory, tokenizer):
    few = [prune(one.graph, node_share=0.3) for one in found.commitments]
    counts = [
        [len(one["graph"]["nodes"]) for one in data_of(page)["commitments"]]
        for page in (
            commitment_graph_page(found, trajectory, tokenizer, pruned=few),
            commitment_graph_page(found, trajectory, tokenizer),
        )
    ]
    assert counts[0] == [int(one.nodes.sum()) for one in few]
    assert all(a < b for a, b in zip(*counts, strict=True))


def test_a_mask_that_was_taken_back_has_no_writer(exact, exact_model, state, tokenizer):
    start = torch.full_like(state, exact_model.config.mask_id)
    remasking = sample(exact_model, start, Sampler(schedule=ReMDM(grid=Ancestral(steps=12), eta=0.9)), seed=5)
    written = written_by(remasking, 0)
    taken_back = (remasking.states[:, 0] == remasking.mask_id) & (written >= 0)
    # A token that was last written when another had been taken back.
    position = next(q for q in range(start.shape[1]) if bool(taken_back[int(written[-1, q])].any()))
    found = commitment_graph(exact, remasking, position, max_tokens=1)
    step = found.commitments[0].step
    assert bool(taken_back[step].any())
    (one,) = data_of(commitment_graph_page(found, remasking, tokenizer))["commitments"]
    expected = torch.where(
        taken_back[step] | (remasking.states[step, 0] == remasking.mask_id), -1, written[step]
    )
    assert one["writers"] == expected.tolist()


def test_another_trajectory_or_row_is_refused(found, trajectory, tokenizer):
    with pytest.raises(DataError, match=r"row must be in \[0, 1\), got 1"):
        commitment_graph_page(found, trajectory, tokenizer, row=1)
    other = replace(trajectory, states=trajectory.states.roll(1, dims=-1))
    with pytest.raises(DataError, match=r"the state before step \d+ is another in row 0 of this trajectory"):
        commitment_graph_page(found, other, tokenizer)
