"""What exactness costs: each exact operation, and the whole forward, ÷ native float32 on one thread.

Both sides run in one process in turns, the order swapped every round; a figure is the ratio of the medians of CPU
times, which a busy machine disturbs less than wall times. "compiled" uses numba's loops, "plain" torch operations
alone. Nothing timed is asserted.

    python tests/benchmarks/bench_exact.py [--rounds N] [--length N] [--blocks N] [--memory]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from mdlm_interp.arithmetic import Arithmetic, NativeArithmetic
from mdlm_interp.config import MDLMConfig
from mdlm_interp.model import HookedMDLM
from oracle import ExactArithmetic, Oracle, plain_path
from oracle.paths import fused_for

Call = Callable[[Arithmetic], object]


@dataclass(frozen=True)
class Case:
    """One size to measure."""

    config: MDLMConfig
    length: int
    rounds: int


SMOKE = Case(MDLMConfig(vocab_size=31, hidden_dim=16, cond_dim=8, n_blocks=1, n_heads=2), length=9, rounds=1)


def operations(config: MDLMConfig, length: int) -> dict[str, Call]:
    """The operations of a block at its sizes, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d, heads = config.hidden_dim, config.n_heads
    x, wide, row, weight = draw(1, length, d), draw(1, length, 4 * d), draw(1, 1, d), draw(d)
    q, k, v = (draw(1, length, heads, d // heads) for _ in range(3))
    tables = ExactArithmetic().rotary_tables(torch.rand(d // heads // 2, generator=generator), length)
    calls: dict[str, Call] = {}
    for d_in, d_out in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)):
        given = (x if d_in == d else wide), 0.02 * draw(d_out, d_in), draw(d_out)
        calls[f"linear {d_in}->{d_out}"] = lambda a, given=given: a.linear(*given)  # type: ignore[misc]
    return {
        **calls,
        "attention": lambda a: a.attention(q, k, v),
        "attention in steps": lambda a: a.mix(a.softmax(a.attention_scores(q, k)), v),
        "gelu_tanh": lambda a: a.gelu_tanh(wide),
        "layer_norm": lambda a: a.layer_norm(x, weight),
        "modulate": lambda a: a.modulate(x, row, row),
        "rotate": lambda a: a.rotate(q, *tables),
        "add": lambda a: a.add(x, x),
        "mul": lambda a: a.mul(row, x),
    }


def seconds(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each side, in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            started = time.process_time()
            sides[name]()
            times[name].append(time.process_time() - started)
        order.reverse()
    return {name: median(values) for name, values in times.items()}


def sides_of(call: Call) -> dict[str, Callable[[], object]]:
    """The native side and one for each exact path there is."""
    native, exact = NativeArithmetic(), ExactArithmetic()

    def plain() -> object:
        with plain_path():
            return call(exact)

    sides: dict[str, Callable[[], object]] = {"native": lambda: call(native), "plain": plain}
    if fused_for(torch.device("cpu")) is not None:
        sides["compiled"] = lambda: call(exact)
    return sides


def measure(case: Case) -> dict[str, dict[str, float]]:
    """By operation, and for the whole forward: native's seconds and the ratio of each exact path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            found = {}
            for name, call in operations(case.config, case.length).items():
                found[name] = seconds(sides_of(call), case.rounds)
            found["forward"] = seconds(forward_sides(case), max(1, case.rounds // 2))
    finally:
        torch.set_num_threads(threads)
    return {name: in_ratios(times) for name, times in found.items()}


def in_ratios(times: dict[str, float]) -> dict[str, float]:
    native = times["native"]
    return {
        "native_ms": 1e3 * native,
        **{k: v / native if native else 0.0 for k, v in times.items() if k != "native"},
    }


def random_model(config: MDLMConfig) -> HookedMDLM:
    """A model in which every weight matters."""
    model = HookedMDLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".norm" in name else 0.0, 0.02, generator=generator)
    return model


def forward_sides(case: Case) -> dict[str, Callable[[], object]]:
    model = random_model(case.config)
    oracle = Oracle(model)
    ids = torch.randint(
        0, case.config.vocab_size, (1, case.length), generator=torch.Generator().manual_seed(1)
    )

    def exact(plain: bool) -> object:
        with plain_path() if plain else nullcontext():
            return oracle.logits(ids)

    sides: dict[str, Callable[[], object]] = {"native": lambda: model(ids), "plain": lambda: exact(True)}
    if fused_for(torch.device("cpu")) is not None:
        sides["compiled"] = lambda: exact(False)
    return sides


def peak_memory(side: str, blocks: int, length: int) -> int:
    """Peak resident bytes of a process that makes one forward pass."""
    command = [sys.executable, __file__, "--peak", side, "--blocks", str(blocks), "--length", str(length)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout) * 1024


def one_pass(side: str, case: Case) -> None:
    """Print the peak of resident kB during one pass, weights included (Linux)."""
    torch.set_num_threads(1)
    call = forward_sides(case)[side]
    gc.collect()
    with torch.no_grad():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the weights
        call()
    status = Path("/proc/self/status").read_text()
    sys.stdout.write(status.partition("VmHWM:")[2].split()[0] + "\n")


@pytest.mark.benchmark
def test_the_benchmark_runs():
    """Behavioural, at a size that says nothing about speed."""
    found = measure(SMOKE)
    assert {"forward", "attention", "linear 16->64"} <= set(found)
    assert all(set(row) >= {"native_ms", "plain"} for row in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of each side (half as many for the forward)"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens")
    parser.add_argument("--blocks", type=int, default=12, help="blocks in the whole forward")
    parser.add_argument("--memory", action="store_true", help="peak memory of a process a side, too")
    parser.add_argument("--peak", choices=["native", "plain", "compiled"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = Case(MDLMConfig(n_blocks=options.blocks), options.length, options.rounds)
    if options.peak:
        one_pass(options.peak, case)
        return
    results = measure(case)
    sys.stdout.write(f"{'operation':20} {'native':>10}  exact ÷ native: plain  compiled\n")
    for name, row in results.items():
        compiled = f"{row['compiled']:9.2f}" if "compiled" in row else "        -"
        sys.stdout.write(f"{name:20} {row['native_ms']:8.2f}ms {row['plain']:22.2f} {compiled}\n")
    report = {
        "benchmark": "exact",
        "threads": 1,
        "length": options.length,
        "blocks": options.blocks,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "results": results,
    }
    if options.memory:
        sides = ["native", "plain", *(["compiled"] if "compiled" in results["forward"] else [])]
        report["peak_bytes"] = {side: peak_memory(side, options.blocks, options.length) for side in sides}
        sys.stdout.write(f"peak memory: {report['peak_bytes']}\n")
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
