"""Rows/s of a transcoder's training batches from a store ÷ those that training steps consume, on one thread.

Both sides see the same batches, in turns: `StoreBatches.batch` alone, then `Trainer.step` on a batch already read. The
files are in memory after the first round. Nothing timed is asserted.

    python tests/benchmarks/bench_clt_loader.py STORE [--features N] [--k N] [--batch N] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from capture import ActivationStore, open_store
from transcoder.batches import Batch
from transcoder.config import CLTRunConfig
from transcoder.model import CrossLayerTranscoder
from transcoder.sources import StoreSource
from transcoder.train_config import TrainConfig
from transcoder.trainer import Trainer


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


def measure(store: ActivationStore, n_features: int, k: int, batch: int, steps: int) -> dict[str, float]:
    """Rows/s of both sides and their ratio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = TrainConfig(steps=steps, batch_size=batch)
    config = CLTRunConfig(
        store=Path(store.path), out=Path("unused"), n_features=n_features, k=k, train=settings
    )
    source = StoreSource(store, config)
    shape = config.shape(*source.dimensions)
    batches = source.batches(shape)
    given = Given(batches.batch(0))
    trainer = Trainer(CrossLayerTranscoder(shape), given, settings)
    trainer.step()
    loading, training = [], []
    for number in range(1, steps):
        start = time.perf_counter()
        given.given = batches.batch(number)
        loaded = time.perf_counter()
        trainer.step()
        loading.append(loaded - start)
        training.append(time.perf_counter() - loaded)
    torch.set_num_threads(threads)
    # Windows are read as a whole, so the mean over many batches is what loading costs.
    rows = {"loaded": batch * len(loading) / sum(loading), "trained": batch / median(training)}
    return {"loaded_rows_per_s": rows["loaded"], "trained_rows_per_s": rows["trained"],
            "ratio": rows["loaded"] / rows["trained"]}  # fmt: skip


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    figures = measure(open_store(given.store), given.features, given.k, given.batch, given.steps)
    sys.stdout.write(json.dumps({"benchmark": "clt_loader", **vars(given), **figures}, default=str) + "\n")


@pytest.mark.benchmark
def test_both_sides_run(tmp_path: Path) -> None:
    from capture import CaptureConfig, run_capture

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The dog number {n} ran to the park with a red ball." for n in range(200)))
    hooks = ("blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out")
    store = run_capture(CaptureConfig(files=(text,), out=str(tmp_path / "run.zarr"), length=32, hooks=hooks))
    assert measure(store, 32, 4, 64, 4)["ratio"] > 0


if __name__ == "__main__":
    main()
