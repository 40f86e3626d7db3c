"""Tokens/s of a capture of 24 hook points ÷ those of the bare forward pass, and what of it is writing.

1. capture: `Passes` and `StoreWriter` as `run_capture` uses them, durable and checksummed, on the default
   disk; each side a fixed number of batches, in turns, the median of the rounds.
2. bare: the same model over the same batches with nobody listening: the forward pass to the logits, and the
   shorter one to the last recorded block, which is what a capture runs.
3. raw: the same bytes appended to plain files, 1 MiB a write, and fsynced.
4. commit: seconds from the last data on disk to the manifest that lists it.

    python tests/benchmarks/bench_capture.py [--case bundled|full] [--out DIR] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from capture import manifest as manifests
from capture import schema
from capture.begin import begin
from capture.forward import Forward
from capture.passes import Passes, Shares
from capture.places import Directory
from capture.plan import Batch, PlannedSequence
from capture.run import batch_rows
from capture.writer import StoreWriter
from mdlm_interp.__main__ import wait_politely
from mdlm_interp.config import MDLMConfig
from mdlm_interp.documents import StreamPosition, TokenBlock
from mdlm_interp.model import HookedMDLM

STREAMS = (
    "mlp.hook_in",
    "hook_mlp_out",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
)
"""A transcoder's inputs and targets first: of 12 blocks these are 24 hook points."""


@dataclass(frozen=True)
class Case:
    """One size to measure."""

    config: MDLMConfig
    batch: int
    length: int
    batches: int
    """Of one round."""
    hooks: int = 24


SMOKE = Case(
    MDLMConfig(vocab_size=31, model_length=16, hidden_dim=16, cond_dim=8, n_blocks=2, n_heads=2),
    batch=2, length=16, batches=20, hooks=6,
)  # fmt: skip
CASES = {
    "bundled": Case(
        MDLMConfig(vocab_size=4096, model_length=128, hidden_dim=192, cond_dim=128, n_blocks=5, n_heads=6),
        batch=16, length=128, batches=64,
    ),
    "full": Case(MDLMConfig(), batch=4, length=1024, batches=4),
}  # fmt: skip


def built(config: MDLMConfig) -> HookedMDLM:
    """A model with random weights."""
    model = HookedMDLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model


def recorded(model: HookedMDLM, count: int) -> list[str]:
    """That many hook points, stream after stream, in execution order."""
    blocks = range(model.config.n_blocks)
    names = [f"blocks.{block}.{stream}" for stream in STREAMS for block in blocks][:count]
    return sorted(names, key=model.hook_names.index)


def planned(case: Case) -> Iterator[Batch]:
    """Batches of random tokens, half of them masked."""
    generator = np.random.default_rng(0)
    for number in range(case.batches):
        sequences = []
        for index in range(number * case.batch, (number + 1) * case.batch):
            ids = generator.integers(0, case.config.vocab_size - 1, case.length)
            mask = case.config.vocab_size - 1
            xt = np.where(generator.random(case.length) < 0.5, mask, ids)
            block = TokenBlock(ids, np.zeros(case.length, np.int64), 0, 0, StreamPosition(0, 0))
            sequences.append(
                PlannedSequence(
                    number=index, row=index * case.length, block=block, block_number=index, candidate=index,
                    t=0.5, xt=xt, positions=np.arange(case.length),
                )
            )  # fmt: skip
        yield Batch(sequences, case.length, 0)


def layout_of(model: HookedMDLM, hooks: list[str], case: Case) -> schema.Layout:
    """The layout of a store of these hook points."""
    shapes = {hook: schema.row_shape(hook, model.config) for hook in hooks}
    return schema.Layout(shapes=shapes, length=case.length)


def capture_seconds(model: HookedMDLM, hooks: list[str], case: Case, out: Path) -> tuple[float, list[float]]:
    """Seconds of a durable capture, and those of each replacement of the manifest."""
    shutil.rmtree(out, ignore_errors=True)
    layout = layout_of(model, hooks, case)
    place = TimedDirectory(out)
    attributes = {"config": {"arithmetic": "exact"}, "provenance": {}}
    manifest = begin(place, layout, attributes, case.batches * case.batch * case.length, 0, 1)
    forward = Forward(model, hooks, together=True)
    work = list(planned(case))
    place.commits.clear()
    start = time.perf_counter()
    writer = StoreWriter(place, layout, manifest)
    with Passes(forward, Shares.of(None, alone=False)) as passes:
        for batch, lent in passes.run((batch, False) for batch in work):
            assert lent is not None
            writer.append(batch_rows(batch, lent[0], case.config.vocab_size - 1, lent[1]))
    writer.close()
    return time.perf_counter() - start, place.commits


