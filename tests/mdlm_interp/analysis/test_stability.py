"""When predictions settle, against a plain loop over steps and positions."""

import math
from itertools import pairwise

import pytest
import torch

from mdlm_interp.analysis import prediction_stability, sigma_at
from mdlm_interp.analysis.stability import Stability
from mdlm_interp.errors import DataError


def history(model, trajectory, row, position):
    """(step, likeliest tokens in order) at the steps where the position is a mask that will be committed."""
    commit = int(trajectory.revealed_at[row, position])
    found = []
    for step in range(commit + 1):
        if int(trajectory.states[step, row, position]) == trajectory.mask_id:
            logits = model(trajectory.states[step], sigma_at(trajectory, step))[row, position, :-1].detach()
            found.append((step, sorted(range(len(logits)), key=lambda token: -float(logits[token]))))
    return found


@pytest.mark.parametrize("name", ["trajectory", "timed", "revised"])
def test_every_figure_is_that_of_a_loop(exact, name, request):
    trajectory = request.getfixturevalue(name)
    k = 6
    found = prediction_stability(exact, trajectory, k=k)
    table = {(row["row"], row["position"]): row for row in found.table()}
    assert table.keys() == {(b, p) for b, p in (trajectory.revealed_at >= 0).nonzero().tolist()}
    for (b, p), row in table.items():
        steps = history(exact, trajectory, b, p)
        final = int(trajectory.final[b, p])
        tops = [order[0] for _, order in steps]
        changes = [steps[i][0] for i in range(1, len(steps)) if tops[i] != tops[i - 1]]
        settled = -1
        for i in reversed(range(len(steps))):
            if tops[i] != final:
                break
            settled = steps[i][0]
        assert row["commit"] == steps[-1][0]
        assert row["open_steps"] == len(steps)
        assert row["last_change"] == (changes[-1] if changes else -1)
        assert row["settled"] == settled
        assert row["agreement"] == pytest.approx(sum(top == final for top in tops) / len(tops))
        both = [
            len(set(now[:k]) & set(then[:k]))
            for (step, now), (after, then) in pairwise(steps)
            if after == step + 1
        ]
        for key, values in (("shared", [n / k for n in both]), ("jaccard", [n / (2 * k - n) for n in both])):
            expected = sum(values) / len(values) if values else math.nan
            assert row[key] == pytest.approx(expected, nan_ok=True)


def made(tops, final, commits):
    """A stability of one sequence from lists of likeliest tokens; None where the position is no mask."""
    top = torch.tensor([[[-1 if token is None else token for token in step]] for step in tops])[..., None]
    commit = torch.tensor([commits])
    steps = torch.arange(len(tops))[:, None, None]
    return Stability(
        rows=(0,),
        final=torch.tensor([final]),
        commit=commit,
        is_open=(top[..., 0] >= 0) & (steps <= commit),
        top_tokens=top,
    )


def test_settled_changed_and_agreed_on_a_history_written_by_hand():
    # Positions: settles at step 2; wrong at its commit; right from the start; taken back in step 1; never filled.
    tops = [
        [4, 5, 6, 7, 9],
        [5, 5, 6, None, 9],
        [4, 4, None, 8, 9],
        [4, 5, None, 7, 9],
    ]
    found = made(tops, [4, 9, 6, 7, 9], [3, 3, 1, 3, -1])
    assert found.settled.tolist() == [[2, -1, 0, 3, -1]]
    assert found.last_change.tolist() == [[2, 3, -1, 3, -1]]
    assert found.agreement[0, :4].tolist() == pytest.approx([3 / 4, 0, 1, 2 / 3])
    assert bool(found.agreement[0, 4].isnan())
    summary = found.summary()
    assert summary["positions"] == 4
    assert summary["top_at_commit"] == pytest.approx(3 / 4)
    # Leads are 1, 1 and 0.
    assert summary["median_steps_settled_before_commit"] == 1.0


def test_the_mask_is_never_the_likeliest(exact, trajectory):
    with torch.no_grad():
        exact.backbone.output_layer.linear.bias[exact.config.mask_id] = 100.0
    found = prediction_stability(exact, trajectory, k=3)
    assert not bool((found.top_tokens == exact.config.mask_id).any())
    assert torch.equal((found.top_tokens >= 0).all(-1), found.is_open)


def test_a_range_error_names_value_and_range(exact, trajectory):
    for k in (0, 41):
        with pytest.raises(
            DataError, match=rf"k must be in \[1, 41\), tokens that can be predicted; got {k}"
        ):
            prediction_stability(exact, trajectory, k=k)
    with pytest.raises(DataError, match=r"rows must be in \[0, 2\), got 5"):
        prediction_stability(exact, trajectory, rows=[5])
    part = prediction_stability(exact, trajectory, rows=[1])
    assert {row["row"] for row in part.table()} == {1}
