"""The probe of t against least squares on stacked rows, and what splitting by sequence guards against."""

import math

import numpy as np
import pytest
import torch

from mdlm_interp.analysis import Rows, probe_states, probe_store, probe_time
from mdlm_interp.analysis.time_probe import is_held_out
from mdlm_interp.errors import DataError
from mdlm_interp.randomness import permutation

N_SEQUENCES, LENGTH, D = 40, 7, 5


@pytest.fixture
def rows():
    """Activations that tell t with noise, and ones that tell nothing."""
    generator = torch.Generator().manual_seed(3)
    t = torch.rand(N_SEQUENCES, generator=generator, dtype=torch.float64)
    sequence = torch.arange(N_SEQUENCES).repeat_interleave(LENGTH)
    noise = torch.randn(len(sequence), 2 * D, generator=generator, dtype=torch.float64)
    times = t[sequence]
    told = 100 + noise[:, :D] * torch.tensor([1.0, 0.2, 5.0, 1.0, 1.0])
    told[:, 1] += 3 * times
    return Rows(acts={"a": told, "b": noise[:, D:]}, t=times, sequence=sequence)


def expected(acts, labels, tested, ridge):
    """R^2 on the rows of each side, by least squares with the penalty as additional rows."""
    acts, labels = acts.numpy(), labels.numpy()
    train, test = ~tested, tested
    mean, scale = acts[train].mean(0), acts[train].std(0)
    x = (acts - mean) / np.where(scale > 0, scale, 1)
    n = train.sum()
    rows = np.concatenate(
        [np.c_[x[train], np.ones(n)], np.c_[math.sqrt(ridge * n) * np.eye(x.shape[1]), np.zeros(x.shape[1])]]
    )
    weights = np.linalg.lstsq(rows, np.r_[labels[train], np.zeros(x.shape[1])], rcond=None)[0]
    found = []
    for side in (train, test):
        error = labels[side] - np.c_[x[side], np.ones(side.sum())] @ weights
        found.append(1 - (error**2).sum() / ((labels[side] - labels[side].mean()) ** 2).sum())
    return found


def sides(sequence, seed=0, fraction=0.3):
    return np.array([is_held_out(seed, int(number), fraction) for number in sequence])


@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_the_closed_form_is_least_squares_with_a_penalty(rows, ridge):
    found = probe_time([rows], ridge=ridge)
    tested = sides(rows.sequence)
    for i, hook in enumerate(("a", "b")):
        train, test = expected(rows.acts[hook], rows.t, tested, ridge)
        assert found.r2_train[i] == pytest.approx(train, abs=1e-9)
        assert found.r2[i] == pytest.approx(test, abs=1e-9)
    assert found.hooks == ("a", "b")
    assert found.n_held_out == len(set(rows.sequence[torch.from_numpy(tested)].tolist()))
    assert found.n_train == N_SEQUENCES - found.n_held_out
    assert found.r2[0] > 0.5 > 0.1 > found.r2[1]


def test_the_baseline_is_the_same_regression_on_permuted_times(rows):
    found = probe_time([rows], n_permutations=3, ridge=0.01, seed=7)
    t = rows.t[::LENGTH]
    for i in range(3):
        order = torch.from_numpy(permutation(7, "time-probe:permuted", i, N_SEQUENCES))
        labels = t[order][rows.sequence]
        _, test = expected(rows.acts["a"], labels, sides(rows.sequence, seed=7), 0.01)
        assert found.r2_permuted[0][i] == pytest.approx(test, abs=1e-9)
    row = found.table()[0]
    assert row["r2_permuted_max"] == max(found.r2_permuted[0])
    assert row["r2_permuted_mean"] == pytest.approx(sum(found.r2_permuted[0]) / 3)
    assert row["r2"] > row["r2_permuted_max"] + 0.5


