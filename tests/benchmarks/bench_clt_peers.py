"""Training steps and quality of this package's transcoders beside those of Llamascopium and crosslayer-coding.

1. speed: tokens a second of one training step (encode, TopK, decode, loss, gradients, clipping, Adam) on the same
   activations, one thread each, in turns; medians of wall and of CPU time. 12 layers, d 768, 2,048 features a layer,
   k 16 unless told.
2. quality: the same batches and schedule for all, every learning rate of a small grid, the best of each side kept:
   FVU of held-out rows at equal tokens and equal k. Needs a store: --store run.zarr.

The peers are installed in a Python of their own, which is named:

    python tests/benchmarks/bench_clt_peers.py --peer-python PATH [--features N ...] [--store run.zarr]

Source:
    Llamascopium 2.0.0b34 (OpenMOSS/Language-Model-SAEs); crosslayer-coding (curt-tigges/crosslayer-coding) as
    decode-clt 0.0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

WORKER = Path(__file__).with_name("clt_sides.py")
PEERS = ("llamascopium", "llamascopium-csr", "crosslayer-coding")
LEARNING_RATES = (4e-4, 1e-3, 2e-3, 4e-3)


class Case(NamedTuple):
    """What is trained."""

    activations: Path
    held_out: int
    batch: int
    n_features: int
    k: int
    steps: int


class Worker:
    """A side in its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, command: str) -> dict[str, Any]:
        """Its reply to a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with code {self._process.wait()} on {command!r}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def started(python: str, side: str, case: Case, lr: float) -> Iterator[Worker]:
    """A side, stopped at the end."""
    options = {
        "side": side, "activations": case.activations, "held-out": case.held_out, "batch": case.batch,
        "features": case.n_features, "k": case.k, "steps": case.steps, "lr": lr,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [python, str(WORKER), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.communicate()


def speed(pythons: dict[str, str], case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second by side, and how many times each peer's speed ours is."""
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(started(python, side, case, 1e-3)) for side, python in pythons.items()
        }
        found: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        order = list(workers)
        for number in range(rounds + 1):
            for side in order:
                taken = workers[side].ask(f"step {number}")
                if number:  # the first is the warm-up
                    found[side].append(taken)
            order.reverse()
    rows = {
        side: {
            f"{clock}_tokens_per_s": case.batch / median(step[clock] for step in steps)
            for clock in ("wall", "cpu")
        }
        for side, steps in found.items()
    }
    for row in rows.values():
        row["ours_times"] = rows["ours"]["cpu_tokens_per_s"] / row["cpu_tokens_per_s"]
    return rows


def quality(
    pythons: dict[str, str], case: Case, rates: Sequence[float]
) -> dict[str, dict[float, dict[str, Any]]]:
    """Held-out figures by side and learning rate after all steps."""
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for side, python in pythons.items():
        for lr in rates:
            with started(python, side, case, lr) as worker:
                for number in range(case.steps):
                    worker.ask(f"step {number}")
                found.setdefault(side, {})[lr] = worker.ask("evaluate")
    return found


def random_activations(path: Path, layers: int, rows: int, d_model: int) -> None:
    """Inputs, and targets that depend on those of their own layer and the ones before."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(layers, rows, d_model, generator=generator)
    weights = torch.randn(layers, d_model, d_model, generator=generator) / d_model**0.5
    save_file({"x": x, "y": torch.cumsum(torch.relu(x @ weights), 0).contiguous()}, path)


def captured_activations(path: Path, store_path: Path, rows: int) -> None:
    """Rows of a store, normalised as training does it: the first ones to train on, the last ones held out."""
    from capture import open_store
    from transcoder.config import hook_names
    from transcoder.data import infer_shape, store_normalisation

    store = open_store(store_path)
    inputs, outputs = "blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out"
    n_layers, _ = infer_shape(store, inputs, outputs)
    tensors = {}
    for name, pattern in (("x", inputs), ("y", outputs)):
        hooks = hook_names(pattern, n_layers)
        norm = store_normalisation(store, hooks)
        acts = store.read(slice(0, min(rows, len(store))), hooks)
        stacked = torch.stack([acts[hook] for hook in hooks]).double()
        normalised = (stacked - norm.mean[:, None]) * norm.scale[:, None, None]
        tensors[name] = normalised.float().contiguous()
    save_file(tensors, path)


def main() -> None:
    """Print both tables and their JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", required=True, help="the Python in which the peers are installed")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--features", type=int, nargs="+", default=[2048])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path, help="compare quality on this store instead of speed")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the store")
    parser.add_argument("--steps", type=int, default=600, help="steps of the comparison of quality")
    parser.add_argument("--lr", type=float, nargs="+", default=LEARNING_RATES)
    given = parser.parse_args()
    pythons = {"ours": sys.executable, **dict.fromkeys(given.peers, given.peer_python)}
    results: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.safetensors"
        if given.store is None:
            random_activations(path, 12, 4 * given.batch, 768)
        else:
            captured_activations(path, given.store, given.rows)
        for n_features in given.features:
            held_out = given.batch if given.store is None else given.rows // 10
            case = Case(path, held_out, given.batch, n_features, given.k, given.steps)
            if given.store is None:
                rows = speed(pythons, case, given.rounds)
                sys.stdout.write(f"{n_features} features a layer, batch {given.batch}, k {given.k}\n")
                for side, row in rows.items():
                    figures = "  ".join(f"{name} {value:.1f}" for name, value in row.items())
                    sys.stdout.write(f"  {side:18} {figures}\n")
                results.append({"features": n_features, "speed": rows})
            else:
                found = quality(pythons, case, given.lr)
                sys.stdout.write(
                    f"{n_features} features, k {given.k}, {given.steps} steps of {given.batch} rows\n"
                )
                for side, by_rate in found.items():
                    best = min(by_rate, key=lambda lr: fmean(by_rate[lr]["fvu"]))
                    fvu, l0 = fmean(by_rate[best]["fvu"]), fmean(by_rate[best]["l0"])
                    sys.stdout.write(f"  {side:18} FVU {fvu:.4f}  L0 {l0:.2f}  lr {best:g}\n")
                results.append({"features": n_features, "quality": found})
            sys.stdout.flush()
    sys.stdout.write(json.dumps({"benchmark": "clt_peers", "threads": 1, "results": results}) + "\n")


@pytest.mark.benchmark
def test_our_side_steps_and_is_evaluated(tmp_path: Path) -> None:
    random_activations(tmp_path / "acts.safetensors", 2, 60, 8)
    case = Case(tmp_path / "acts.safetensors", 12, 16, 24, 3, 20)
    assert speed({"ours": sys.executable}, case, 1)["ours"]["ours_times"] == 1
    found = quality({"ours": sys.executable}, case, [5e-3])["ours"][5e-3]
    assert all(0 < fvu < 5 for fvu in found["fvu"])
    assert all(0 < l0 <= 3 for l0 in found["l0"])


if __name__ == "__main__":
    main()
