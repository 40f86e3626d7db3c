"""Moments are those of all rows of a stratum, to the bit the same whatever batches they came in."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import run_capture, statistics
from capture.statistics import RunningMoments, Strata


@given(
    st.lists(st.integers(1, 40) | st.integers(250, 600), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
)
def test_the_batches_do_not_enter(lengths, seed, at_once):
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    values = (100 + generator.normal(size=(total, 2, 3))).astype(np.float32)
    masked = generator.random(total) < 0.5
    seq = np.repeat(np.arange(len(lengths)), lengths)
    t = generator.random(len(lengths))[seq]
    whole, parts = RunningMoments((2, 3)), RunningMoments((2, 3))
    whole.add(values, Strata.of(masked, t, seq))
    for first in range(0, len(lengths), at_once):
        part = (seq >= first) & (seq < first + at_once)
        parts.add(values[part], Strata.of(masked[part], t[part], seq[part]))
    for name, expected in whole.arrays().items():
        assert np.array_equal(parts.arrays()[name], expected, equal_nan=True), name


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_means_are_those_of_float64(rows, seed):
    generator = np.random.default_rng(seed)
    values = (generator.normal(size=(rows, 5)) * 10.0 ** generator.integers(-3, 4)).astype(np.float32)
    masked, t = generator.random(rows) < 0.5, np.full(rows, 0.37)
    moments = RunningMoments((5,))
    moments.add(values, Strata.of(masked, t, np.zeros(rows, np.int64)))
    found = moments.arrays()
    for which, group in enumerate((~masked, masked)):
        assert found["count"][which, 3] == group.sum()
        if group.any():
            exact = values[group].astype(np.float64)
            scale = np.abs(exact).max()
            np.testing.assert_allclose(
                found["mean"][which, 3], exact.mean(axis=0), rtol=0, atol=1e-14 * scale
            )
            np.testing.assert_allclose(found["mean_square"][which, 3], (exact**2).mean(), rtol=1e-13)


def test_the_last_time_falls_in_the_last_bin():
    moments = RunningMoments((1,))
    times = np.array([1.0, 0.0, 0.1])
    moments.add(np.ones((3, 1), np.float32), Strata.of(np.array([True, False, False]), times, np.arange(3)))
    count, mean = moments.arrays()["count"], moments.arrays()["mean"]
    assert (count[1, 9], count[0, 0], count[0, 1], count.sum()) == (1, 1, 1, 3)
    assert np.array_equal(np.isnan(mean[..., 0]), count == 0)


@pytest.mark.parametrize("size", [3, 16])
def test_stored_statistics_are_those_of_the_stored_rows(config, small_shards, size):
    store = run_capture(replace(config, batch_size=size))
    coords = store.coords(slice(None))
    for hook, acts in store.read(slice(None)).items():
        found = store.statistics(hook)
        for masked in (0, 1):
            for t_bin in range(10):
                rows = (coords["is_masked"] == bool(masked)) & ((coords["t"] * 10).long() == t_bin)
                assert found.count[masked, t_bin] == rows.sum()
                if rows.any():
                    exact = acts[rows].double()
                    assert np.allclose(found.mean[masked, t_bin], exact.mean(0), rtol=0, atol=1e-12)
                    assert np.allclose(found.mean_square[masked, t_bin], exact.square().mean(), rtol=1e-12)


@given(
    st.lists(st.integers(1, 40) | st.integers(250, 1500), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)  # the first call compiles
def test_compiled_sums_have_the_bits_of_the_plain_ones(lengths, size, seed):
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    values = 100 + generator.normal(size=(total, size)) * 10.0 ** generator.integers(-30, 15, (total, 1))
    seq = np.repeat(np.arange(len(lengths)), lengths)
    strata = Strata.of(generator.random(total) < 0.5, generator.random(len(lengths))[seq], seq)
    rows = values.astype(np.float32)
    plain, fast = ((np.ones((20, size)), np.zeros((len(strata.runs), size))) for _ in range(2))
    statistics.add_runs(rows, strata.order, strata.runs, *plain)
    pytest.importorskip("capture.moment_loops").add_runs(rows, strata.order, strata.runs, *fast)
    for one, other in zip(plain, fast, strict=True):
        assert np.array_equal(one, other)


def test_without_numba_the_plain_sums_are_taken(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    called = []
    monkeypatch.setattr(statistics, "add_runs", lambda *arguments: called.append(len(arguments)))
    moments = RunningMoments((1,))
    moments.add(np.ones((3, 1), np.float32), Strata.of(np.ones(3, bool), np.zeros(3), np.arange(3)))
    assert called == [5]
