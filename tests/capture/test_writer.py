"""The writer takes exactly the planned rows, and the manifest never speaks of data that is not there."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capture import open_store
from capture.schema import CHUNK_ROWS, ROW_COLUMNS, SHARD_ROWS, Layout
from capture.statistics import RunningMoments
from capture.writer import StoreWriter
from mdlm_interp.errors import StoreError

HOOK = "hook_embed"


def writer(root: Path, n_sequences: int = 10, length: int = 7) -> StoreWriter:
    t = np.linspace(0, 1, n_sequences)
    sequences = {
        "t": t,
        "sigma": t,
        "seed": np.zeros(n_sequences, np.uint64),
        "source": np.zeros(n_sequences, np.int64),
        "offset": np.zeros(n_sequences, np.int64),
    }
    layout = Layout(shapes={HOOK: (3,)}, n_sequences=n_sequences, length=length)
    return StoreWriter(root, layout, attributes={"config": {}, "provenance": {}}, sequences=sequences)


def columns(start: int, stop: int, length: int = 7) -> dict[str, torch.Tensor]:
    rows = torch.arange(start, stop)
    masked = rows % 2 == 0
    return {
        "seq": rows // length,
        "pos": rows % length,
        "x0": rows,
        "xt": rows,
        "is_masked": masked,
        "doc": rows,
    }


def acts(start: int, stop: int) -> dict[str, torch.Tensor]:
    return {HOOK: torch.arange(start, stop)[:, None] + torch.tensor([0.0, 0.25, 0.5])}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.schema.CHUNK_ROWS", 4)
    monkeypatch.setattr("capture.schema.SHARD_ROWS", 16)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    "cuts", [[70], [1, 2, 70], [16, 32, 70], [15, 17, 33, 70], [50, 70], list(range(71))]
)
def test_rows_are_the_same_however_they_are_appended(tmp_path, cuts):
    building = writer(tmp_path / "a.zarr")
    for start, stop in zip([0, *cuts], cuts, strict=False):
        building.append(acts(start, stop), columns(start, stop))
    building.finish()
    store = open_store(tmp_path / "a.zarr")
    assert torch.equal(store.read(slice(None))[HOOK], acts(0, 70)[HOOK])
    assert torch.equal(store.coords(slice(None))["pos"], torch.arange(70) % 7)
    assert [shard.rows for shard in store.manifest.shards] == [
        (0, 16),
        (16, 32),
        (32, 48),
        (48, 64),
        (64, 70),
    ]


@pytest.mark.usefixtures("small_shards")
def test_a_shard_counts_only_once_its_commit_is_written(tmp_path, monkeypatch):
    building = writer(tmp_path / "a.zarr")
    building.append(acts(0, 20), columns(0, 20))
    assert len(open_store(tmp_path / "a.zarr")) == 14

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("capture.writer.write_manifest", fail)
    with pytest.raises(OSError, match="No space left"):
        building.append(acts(20, 40), columns(20, 40))
    # The second shard's files are there; nobody vouches for them.
    assert (tmp_path / "a.zarr" / "acts" / HOOK / "c" / "1" / "0").is_file()
    store = open_store(tmp_path / "a.zarr")
    assert len(store) == 14
    assert torch.equal(store.read(slice(None))[HOOK], acts(0, 14)[HOOK])


@pytest.mark.usefixtures("small_shards")
def test_data_is_synced_before_the_manifest_that_speaks_of_it(tmp_path, monkeypatch):
    import capture.manifest as manifest

    events: list[str] = []
    sync, replace = manifest.sync, os.replace

    def noting(path: Path) -> None:
        events.append(path.relative_to(tmp_path / "a.zarr").as_posix())
        sync(path)

    def replacing(source: Path, target: Path) -> None:
        # zarr-python renames files of its own.
        if target.name == manifest.MANIFEST:
            events.append("replace")
        replace(source, target)

    building = writer(tmp_path / "a.zarr")
    monkeypatch.setattr(manifest, "sync", noting)
    monkeypatch.setattr("os.replace", replacing)
    building.append(acts(0, 16), columns(0, 16))
    expected = {f"acts/{HOOK}/c/0/0", f"acts/{HOOK}/c/0", f"acts/{HOOK}/c", f"acts/{HOOK}"}
    expected |= {f"rows/{name}{part}" for name in ROW_COLUMNS for part in ("/c/0", "/c", "")}
    assert expected <= set(events[:-3])
    assert events[-3:] == ["manifest.json.partial", "replace", "."]


def test_more_or_fewer_rows_than_planned_are_refused(tmp_path):
    building = writer(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="was planned with 70 rows, and more were appended"):
        building.append(acts(0, 71), columns(0, 71))
    building.append(acts(0, 69), columns(0, 69))
    with pytest.raises(StoreError, match="was planned with 70 rows, got 69"):
        building.finish()
    assert not open_store(tmp_path / "a.zarr").complete


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.zeros(7, 3, dtype=torch.float64),
            r"acts/hook_embed got float64 \[7, 3\], expected float32 \[7, 3\]",
        ),
        (torch.zeros(7, 1), r"acts/hook_embed got float32 \[7, 1\], expected float32 \[7, 3\]"),
        (torch.zeros(6, 3), r"acts/hook_embed got float32 \[6, 3\], expected float32 \[7, 3\]"),
    ],
)
def test_values_are_never_converted_or_broadcast(tmp_path, values, message):
    with pytest.raises(StoreError, match=message):
        writer(tmp_path / "a.zarr").append({HOOK: values}, columns(0, 7))


@given(st.integers(1, 5000), st.integers(1, 2000))
def test_a_shard_is_whole_chunks_and_no_larger_than_the_run_needs(n_sequences, length):
    layout = Layout(shapes={HOOK: (3,)}, n_sequences=n_sequences, length=length)
    assert layout.shard_rows % CHUNK_ROWS == 0
    assert layout.shard_rows <= SHARD_ROWS
    assert layout.shard_rows < layout.rows + CHUNK_ROWS
    assert layout.total_bytes >= layout.rows * (12 + 41)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_moments_of_blocks_are_the_moments_of_the_whole(sizes, seed):
    generator = np.random.default_rng(seed)
    total = sum(sizes)
    values = (100 + generator.normal(size=(total, 2, 3))).astype(np.float32)
    masked, t = generator.random(total) < 0.5, generator.random(total)
    blocks, whole = RunningMoments((2, 3)), RunningMoments((2, 3))
    whole.add(values, masked, t)
    start = 0
    for size in sizes:
        blocks.add(values[start : start + size], masked[start : start + size], t[start : start + size])
        start += size
    for name, expected in whole.arrays().items():
        np.testing.assert_allclose(blocks.arrays()[name], expected, rtol=1e-12)


def test_the_last_time_falls_in_the_last_bin():
    moments = RunningMoments((1,))
    moments.add(np.ones((3, 1), np.float32), np.array([True, False, False]), np.array([1.0, 0.0, 0.1]))
    count, mean = moments.arrays()["count"], moments.arrays()["mean"]
    assert (count[1, 9], count[0, 0], count[0, 1], count.sum()) == (1, 1, 1, 3)
    assert np.array_equal(np.isnan(mean[..., 0]), count == 0)
