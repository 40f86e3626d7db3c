"""How fast a store is read: warm blocks ÷ a memory map, scattered rows from a cold disk ÷ zarr-python.

One hook's activations lie on disk twice, as a store and as one raw float32 matrix. Both sides of a figure run
in one process on one thread in turns, the order swapped every round; a figure is the ratio of the median wall
times, above 1 if the store is faster, with that of CPU times beside it, which a busy machine disturbs less
and which do not count waiting for the disk. What is read is compared first.

- blocks: 256 consecutive rows, in random order, everything in the page cache. Every chunk was read once
  before, as in a training run after its first epoch, so that no checksum is computed; "first touch" is a store
  just opened, which computes all of them.
- slice: all rows in order, 4,096 at a time.
- gather: 4,096 rows from anywhere, ascending as `memmap[rows]` likes them; cold and warm.
- epoch: a shuffled epoch by `ShuffledRows`, batches of 4,096 rows, against blocks from the memory map.

Cold means that the files were fsynced and the kernel was told to drop their pages (POSIX_FADV_DONTNEED); the
share of pages that stayed is measured and shown. It does not empty caches below the kernel, such as a
virtual disk's. Nothing timed is asserted.

    python tests/benchmarks/bench_store_reads.py [--rows N] [--rounds N] [--directory DIR]
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from capture import open_store, schema
from capture.iteration import ShuffledRows
from capture.manifest import Manifest, ResumePoint, Shard, to_bytes
from capture.reader import ActivationStore
from capture.shards import ShardEncoder, column_chunk

HOOK = "blocks.0.hook_resid_post"
BLOCK = 256
SLICE = 4096
SEQUENCE = 1024
"""Tokens; every one is a row."""


@dataclass(frozen=True)
class Case:
    """What to measure."""

    rows: int
    width: int
    shard_rows: int
    scattered: int
    """Rows of a gather."""
    rounds: int


SMOKE = Case(rows=3000, width=8, shard_rows=1024, scattered=50, rounds=1)


@dataclass(frozen=True)
class Files:
    """The same matrix twice."""

    root: Path
    """The store."""
    raw: Path
    shape: tuple[int, int]

    @property
    def shards(self) -> list[Path]:
        """The store's files of the hook."""
        return sorted((self.root / "acts" / HOOK).glob("c.*"))

    def mapped(self) -> NDArray[np.float32]:
        """A new map of the raw matrix."""
        return np.memmap(self.raw, np.float32, "r", shape=self.shape)


Times = dict[str, tuple[float, float]]
"""By side: median wall and CPU seconds."""