def test_what_only_names_the_sequence_tells_nothing_about_others():
    sequence = torch.arange(N_SEQUENCES).repeat_interleave(LENGTH)
    t = torch.linspace(0, 1, N_SEQUENCES, dtype=torch.float64)[torch.randperm(N_SEQUENCES)]
    named = torch.nn.functional.one_hot(sequence).double()
    found = probe_time([Rows(acts={"a": named}, t=t[sequence], sequence=sequence)], ridge=1e-6)
    assert found.r2_train[0] > 0.999
    assert found.r2[0] < 0.01


def test_neither_blocks_nor_the_order_of_rows_matter(rows):
    whole = probe_time([rows])
    order = torch.randperm(len(rows.t), generator=torch.Generator().manual_seed(1))
    parts = []
    for part in order.split(23):
        acts = {name: values[part] for name, values in rows.acts.items()}
        parts.append(Rows(acts=acts, t=rows.t[part], sequence=rows.sequence[part]))
    again = probe_time(parts)
    assert again.r2 == pytest.approx(whole.r2, abs=1e-9)
    assert again.r2_train == pytest.approx(whole.r2_train, abs=1e-9)


def test_the_split_depends_on_seed_and_number_alone():
    many = [is_held_out(0, number, 0.3) for number in range(2000)]
    assert 0.26 < sum(many) / 2000 < 0.34
    assert many != [is_held_out(1, number, 0.3) for number in range(2000)]
    assert all(is_held_out(0, number, 0.5) for number in range(2000) if many[number])


class Store:
    """Rows as a capture store gives them."""

    hooks = ("a", "b")

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows.t)

    def read(self, rows, hooks):
        return {name: self._rows.acts[name][rows].float() for name in hooks}

    def coords(self, rows, names):
        held = {"seq": self._rows.sequence.int(), "t": self._rows.t}
        return {name: held[name][rows] for name in names}


def test_a_store_is_read_in_blocks(rows):
    found = probe_store(Store(rows), block_rows=64, ridge=0.1)
    assert found.r2 == pytest.approx(probe_time([rows], ridge=0.1).r2, abs=1e-5)  # the store is float32
    assert probe_store(Store(rows), ["b"]).hooks == ("b",)


def test_states_are_probed_at_every_position(exact, trajectory):
    generator = torch.Generator().manual_seed(2)
    n, length = 24, 6
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    states = torch.randint(0, 40, (n, length), generator=generator)
    states[torch.rand(n, length, generator=generator) < t[:, None]] = exact.config.mask_id
    sigma, sequence = t.float(), torch.arange(n) // 2
    name = "blocks.1.hook_resid_post"
    found = probe_states(exact, states, t, sigma, sequence, name, batch_size=5, ridge=0.1)
    _, cache = exact.run_with_cache(states, name, timesteps=sigma)
    row_sequence = sequence.repeat_interleave(length)
    train, test = expected(
        cache[name].flatten(0, 1).detach(), t.repeat_interleave(length), sides(row_sequence), 0.1
    )
    assert found.r2_train == pytest.approx((train,), abs=1e-9)
    assert found.r2 == pytest.approx((test,), abs=1e-9)
    assert probe_states(exact, states, t, sigma, sequence).hooks == (
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    )


def test_one_t_for_all_held_out_rows_has_no_r2(rows):
    same = Rows(
        acts=rows.acts,
        t=torch.where(torch.from_numpy(sides(rows.sequence)), 0.5, rows.t),
        sequence=rows.sequence,
    )
    assert math.isnan(probe_time([same]).r2[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "ridge must be greater than 0 and finite, got 0.0"),
        ({"held_out": 1.0}, r"held_out must be a share in \(0, 1\), got 1.0"),
        ({"n_permutations": 0}, "n_permutations must be at least 1, got 0"),
        ({"held_out": 1e-9}, "needs 2 sequences to learn from and 1 held out, got 40 and 0"),
    ],
)
def test_a_setting_out_of_range_is_named(rows, settings, message):
    with pytest.raises(DataError, match=message):
        probe_time([rows], **settings)


def test_a_time_that_is_not_known_is_refused(rows):
    t = rows.t.clone()
    t[3] = math.nan
    with pytest.raises(DataError, match="t must be finite to be predicted"):
        probe_time([Rows(acts=rows.acts, t=t, sequence=rows.sequence)])
