"""Of a store that is being written, what is committed reads right and nothing else is there."""

import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from capture.describe import hook_lines, strata
from capture.manifest import to_bytes
from capture.places import Directory
from capture.reader import ActivationStore
from capture.schema import STATISTICS
from capture.store_files import StoreFiles
from mdlm_interp.errors import StoreError
from tests.capture.reader.opening import SHARD_ROWS
from tests.capture.stores import (
    LENGTH,
    MLP,
    Elsewhere,
    Plan,
    make_store,
    write_manifests,
)


@pytest.mark.parametrize("shards", [1, 3])
def test_statistics_of_an_incomplete_store_are_those_of_its_committed_rows(tmp_path, opened, shards):
    plan = Plan(complete=False, shard_rows=256, committed_shards=shards)
    truth = make_store(tmp_path / "run.zarr", plan)
    acts = truth.acts[MLP][: 256 * shards].astype(np.float64)
    count, mean, mean_square = opened(truth.root).statistics(MLP).pooled()
    assert count == 256 * shards
    np.testing.assert_allclose(mean.numpy(), acts.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mean_square, (acts**2).mean(), rtol=1e-12)


def test_what_is_pending_is_read_once_for_the_statistics_of_all_hooks(tmp_path, opened, monkeypatch):
    """Exact: reads are counted, and the bits are those of sums merged shard after shard."""
    truth = make_store(tmp_path / "run.zarr", Plan(complete=False, shard_rows=256))
    original, reads = Directory.read, Counter[str]()

    def counting(place: Directory, path: str) -> bytes | None:
        reads[path] += 1
        return original(place, path)

    monkeypatch.setattr(Directory, "read", counting)
    store = opened(truth.root)
    assert len(strata(store)) == 10
    assert len(hook_lines(store)) == len(store.hooks) == 3
    for hook, moments in truth.moments.items():
        for name in STATISTICS:
            # What a caller does with them is the caller's own.
            getattr(store.statistics(hook), name).zero_()
            found = getattr(store.statistics(hook), name).numpy()
            assert np.array_equal(found, moments.arrays()[name], equal_nan=True), (hook, name)
    pending = {path: count for path, count in reads.items() if path.startswith("pending/")}
    assert pending == {f"pending/{number}.safetensors": 1 for number in range(4)}


def test_only_committed_rows_are_read(partial, opened):
    store = opened(partial.root)
    complete = int((np.append(partial.sequences["row"][1:], len(partial.t)) <= SHARD_ROWS).sum())
    assert (len(store), store.n_sequences, store.complete) == (SHARD_ROWS, complete, False)
    assert partial.columns["seq"][SHARD_ROWS - 1] == complete, "a sequence should lie across the end"
    assert np.array_equal(store.read(slice(None), MLP)[MLP].numpy(), partial.acts[MLP][:SHARD_ROWS])
    assert np.array_equal(store.times().numpy(), partial.sequences["t"][:complete])
    for found, name in zip(store.tokens(), ("x0", "xt"), strict=True):
        assert np.array_equal(found.numpy(), partial.sequences[name][:complete])
    with pytest.raises(StoreError, match=r"got 512; the store is incomplete, 512 of 886 rows are committed"):
        store.read([SHARD_ROWS])
    ends = partial.sequences["row"][complete - 1 : complete + 1]
    assert store.sequence_rows(complete - 1) == slice(int(ends[0]), int(ends[1]))
    with pytest.raises(StoreError, match=rf"sequences are in \[0, {complete}\)"):
        store.sequence_rows(complete)


def test_the_time_of_a_sequence_that_is_not_committed_whole_is_not_known(partial, opened):
    store = opened(partial.root)
    t = store.coords(slice(None))["t"].numpy()
    known = partial.columns["seq"][:SHARD_ROWS] < store.n_sequences
    assert 0 < known.sum() < SHARD_ROWS
    assert np.array_equal(t[known], partial.t[:SHARD_ROWS][known])
    assert np.isnan(t[~known]).all()


def test_the_times_of_a_few_rows_take_no_memory_for_those_of_all_sequences(partial, monkeypatch):
    """Bounded: a copy of the times of all sequences, 8 MB here, would be made for every few rows."""
    times, original = np.random.default_rng(0).random(10**6), StoreFiles.sequence_column

    def column(files: StoreFiles, name: str) -> np.ndarray:
        return times if name == "t" else original(files, name)

    monkeypatch.setattr(StoreFiles, "sequence_column", column)
    store = ActivationStore(Elsewhere(partial.root))
    store.coords([0])
    tracemalloc.start()
    try:
        found = store.coords([3, 500])["t"].numpy()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, times[partial.columns["seq"][[3, 500]]])
    assert peak < 10**6, peak


@pytest.mark.parametrize("committed", [0, 1])
def test_a_store_opens_whatever_is_committed(tmp_path, opened, committed):
    truth = make_store(tmp_path / "run.zarr", Plan(complete=False, committed_shards=committed))
    store = opened(truth.root)
    assert len(store) == committed * SHARD_ROWS
    assert store.read(slice(None), MLP)[MLP].shape == (len(store), 5)
    assert store.tokens()[0].shape == (store.n_sequences, LENGTH)
    assert store.coords([])["t"].shape == (0,)
    assert store.statistics(MLP).count.sum() == len(store)
    assert len(store.fingerprint()) == 64


def test_ranks_that_are_writing_are_read_up_to_the_first_gap(tmp_path, opened):
    truth = make_store(tmp_path / "run.zarr", Plan(shard_rows=256, complete=False))
    shards = truth.manifest.shards
    assert len(shards) == 4
    (truth.root / "manifest.json").unlink()
    write_manifests(truth.root, truth.manifest, world_size=3)
    assert len(opened(truth.root)) == 886
    write_manifests(
        truth.root, replace(truth.manifest, shards=(shards[0], shards[1], shards[3])), world_size=3
    )
    store = opened(truth.root)
    assert len(store) == 512
    assert np.array_equal(store.read(slice(None), MLP)[MLP].numpy(), truth.acts[MLP][:512])
    assert store.n_sequences == shards[1].sequences[1] == len(store.times())


def test_a_manifest_that_replaces_those_of_ranks_meanwhile_is_found(made, copy):
    class Moving(Elsewhere):
        """Its manifest appears between a look at the names and the reading."""

        looks = 0

        def names(self, directory: str = "") -> list[str]:
            self.looks += 1
            return ["manifest.rank-0-of-2.json"] if self.looks == 1 else ["manifest.json", "zarr.json"]

    (copy / "manifest.json").write_bytes(to_bytes(made.manifest))
    assert len(ActivationStore(Moving(copy))) == 886


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_lost_manifest_of_a_rank_is_noticed(tmp_path, opened, rank):
    """Without it, the rows of that rank would read as if they had never been committed."""
    truth = make_store(tmp_path / "run.zarr", Plan(complete=False, shard_rows=256))
    (truth.root / "manifest.json").unlink()
    write_manifests(truth.root, truth.manifest, 3)
    assert len(opened(truth.root)) == len(truth.t)
    (truth.root / f"manifest.rank-{rank}-of-3.json").unlink()
    with pytest.raises(
        StoreError, match=rf"run\.zarr/manifest\.rank-{rank}-of-3\.json is missing; restore it"
    ):
        opened(truth.root)