def make(directory: Path, case: Case) -> Files:
    """Write both."""
    root, raw_file = directory / "run.zarr", directory / "raw.f32"
    layout = schema.Layout(shapes={HOOK: (case.width,)}, length=SEQUENCE, shard_rows=case.shard_rows)
    attributes = {"format": schema.FORMAT, "schema_version": schema.SCHEMA_VERSION, "hooks": [HOOK]}
    given = {"dtype": "float32", "config": {"positions": "all"}, "provenance": {}}
    group = zarr.create_group(root, attributes={**attributes, **given})
    schema.create_row_arrays(group, layout, case.rows)
    rng = np.random.default_rng(0)
    shards = []
    with raw_file.open("wb") as raw:
        for number, start in enumerate(range(0, case.rows, case.shard_rows)):
            rows = np.arange(start, min(start + case.shard_rows, case.rows))
            encoder = ShardEncoder(layout.shard_shape(HOOK))
            acts = rng.standard_normal((len(rows), case.width), np.float32)
            raw.write(acts.tobytes())
            pieces = [*encoder.encode(acts), *encoder.finish()]
            write(
                root / schema.file_of(f"acts/{HOOK}", 2, number), b"".join(bytes(piece) for piece in pieces)
            )
            columns = {"seq": rows // SEQUENCE, "pos": rows % SEQUENCE}
            for name, column in schema.ROW_COLUMNS.items():
                values = columns.get(name, np.zeros(len(rows))).astype(column.dtype)
                content = column_chunk(values, case.shard_rows, column.fill)[0]
                write(root / schema.file_of(f"rows/{name}", 1, number), content)
            spans = {"rows": (int(rows[0]), int(rows[-1]) + 1), "sequences": (0, -(-case.rows // SEQUENCE))}
            shards.append(Shard(**spans, sha256="", pending=0, not_finite=0, resume=ResumePoint()))
        os.fsync(raw.fileno())
    for name in schema.SEQUENCE_COLUMNS:
        array = schema.create_sequence_array(group, name, -(-case.rows // SEQUENCE), SEQUENCE)
        array[...] = np.zeros(array.shape)
    manifest = Manifest(
        length=SEQUENCE,
        shard_rows=case.shard_rows,
        planned_rows=case.rows,
        complete=True,
        shards=tuple(shards),
    )
    (root / "manifest.json").write_bytes(to_bytes(manifest))
    return Files(root, raw_file, (case.rows, case.width))


def write(path: Path, content: bytes) -> None:
    """Write and fsync: pages that are not on disk yet cannot be dropped."""
    with path.open("wb") as stream:
        stream.write(content)
        os.fsync(stream.fileno())


def drop(files: Files) -> None:
    """Ask the kernel to forget both; only pages that nobody has mapped go."""
    for path in [*files.shards, files.raw]:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def share_in_memory(paths: list[Path]) -> float:
    """Share of places in these files that can be read without the disk."""
    found = []
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        for offset in range(0, path.stat().st_size, 2**20):
            try:
                os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
                found.append(1)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
                found.append(0)
        os.close(descriptor)
    return sum(found) / len(found)


def turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Median seconds of each side, in turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        order.reverse()
    return medians(times)


def medians(times: Mapping[str, list[tuple[float, float]]]) -> Times:
    """Of wall and CPU seconds apart."""
    columns = {name: list(zip(*values, strict=True)) for name, values in times.items()}
    return {name: (median(wall), median(cpu)) for name, (wall, cpu) in columns.items()}


def blocks(files: Files, store: ActivationStore, case: Case) -> dict[str, Times]:
    """Shuffled blocks and slices in order, warm."""
    raw = files.mapped()
    starts = np.random.default_rng(1).permutation(case.rows // BLOCK) * BLOCK

    def from_store(store: ActivationStore) -> None:
        for start in starts.tolist():
            store.read(slice(start, start + BLOCK), HOOK)

    def from_map() -> None:
        for start in starts.tolist():
            torch.from_numpy(np.array(raw[start : start + BLOCK]))

    def in_order(read: Callable[[int, int], object]) -> None:
        for start in range(0, case.rows, SLICE):
            read(start, min(start + SLICE, case.rows))

    def epoch() -> None:
        for _ in shuffled:
            pass

    from_map()  # brings all of the map into the page table
    whole = store.read(slice(None), HOOK)[HOOK]
    assert np.array_equal(whole.numpy(), raw)
    del whole
    sides = {"map": from_map, "store": lambda: from_store(store)}
    shuffled = ShuffledRows(store, hooks=HOOK, batch_size=SLICE)
    return {
        "blocks": turns(sides, case.rounds),
        "blocks, first touch": turns(
            {"map": from_map, "store": lambda: from_store(open_store(files.root))}, case.rounds
        ),
        "slice": turns(
            {
                "map": lambda: in_order(lambda a, b: torch.from_numpy(np.array(raw[a:b]))),
                "store": lambda: in_order(lambda a, b: store.read(slice(a, b), HOOK)),
            },
            case.rounds,
        ),
        "epoch": turns({"map": from_map, "store": epoch}, max(1, case.rounds // 2)),
    }


def gathers(files: Files, store: ActivationStore, case: Case) -> tuple[dict[str, Times], float]:
    """Scattered rows, warm and cold; and the share of pages that were in memory before a cold read."""
    rng = np.random.default_rng(2)
    array = zarr.open_array(files.root, path=f"acts/{HOOK}", mode="r")
    assert isinstance(array, zarr.Array)
    rows = np.sort(rng.choice(case.rows, case.scattered, replace=False))
    assert np.array_equal(store.gather(rows, HOOK)[HOOK].numpy(), array.oindex[rows])
    found = {"gather, warm": warm_gathers(files, store, array, rows, case)}
    times: dict[str, list[tuple[float, float]]] = {"zarr": [], "map": [], "store": []}
    kept = []
    for _ in range(case.rounds):
        rows = np.sort(rng.choice(case.rows, case.scattered, replace=False))
        fresh = open_store(files.root)
        fresh.row_shape(HOOK)  # the manifest and the metadata are read, no row is
        sides: dict[str, Callable[[], object]] = {
            "zarr": partial(array.oindex.__getitem__, rows),
            "map": partial(gather_from_map, files, rows),
            "store": partial(fresh.gather, rows, HOOK),
        }
        for name, side in sides.items():
            drop(files)
            kept.append(share_in_memory([*files.shards, files.raw]))
            times[name].append(turns({name: side}, 1)[name])
    return {**found, "gather, cold": medians(times)}, max(kept)


def warm_gathers(
    files: Files, store: ActivationStore, array: zarr.Array, rows: NDArray[np.int64], case: Case
) -> Times:
    """The same rows again and again. The map ends with this function: what is mapped cannot be dropped."""
    raw = files.mapped()
    sides: dict[str, Callable[[], object]] = {
        "map": lambda: torch.from_numpy(raw[rows]),
        "zarr": lambda: array.oindex[rows],
        "store": lambda: store.gather(rows, HOOK),
    }
    return turns(sides, 2 * case.rounds + 1)


def gather_from_map(files: Files, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """By a new map."""
    return np.array(files.mapped()[rows])


def measure(case: Case, directory: Path) -> tuple[dict[str, Times], float]:
    """Seconds of every side, by figure; and the share of pages in memory before a cold read."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        files = make(directory, case)
        store = open_store(files.root)
        found = blocks(files, store, case)
        gathered, kept = gathers(files, store, case)
    finally:
        torch.set_num_threads(threads)
    return {**found, **gathered}, kept


@pytest.mark.benchmark
def test_the_benchmark_runs_and_both_sides_agree(tmp_path):
    """Behavioural, at a size that says nothing about speed."""
    found, kept = measure(SMOKE, tmp_path)
    assert set(found) >= {"blocks", "slice", "epoch", "gather, warm", "gather, cold"}
    assert all(side[0] > 0 for times in found.values() for side in times.values())
    assert 0 <= kept <= 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2**18, help="of 768 values (default: 0.8 GB, twice)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary one)")
    options = parser.parse_args()
    case = Case(rows=options.rows, width=768, shard_rows=16384, scattered=4096, rounds=options.rounds)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found, kept = measure(case, Path(directory))
    sys.stdout.write(f"{'figure':20} {'store rows/s':>13} {'other rows/s':>13}  store ÷ other, CPU\n")
    ratios = {}
    for name, times in found.items():
        rows = case.scattered if name.startswith("gather") else case.rows
        for other in (side for side in ("map", "zarr") if side in times):
            wall, cpu = (times[other][i] / times["store"][i] for i in (0, 1))
            ratios[f"{name} vs {other}"] = {"wall": wall, "cpu": cpu}
            speeds = f"{rows / times['store'][0]:13,.0f} {rows / times[other][0]:13,.0f}"
            sys.stdout.write(f"{name:20} {speeds}  {wall:8.2f} x {other:4} {cpu:6.2f}\n")
    sys.stdout.write(f"share of pages in memory before a cold read: {kept:.3f}\n")
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    report = {"benchmark": "store_reads", "threads": 1, **vars(case), **machine, "seconds": found}
    sys.stdout.write(json.dumps({**report, "ratios": ratios, "in_memory": kept}) + "\n")


if __name__ == "__main__":
    main()
