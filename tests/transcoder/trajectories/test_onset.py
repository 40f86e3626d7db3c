"""Lives of features against a loop over states, layers, positions and features."""

import pytest
import torch

from mdlm_interp.analysis import sigma_at
from mdlm_interp.decoding import Ancestral, ReMDM, Rewrite, Sampler, sample
from mdlm_interp.errors import DataError
from transcoder.trajectories import feature_courses, feature_lives, feature_overlap


def all_acts(replacement, trajectory):
    """[state layer batch pos feature], a pass for each state."""
    found = []
    for state in range(trajectory.n_steps + 1):
        x, sigma = trajectory.states[state], sigma_at(trajectory, state)
        with torch.no_grad():
            found.append(replacement.feature_acts(x, sigma))
    return torch.stack(found)


@pytest.fixture(scope="module")
def acts(replacement, trajectory):
    return all_acts(replacement, trajectory)


def expected_lives(acts, trajectory):
    """(layer, row, position, feature): its states in ascending order, with the activation in each."""
    found: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for state, layer, b, p, feature in (acts > 0).nonzero().tolist():
        if int(trajectory.revealed_at[b, p]) >= 0:
            key = layer, b, p, feature
            found.setdefault(key, []).append((state, float(acts[state, layer, b, p, feature])))
    return found


def test_lives_are_those_of_a_loop(replacement, trajectory, acts):
    lives = feature_lives(replacement, trajectory)
    expected = expected_lives(acts, trajectory)
    assert len(lives) == len(expected) > 500
    for row in lives.table():
        states = expected[row["layer"], row["row"], row["position"], row["feature"]]
        assert row["onset"] == states[0][0]
        assert row["last"] == states[-1][0]
        assert row["n_active"] == len(states)
        assert row["from_start"] == (states[0][0] == 0)
        commit = int(trajectory.revealed_at[row["row"], row["position"]])
        assert row["to_commit"] == states[0][0] - commit
        peak = max(value for _, value in states)
        assert row["peak"] == peak
        assert row["peak_state"] == next(state for state, value in states if value == peak)
    interrupted = (lives.last - lives.onset + 1) > lives.n_active
    assert bool(interrupted.any())  # some go off in between, and the loop agrees


def test_the_rates_count_onsets_for_each_position_that_is_observed(replacement, trajectory, acts):
    lives = feature_lives(replacement, trajectory)
    expected = expected_lives(acts, trajectory)
    commits = {(b, p): int(trajectory.revealed_at[b, p]) for b in range(2) for p in range(3, 10)}
    for layer in range(3):
        observed: dict[int, int] = {}
        onsets: dict[int, int] = {}
        for commit in commits.values():
            for state in range(1, trajectory.n_steps + 1):
                observed[state - commit] = observed.get(state - commit, 0) + 1
        for (source, b, p, _), states in expected.items():
            if source == layer and states[0][0] > 0:
                offset = states[0][0] - commits[b, p]
                onsets[offset] = onsets.get(offset, 0) + 1
        found = {row["to_commit"]: row for row in lives.rates(layer)}
        assert {offset: row["positions"] for offset, row in found.items()} == observed
        assert {offset: row["onsets"] for offset, row in found.items() if row["onsets"]} == onsets
        assert all(row["rate"] == row["onsets"] / row["positions"] for row in found.values())
        assert onsets


def test_onsets_by_distance_count_masks_around_what_was_just_written(replacement, trajectory, acts):
    lives = feature_lives(replacement, trajectory)
    mask_id, states = trajectory.mask_id, trajectory.states.tolist()
    near: dict[tuple[int, int, int], int] = {}
    for state in range(1, len(states)):
        for b in range(2):
            before, now = states[state - 1][b], states[state][b]
            written = [p for p in range(10) if before[p] == mask_id != now[p]]
            for p in range(10):
                if now[p] == mask_id and written:
                    near[state, b, p] = min(abs(p - w) for w in written)
    for layer in range(3):
        counts = dict.fromkeys(near, 0)
        for (source, b, p, _), seen in expected_lives(acts, trajectory).items():
            if source == layer and (seen[0][0], b, p) in counts:
                counts[seen[0][0], b, p] += 1
        found = {row["distance"]: row for row in lives.by_distance(layer)}
        assert sorted(found) == sorted(set(near.values()))
        for distance, row in found.items():
            here = {key: count for key, count in counts.items() if near[key] == distance}
            assert (row["positions"], row["onsets"]) == (len(here), sum(here.values()))
            assert row["rate"] == pytest.approx(sum(here.values()) / len(here))
            for name, is_next in (("rate_if_next", True), ("rate_if_later", False)):
                values = [
                    count
                    for (state, b, p), count in here.items()
                    if (int(trajectory.revealed_at[b, p]) == state) == is_next
                ]
                expected = sum(values) / len(values) if values else float("nan")
                assert row[name] == pytest.approx(expected, nan_ok=True)
        assert sum(row["onsets"] for row in found.values()) > 0