class TimedDirectory(Directory):
    """A directory that notes how long each small file took to become durable."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.commits: list[float] = []

    def replace(self, path: str, content: bytes) -> None:
        start = time.perf_counter()
        super().replace(path, content)
        if path == manifests.MANIFEST:
            self.commits.append(time.perf_counter() - start)


def bare_seconds(model: HookedMDLM, hooks: list[str], case: Case, *, logits: bool) -> float:
    """Seconds of the forward passes alone."""
    stop = None if logits else Forward(model, hooks, together=True).stop_at_block
    inputs = [torch.from_numpy(np.stack([s.xt for s in batch.sequences])) for batch in planned(case)]
    sigma = torch.full((case.batch,), 0.5)
    start = time.perf_counter()
    with torch.inference_mode():
        for xt in inputs:
            model(xt, sigma, stop_at_block=stop)
    return time.perf_counter() - start


def raw_seconds(size: int, files: int, out: Path) -> float:
    """Seconds of appending that many bytes to plain files, in turns, durably."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    piece = np.random.default_rng(0).bytes(1 << 20)
    start = time.perf_counter()
    handles = [os.open(out / str(number), os.O_WRONLY | os.O_CREAT) for number in range(files)]
    for turn in range(size // len(piece)):
        os.write(handles[turn % files], piece)
    for handle in handles:
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start


def write_seconds(model: HookedMDLM, hooks: list[str], case: Case, out: Path) -> float:
    """Seconds of writing the same rows with no forward pass beside it."""
    shutil.rmtree(out, ignore_errors=True)
    layout = layout_of(model, hooks, case)
    place = Directory(out)
    attributes = {"config": {"arithmetic": "exact"}, "provenance": {}}
    manifest = begin(place, layout, attributes, case.batches * case.batch * case.length, 0, 1)
    work = list(planned(case))
    acts = Forward(model, hooks, together=True)(work[0], check=False)
    start = time.perf_counter()
    writer = StoreWriter(place, layout, manifest)
    for batch in work:
        writer.append(batch_rows(batch, acts, case.config.vocab_size - 1))
    writer.close()
    return time.perf_counter() - start


def measure(case: Case, out: Path, rounds: int) -> dict[str, float]:
    """Every figure, by name."""
    model = built(case.config)
    hooks = recorded(model, case.hooks)
    tokens = case.batches * case.batch * case.length
    size = tokens * layout_of(model, hooks, case).row_bytes
    sides: dict[str, Callable[[], float]] = {
        "bare": lambda: bare_seconds(model, hooks, case, logits=False),
        "logits": lambda: bare_seconds(model, hooks, case, logits=True),
        "write": lambda: write_seconds(model, hooks, case, out / "store"),
        "raw": lambda: raw_seconds(size, len(hooks), out / "raw"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*sides, "capture")}
    commits: list[float] = []
    for round_number in range(rounds):
        taken, replaced = capture_seconds(model, hooks, case, out / "store")
        seconds["capture"].append(taken)
        commits += replaced
        for name in sorted(sides, reverse=round_number % 2 == 1):
            seconds[name].append(sides[name]())
    typical = {name: median(values) for name, values in seconds.items()}
    return {
        "hooks": len(hooks),
        "capture_tokens_per_s": tokens / typical["capture"],
        "capture_over_bare": typical["bare"] / typical["capture"],
        "capture_over_logits": typical["logits"] / typical["capture"],
        "write_MB_per_s": size / typical["write"] / 1e6,
        "raw_MB_per_s": size / typical["raw"] / 1e6,
        "write_over_raw": typical["raw"] / typical["write"],
        "commit_ms_median": 1e3 * median(commits),
        "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> None:
    """Print the figures of a case as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="bundled")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    before = dict(os.environ)
    wait_politely()
    if os.environ != before:  # as the command line does it, which is before torch starts its threads
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        figures = measure(CASES[options.case], Path(folder), options.rounds)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


@pytest.mark.benchmark
def test_every_side_runs(tmp_path: Path) -> None:
    figures = measure(SMOKE, tmp_path, 1)
    assert all(np.isfinite(value) and value > 0 for value in figures.values()), figures


if __name__ == "__main__":
    main()
