"""The writer's files are those of zarr-python, and the manifest never speaks of data that is not there."""

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr

from capture import open_store, run_capture
from capture.begin import begin
from capture.manifest import ResumePoint
from capture.places import Directory
from capture.schema import ROW_COLUMNS, SEQUENCE_COLUMNS, Layout
from capture.writer import Rows, StoreWriter
from mdlm_interp.errors import StoreError, WriteError
from tests.capture.interrupts import interrupted

HOOK = "hook_embed"
LENGTH = 7
LAYOUT = Layout(shapes={HOOK: (3,)}, length=LENGTH, shard_rows=16)
ATTRIBUTES = {"config": {"arithmetic": "exact", "positions": "all"}, "provenance": {}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.schema.CHUNK_ROWS", 4)


def writer(root: Path, planned: int = 70) -> StoreWriter:
    place = Directory(root)
    return StoreWriter(place, LAYOUT, begin(place, LAYOUT, ATTRIBUTES, planned, 0, 1))


def opened(store: Path, mode: Literal["r", "r+"] = "r") -> Any:
    """A store as anybody sees it; zarr's types do not tell groups from arrays."""
    return zarr.open_group(store, mode=mode)


def write(building: StoreWriter, *portions: Rows) -> None:
    for portion in portions:
        building.append(portion)
    building.close()


def acts(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop)[:, None] + torch.tensor([0.0, 0.25, 0.5])


def rows(start: int, stop: int) -> Rows:
    """Whole sequences of seven rows."""
    number = np.arange(start, stop)
    values = {
        "seq": number // LENGTH,
        "pos": number % LENGTH,
        "x0": number,
        "xt": number,
        "is_masked": number % 2 == 0,
        "doc": number,
    }
    sequences = np.arange(start // LENGTH, stop // LENGTH)
    columns = {
        name: np.zeros((len(sequences), *((LENGTH,) if column.per_position else ())), column.dtype)
        for name, column in SEQUENCE_COLUMNS.items()
    }
    return Rows(
        start=start,
        acts={HOOK: acts(start, stop)},
        columns=values,
        t=(number // LENGTH) / 10,
        first_sequence=start // LENGTH,
        sequences={**columns, "row": sequences * LENGTH},
        resume=ResumePoint(row=start),
    )


@pytest.mark.parametrize("cuts", [[70], [7, 14, 70], [21, 42, 63, 70], list(range(7, 71, 7))])
def test_rows_are_the_same_however_they_are_appended(tmp_path, cuts):
    building = writer(tmp_path / "a.zarr")
    for start, stop in zip([0, *cuts], cuts, strict=False):
        building.append(rows(start, stop))
    building.close()
    store = open_store(tmp_path / "a.zarr")
    assert torch.equal(store.read(slice(None))[HOOK], acts(0, 70))
    assert torch.equal(store.coords(slice(None))["pos"], torch.arange(70) % LENGTH)
    found = [(shard.rows, shard.sequences) for shard in store.manifest.shards]
    assert found == [
        ((0, 16), (0, 2)),
        ((16, 32), (2, 4)),
        ((32, 48), (4, 6)),
        ((48, 64), (6, 9)),
        ((64, 70), (9, 10)),
    ]
    count = store.statistics(HOOK).count
    assert [int(count.sum()), int(count[1].sum())] == [70, 35]


VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": "float16", "hooks": ("blocks.*.attn.hook_z", "blocks.0.ln1.hook_scale")},
    {"dtype": "bfloat16", "positions": "masked"},
)


def test_the_files_are_those_that_zarr_python_writes(config, tmp_path):
    for number, changes in enumerate(VARIATIONS):
        made = run_capture(replace(config, shard_rows=256, out=str(tmp_path / f"{number}.zarr"), **changes))
        ours = made.path
        again = tmp_path / f"{number}.again"
        shutil.copytree(
            ours, again, ignore=lambda _, names: [name for name in names if name.startswith("c.")]
        )
        source, target = opened(ours), opened(again, "r+")
        compared = 0
        for folder in ("acts", "rows", "seqs", "stats"):
            for name, array in source[folder].members(max_depth=None):
                if isinstance(array, zarr.Array):
                    path = f"{folder}/{name}"
                    target[path].with_config({"write_empty_chunks": True})[...] = array[...]
                    files = {file.name: file.read_bytes() for file in (ours / path).iterdir()}
                    assert files == {file.name: file.read_bytes() for file in (again / path).iterdir()}, path
                    compared += len(files)
        assert compared > 40


def test_what_was_never_written_reads_as_nan_to_everybody(tmp_path):
    building = writer(tmp_path / "a.zarr", planned=200)
    building.append(rows(0, 14))
    building.append(rows(14, 21))
    building.close()
    plain = opened(tmp_path / "a.zarr")
    assert plain[f"acts/{HOOK}"].shape == (200, 3)
    assert np.array_equal(plain[f"acts/{HOOK}"][:21], acts(0, 21).numpy())
    assert np.isnan(plain[f"acts/{HOOK}"][21:]).all()
    assert (plain["rows/x0"][21:] == -1).all()


def test_a_capture_that_outgrows_its_forecast_tells_other_readers(tmp_path):
    building = writer(tmp_path / "a.zarr", planned=20)
    building.append(rows(0, 70))
    building.close()
    plain = opened(tmp_path / "a.zarr")
    assert plain[f"acts/{HOOK}"].shape[0] >= 70
    assert plain["rows/x0"].shape == (plain[f"acts/{HOOK}"].shape[0],)
    assert np.array_equal(plain[f"acts/{HOOK}"][:70], acts(0, 70).numpy())


def test_a_shard_counts_only_once_its_manifest_is_written(tmp_path, monkeypatch):
    building = writer(tmp_path / "a.zarr")
    building.append(rows(0, 21))
    original = Directory.replace
    written: list[str] = []

    def failing(self, path, content):
        written.append(path)
        if len(written) == 2:
            raise WriteError("no space")
        original(self, path, content)

    monkeypatch.setattr(Directory, "replace", failing)
    with pytest.raises(WriteError, match="no space"):
        write(building, rows(21, 42))
    monkeypatch.undo()
    # The second shard's files are there; nobody vouches for them.
    assert (tmp_path / "a.zarr" / "acts" / HOOK / "c.1.0").is_file()
    store = open_store(tmp_path / "a.zarr")
    assert len(store) == 16
    assert torch.equal(store.read(slice(None))[HOOK], acts(0, 16))


def test_data_is_synced_then_named_then_listed(tmp_path, monkeypatch):
    building = writer(tmp_path / "a.zarr")
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", target.relative_to(tmp_path / "a.zarr").as_posix()))
        fsync(descriptor)

    def renaming(source: Path, target: Path) -> None:
        events.append(("name", Path(target).relative_to(tmp_path / "a.zarr").as_posix()))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    building.append(rows(0, 14))
    building.append(rows(14, 21))
    while not any(name == "manifest.json" for _, name in events):
        pass
    building.abandon()
    files = [f"acts/{HOOK}/c.0.0", *(f"rows/{name}/c.0" for name in ROW_COLUMNS), "pending/0.safetensors"]
    order = {event: number for number, event in reversed(list(enumerate(events)))}
    listed = order["name", "manifest.json"]
    for file in files:
        assert order["sync", file + ".partial"] < order["name", file] < listed, file
        folder = str(Path(file).parent)
        named_in_folder = max(
            number for (what, name), number in order.items() if what == "name" and name == file
        )
        assert any(
            what == "sync" and name == folder and named_in_folder < number < listed
            for number, (what, name) in enumerate(events)
        ), file


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
    building = writer(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=message):
        write(building, replace(rows(0, 7), acts={HOOK: values}))


def test_rows_out_of_order_are_refused(tmp_path):
    building = writer(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=r"row 14 came where 7 was due"):
        write(building, rows(0, 7), rows(14, 21))


@pytest.mark.parametrize("slow", ["_write", "_publish"])
def test_a_close_that_is_interrupted_leaves_no_thread_and_the_next_writer_goes_on(
    tmp_path, monkeypatch, slow
):
    at_work, gate, original = threading.Event(), threading.Event(), getattr(StoreWriter, slow)

    def waiting(self, job):
        at_work.set()
        gate.wait(20)
        original(self, job)

    monkeypatch.setattr(StoreWriter, slow, waiting)
    before = set(threading.enumerate())
    building = writer(tmp_path / "a.zarr")
    for start in (0, 7, 14):
        building.append(rows(start, start + 7))
    with pytest.raises(KeyboardInterrupt), interrupted(at_work=at_work, then=gate.set):
        building.close()
    begun = set(threading.enumerate()) - before
    assert [thread.name for thread in begun if thread.name.startswith("capture-")] == []
    assert len(open_store(tmp_path / "a.zarr")) == (16 if slow == "_publish" else 0)
    write(writer(tmp_path / "a.zarr"), rows(0, 70))
    assert torch.equal(open_store(tmp_path / "a.zarr").read(slice(None))[HOOK], acts(0, 70))
