"""Rows/s of a transcoder's training batches from a store ÷ those that training steps consume, on one thread.

- trained: `Trainer.step` on a batch that is there already.
- alone: `StoreBatches.batch` one after another, nothing between them: what the loader gives at most.
- beside: the same with a step of training after each, in which the next window is read; what training waits for.

Each is measured cold and warm. Cold: the kernel was told to drop the store's files (POSIX_FADV_DONTNEED), no chunk was
compared with its checksum before, and no window is read twice; what stayed in memory is measured and shown. It does not
empty caches below the kernel, such as a virtual disk's. Warm: the same batches once more. "raw" reads the same files
from end to end, in blocks of 1 MiB, cold again: what the disk gave in that minute. Nothing timed is asserted.

    python tests/benchmarks/bench_clt_loader.py STORE [--features N] [--k N] [--batch N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
import torch

from capture import ActivationStore, open_store
from mdlm_interp.errors import DataError
from transcoder.batches import Batch, Batches
from transcoder.config import CLTRunConfig
from transcoder.model import CrossLayerTranscoder
from transcoder.sources import StoreSource
from transcoder.train_config import TrainConfig
from transcoder.trainer import Trainer

RAW_BLOCK = 2**20
PROBES = 16
"""Places of a file at which it is asked whether they are in memory."""


class Given:
    """One batch, whatever the step."""

    def __init__(self, batch: Batch) -> None:
        self.given = batch

    def batch(self, step: int, own: range | None = None) -> Batch:
        """That batch."""
        return self.given

    def cursor(self, step: int) -> dict[str, int]:
        """Nothing to say."""
        return {}


def files_of(path: Path) -> list[Path]:
    """The store's files of activations."""
    return sorted(file for file in (path / "acts").rglob("*") if file.is_file() and file.suffix != ".json")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor for a moment."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def drop(files: list[Path]) -> float:
    """Write files to the disk and have the kernel forget them; the share that stays in memory."""
    probed = stayed = 0
    for path in files:
        with opened(path) as descriptor:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(descriptor).st_size
            for offset in range(0, size, max(1, size // PROBES)):
                probed += 1
                try:
                    stayed += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
    return stayed / max(1, probed)


def raw_bytes_per_s(files: list[Path]) -> float:
    """Of reading files from end to end."""
    buffer, done = bytearray(RAW_BLOCK), 0
    start = time.perf_counter()
    for path in files:
        with opened(path) as descriptor:
            offset = 0
            while got := os.preadv(descriptor, [buffer], offset):
                offset += got
            done += offset
    return done / (time.perf_counter() - start)


def loading(batches: Batches, steps: int, trainer: Trainer, given: Given) -> tuple[float, list[float]]:
    """Seconds that all batches took, and each step of training after one; without a trainer's turn none."""
    waited, training = 0.0, []
    for number in range(steps):
        start = time.perf_counter()
        given.given = batches.batch(number)
        loaded = time.perf_counter()
        trainer.step()
        waited += loaded - start
        training.append(time.perf_counter() - loaded)
    return waited, training


def alone(batches: Batches, steps: int) -> float:
    """Seconds that all batches took."""
    start = time.perf_counter()
    for number in range(steps):
        batches.batch(number)
    return time.perf_counter() - start


def measure(path: Path, n_features: int, k: int, batch: int, steps: int) -> dict[str, float]:
    """Rows/s of each, and the ratios to training; the raw disk in rows/s of the same size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = TrainConfig(steps=steps, batch_size=batch)
    config = CLTRunConfig(store=path, out=Path("unused"), n_features=n_features, k=k, train=settings)
    files, found = files_of(path), {}

    def fresh() -> tuple[ActivationStore, Batches]:
        store = open_store(path)
        source = StoreSource(store, config)
        return store, source.batches(config.shape(*source.dimensions))

    store, batches = fresh()
    if batches.cursor(steps - 1)["epoch"]:
        raise DataError(f"{steps} batches of {batch} rows are more than an epoch of the store; lower --steps")
    found["stayed_in_memory"] = drop(files)
    row_bytes = sum(file.stat().st_size for file in files) / len(store)
    found["raw_rows_per_s"] = raw_bytes_per_s(files) / row_bytes
    given = Given(batches.batch(0))
    source = StoreSource(store, config)
    trainer = Trainer(CrossLayerTranscoder(config.shape(*source.dimensions)), given, settings)
    trainer.step()
    training: list[float] = []
    for name in ("alone", "beside"):
        _, batches = fresh()
        drop(files)
        for state in ("cold", "warm"):
            if name == "alone":
                seconds = alone(batches, steps)
            else:
                seconds, steps_took = loading(batches, steps, trainer, given)
                training += steps_took
            found[f"{state}_{name}_rows_per_s"] = batch * steps / seconds
    found["trained_rows_per_s"] = batch / median(training)
    torch.set_num_threads(threads)
    rates = [name for name in found if name.endswith("_rows_per_s") and not name.startswith("trained")]
    return found | {
        f"{name.removesuffix('_rows_per_s')}_ratio": found[name] / found["trained_rows_per_s"]
        for name in rates
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    figures = measure(given.store, given.features, given.k, given.batch, given.steps)
    sys.stdout.write(json.dumps({"benchmark": "clt_loader", **vars(given), **figures}, default=str) + "\n")


@pytest.mark.benchmark
def test_both_sides_run(tmp_path: Path) -> None:
    from capture import CaptureConfig, run_capture

    # Texts that share no eight tokens, so that some are held out.
    draw = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(draw.choices("abcdefghijklmnop", k=20)) for _ in range(200)))
    hooks = ("blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out")
    run_capture(CaptureConfig(files=(text,), out=str(tmp_path / "run.zarr"), length=32, hooks=hooks))
    found = measure(tmp_path / "run.zarr", 32, 4, 64, 4)
    assert found["stayed_in_memory"] <= 1
    assert all(
        found[f"{state}_{name}_ratio"] > 0 for state in ("cold", "warm") for name in ("alone", "beside")
    )
    with pytest.raises(DataError, match="400 batches of 64 rows are more than an epoch of the store"):
        measure(tmp_path / "run.zarr", 32, 4, 64, 400)


if __name__ == "__main__":
    main()
