"""One training step of a cross-layer transcoder: the sparse kernels ÷ plain torch over all features, on one thread.

A step is encode, top k, decode, squared error, backward and fused Adam, in float32 on random rows. "dense" is what
others do, in autograd's own operations: one product for each encoder and each source's decoders. Both sides train
the same weights in turns, the order swapped every round; figures are medians of CPU times, which a busy machine
disturbs less than wall times. `--memory` adds the peak of a process that takes sparse steps only. Nothing timed is
asserted.

    python tests/benchmarks/bench_clt_step.py [--features N ...] [--batch N ...] [--k N] [--rounds N] [--memory]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from transcoder import kernels
from transcoder.kernels.paths import kernels_for

Times = dict[str, float]
Step = Callable[["Run"], Times]


@dataclass(frozen=True)
class Case:
    """One size to measure."""

    n_features: int
    batch: int
    k: int = 16
    n_layers: int = 12
    d_model: int = 768
    rounds: int = 5


SMOKE = Case(n_features=20, batch=3, k=2, n_layers=2, d_model=9, rounds=1)


class Weights(nn.Module):
    """A transcoder's parameters, with the initial bounds of its re-implementations."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        layers, features, d = case.n_layers, case.n_features, case.d_model

        def draw(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.W_enc = draw(features**-0.5, layers, features, d)
        self.b_enc = nn.Parameter(torch.zeros(layers, features))
        self.W_dec = nn.ParameterList(
            draw((layers * d) ** -0.5, features, layers - s, d) for s in range(layers)
        )
        self.b_dec = nn.Parameter(torch.zeros(layers, d))


class Run:
    """Weights, their optimiser, and a batch."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.weights = case, Weights(case)
        self.optimiser = torch.optim.Adam(self.weights.parameters(), lr=1e-4, fused=True)
        self.buffers = kernels.GradientBuffers([self.weights.W_enc, *self.weights.W_dec])
        self.x, self.y = torch.randn(2, case.n_layers, case.batch, case.d_model)

    def finish(self, clock: Clock, loss: Tensor) -> Times:
        """Gradients and update."""
        with clock("backward"):
            torch.autograd.backward(loss)
        with clock("adam"):
            self.optimiser.step()
        return clock.times


class Clock:
    """CPU seconds of the parts of a step."""

    def __init__(self) -> None:
        self.times: Times = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.times[part] = time.process_time() - started


def sparse_step(run: Run) -> Times:
    """One step through the kernels."""
    clock, w, buffers = Clock(), run.weights, run.buffers
    with clock("encode"):
        run.optimiser.zero_grad(set_to_none=True)
        acts, _ = kernels.encode_topk(run.x, w.W_enc, w.b_enc, run.case.k, grads=buffers)
    with clock("decode"):
        y_hat = kernels.decode(acts, list(w.W_dec), w.b_dec, grads=buffers)
    with clock("loss"):
        loss = kernels.row_errors(y_hat, run.y).mean() / run.case.d_model
    return run.finish(clock, loss)


def dense_step(run: Run) -> Times:
    """One step in operations over all features."""
    clock, w = Clock(), run.weights
    with clock("encode"):
        run.optimiser.zero_grad(set_to_none=True)
        pre_acts = torch.baddbmm(w.b_enc[:, None], run.x, w.W_enc.mT)
        values, indices = pre_acts.topk(run.case.k)
        acts = torch.zeros_like(pre_acts).scatter(2, indices, values.relu())
    with clock("decode"):
        targets = list(w.b_dec[:, None].expand(-1, run.case.batch, -1))
        for source, (layer_acts, weight) in enumerate(zip(acts, w.W_dec, strict=True)):
            written = (layer_acts @ weight.flatten(1)).split(run.case.d_model, dim=1)
            for later, part in enumerate(written):
                targets[source + later] = targets[source + later] + part
        y_hat = torch.stack(targets)
    with clock("loss"):
        loss = (y_hat - run.y).square().mean((1, 2)).mean()
    return run.finish(clock, loss)


def plain_step(run: Run) -> Times:
    """One sparse step without numba."""
    with kernels.plain_path():
        return sparse_step(run)


def sides_of(with_plain: bool) -> dict[str, Step]:
    sides: dict[str, Step] = {"dense": dense_step, "sparse": sparse_step}
    return {**sides, "plain": plain_step} if with_plain else sides


def measure(case: Case, with_plain: bool = False) -> dict[str, Times]:
    """By side: tokens a second, seconds of each part, and how many times the dense side's speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run, sides = Run(case), sides_of(with_plain)
        found: dict[str, list[Times]] = {name: [] for name in sides}
        for step in sides.values():
            step(run)
        order = list(sides)
        for _ in range(case.rounds):
            for name in order:
                found[name].append(sides[name](run))
            order.reverse()
    finally:
        torch.set_num_threads(threads)
    rows = {}
    for name, steps in found.items():
        seconds = median(sum(step.values()) for step in steps)
        parts = {f"{part}_s": median(step[part] for step in steps) for part in steps[0]}
        rows[name] = {"tokens_per_s": case.batch / seconds if seconds else 0.0, "step_s": seconds, **parts}
    for row in rows.values():
        slow = rows["dense"]["tokens_per_s"]
        row["times_dense"] = row["tokens_per_s"] / slow if slow else 0.0
    return rows


def peak_memory(case: Case) -> dict[str, float]:
    """Peak resident bytes of a process that takes sparse steps, and of it for each parameter."""
    sizes = ["--features", str(case.n_features), "--batch", str(case.batch), "--k", str(case.k)]
    result = subprocess.run(
        [sys.executable, __file__, "--peak", *sizes], capture_output=True, text=True, check=True
    )
    peak_bytes, n_parameters = map(int, result.stdout.split())
    return {
        "peak_bytes": peak_bytes,
        "parameters": n_parameters,
        "bytes_per_parameter": peak_bytes / n_parameters,
    }


def three_steps(case: Case) -> None:
    """Print the peak of resident bytes during three sparse steps, all included, and the parameters (Linux)."""
    torch.set_num_threads(1)
    run = Run(case)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the weights
    for _ in range(3):
        sparse_step(run)
    peak_kb = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    sys.stdout.write(f"{peak_kb * 1024} {sum(p.numel() for p in run.weights.parameters())}\n")


@pytest.mark.benchmark
def test_the_benchmark_runs():
    """Behavioural, at a size that says nothing about speed."""
    found = measure(SMOKE, with_plain=True)
    assert set(found) == {"dense", "sparse", "plain"}
    assert all(
        {"tokens_per_s", "encode_s", "backward_s", "times_dense"} <= set(row) for row in found.values()
    )


@pytest.mark.benchmark
@pytest.mark.parametrize("step", [sparse_step, plain_step])
def test_all_sides_take_the_same_step(step):
    """Bounded: one step's gradients in float32; what Adam does with them is the same code."""
    found = []
    for each in (dense_step, step):
        run = Run(replace(SMOKE, batch=7))
        each(run)
        found.append([p.grad for p in run.weights.parameters()])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-7)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, nargs="+", default=[2048], help="features a layer")
    parser.add_argument("--batch", type=int, nargs="+", default=[512], help="rows a step")
    parser.add_argument("--k", type=int, default=16, help="active features a layer and row")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--plain", action="store_true", help="the sparse path without numba, too")
    parser.add_argument("--memory", action="store_true", help="peak memory of a process, too")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [
        Case(features, batch, options.k, rounds=options.rounds)
        for features in options.features
        for batch in options.batch
    ]
    if options.peak:
        three_steps(cases[0])
        return
    results = []
    for case in cases:
        rows = measure(case, options.plain)
        sys.stdout.write(f"{case.n_features} features, batch {case.batch}, k {case.k}\n")
        for name, row in rows.items():
            parts = "  ".join(f"{key[:-2]} {value:.3f}" for key, value in row.items() if key.endswith("_s"))
            sys.stdout.write(
                f"  {name:7} {row['tokens_per_s']:7.0f} tokens/s {row['times_dense']:6.2f}x  {parts}\n"
            )
        memory = peak_memory(case) if options.memory else {}
        if memory:
            peak, each = memory["peak_bytes"] / 1e9, memory["bytes_per_parameter"]
            sys.stdout.write(f"  peak {peak:.2f} GB, {each:.1f} B/parameter\n")
        results.append({**vars(case), "sides": rows, **memory})
    report = {
        "benchmark": "clt_step",
        "threads": 1,
        "path": kernels_for(torch.empty(0)).__name__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "results": results,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