def test_the_summary_shares_out_every_life(replacement, trajectory):
    lives = feature_lives(replacement, trajectory)
    for row in lives.summary():
        of_layer = [life for life in lives.table() if life["layer"] == row["layer"]]
        known = [life["to_commit"] for life in of_layer if not life["from_start"]]
        counts = {
            "from_start": len(of_layer) - len(known),
            "before_commit_state": sum(time < 0 for time in known),
            "in_commit_state": sum(time == 0 for time in known),
            "with_the_token": sum(time == 1 for time in known),
            "later": sum(time > 1 for time in known),
        }
        assert row["lives"] == sum(counts.values())
        for name, count in counts.items():
            assert row[name] == pytest.approx(count / len(of_layer))
        assert row["median_to_commit"] == sorted(known)[(len(known) - 1) // 2]


def test_chosen_features_and_rows_are_a_part_of_the_whole(replacement, trajectory):
    whole = feature_lives(replacement, trajectory)
    wanted = [(0, int(whole.feature[whole.layer == 0][0])), (2, int(whole.feature[whole.layer == 2][0]))]
    part = feature_lives(replacement, trajectory, features=wanted)
    assert part.table() == [row for row in whole.table() if (row["layer"], row["feature"]) in wanted]
    one = feature_lives(replacement, trajectory, rows=[1])
    assert {row["row"] for row in one.table()} == {1}
    of_row = [row for row in whole.table() if row["row"] == 1]
    assert [row["onset"] for row in one.table()] == [row["onset"] for row in of_row]


def test_of_a_token_that_was_taken_back_the_last_writing_is_the_commit(replacement, model):
    start = torch.full((1, 10), model.config.mask_id)
    trajectory = sample(model, start, Sampler(schedule=ReMDM(grid=Ancestral(steps=8), eta=0.9)), seed=1)
    lives = feature_lives(replacement, trajectory)
    assert torch.equal(lives.commit, trajectory.revealed_at)
    assert bool(
        (
            (trajectory.states[:-1] != model.config.mask_id) & (trajectory.states[1:] == model.config.mask_id)
        ).any()
    )
    assert len(lives) == len(expected_lives(all_acts(replacement, trajectory), trajectory))


@pytest.mark.parametrize("k", [None, 3, 20])  # of which 8 are active
def test_overlap_is_that_of_python_sets(replacement, trajectory, acts, k):
    found = feature_overlap(replacement, trajectory, k=k)
    assert torch.equal(found.was_masked, trajectory.states == trajectory.mask_id)

    def strongest(state, layer, b, p):
        here = acts[state, layer, b, p]
        order = sorted(range(len(here)), key=lambda feature: -float(here[feature]))
        return {feature for feature in order[:k] if float(here[feature]) > 0}

    sums: dict[tuple[int, str], list[float]] = {}
    for state in range(trajectory.n_steps):
        for layer in range(3):
            for b in range(2):
                for p in range(10):
                    now, then = strongest(state, layer, b, p), strongest(state + 1, layer, b, p)
                    expected = len(now & then) / len(now | then)
                    assert float(found.jaccard[state, layer, b, p]) == pytest.approx(expected)
                    was, stays = (
                        int(trajectory.states[s, b, p]) == trajectory.mask_id for s in (state, state + 1)
                    )
                    kind = "token" if not was else "masked" if stays else "filled"
                    sums.setdefault((layer, kind), []).append(expected)
    for row in found.summary():
        for kind in ("masked", "filled", "token"):
            values = sums[row["layer"], kind]
            assert row[kind] == pytest.approx(sum(values) / len(values))


def test_courses_are_the_activations_themselves(replacement, trajectory, acts):
    features = [(2, 5), (0, 17), (2, 40)]
    found = feature_courses(replacement, trajectory, features, rows=[1])
    for number, (layer, feature) in enumerate(features):
        expected = acts[:, layer, 1:, :, feature].double()
        torch.testing.assert_close(found.acts[:, number], expected, rtol=1e-5, atol=1e-6)
    strongest = int(acts[..., :].amax((0, 2, 3))[1].argmax())
    found = feature_courses(replacement, trajectory, [(1, strongest)])
    around: dict[int, list[float]] = {}
    for state in range(trajectory.n_steps + 1):
        for b, p in (trajectory.revealed_at >= 0).nonzero().tolist():
            offset = state - int(trajectory.revealed_at[b, p])
            around.setdefault(offset, []).append(float(acts[state, 1, b, p, strongest]))
    rows = {row["to_commit"]: row for row in found.around_commit(0)}
    assert rows.keys() == around.keys()
    for offset, values in around.items():
        assert rows[offset]["positions"] == len(values)
        assert rows[offset]["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert rows[offset]["active"] == pytest.approx(sum(value > 0 for value in values) / len(values))
    assert max(row["mean"] for row in rows.values()) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, t: feature_lives(r, t, features=[(3, 0)]), r"layer must be in \[0, 3\), got 3"),
        (lambda r, t: feature_lives(r, t, features=[(0, 64)]), r"feature must be in \[0, 64\), got 64"),
        (lambda r, t: feature_lives(r, t, rows=[2]), r"rows must be in \[0, 2\), got 2"),
        (lambda r, t: feature_lives(r, t).by_distance(-1), r"layer must be in \[0, 3\), got -1"),
        (lambda r, t: feature_lives(r, t).rates(3), r"layer must be in \[0, 3\), got 3"),
        (
            lambda r, t: feature_overlap(r, t, k=65),
            r"k must be in \[1, 64\], the features of a layer; got 65",
        ),
        (lambda r, t: feature_overlap(r, t, k=0), r"k must be in \[1, 64\]"),
        (lambda r, t: feature_courses(r, t, [(1, -1)]), r"feature must be in \[0, 64\), got -1"),
        (lambda r, t: feature_courses(r, t, []), "name one or more features to follow"),
        (
            lambda r, t: feature_courses(r, t, [(0, 1)]).around_commit(1),
            r"feature must be in \[0, 1\), got 1",
        ),
    ],
)
def test_what_is_out_of_range_is_named(replacement, trajectory, call, message):
    with pytest.raises(DataError, match=message):
        call(replacement, trajectory)


def test_a_trajectory_without_commits_is_refused(replacement, model):
    start = torch.full((1, 6), model.config.mask_id)
    rewritten = sample(model, start, Sampler(schedule=Rewrite(steps=4)), seed=1)
    with pytest.raises(DataError, match=r"no mask of rows \[0\] was filled"):
        feature_lives(replacement, rewritten)
