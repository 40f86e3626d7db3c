"""What hook points cost while nobody listens: HookedMDLM's forward ÷ the same network without them.

The baseline is the transformers class, `mdlm_interp.hf.modeling_mdlm.MDLM`: plain torch modules with no
hook point in them, the same weights. Both sides run in one process on one thread in turns, the order
swapped every round; the figure is the ratio of the median wall times, with that of CPU times beside it,
which a busy machine disturbs less. Nothing timed is asserted.

    python tests/benchmarks/bench_hooks.py [--rounds N] [--case tiny|full]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median

import pytest
import torch
from torch import Tensor

from mdlm_interp.config import MDLMConfig
from mdlm_interp.model import HookedMDLM


@dataclass(frozen=True)
class Case:
    """One size to measure."""

    config: MDLMConfig
    batch: int
    length: int
    rounds: int
    calls: int
    """Forward passes a turn, so that a turn is far above the clock's resolution."""


SMOKE = Case(
    MDLMConfig(vocab_size=31, hidden_dim=16, cond_dim=8, n_blocks=2, n_heads=2),
    batch=2,
    length=8,
    rounds=2,
    calls=1,
)
CASES = {
    "tiny": Case(
        MDLMConfig(vocab_size=4096, model_length=128, hidden_dim=192, n_blocks=6, n_heads=6),
        batch=8, length=128, rounds=31, calls=5,
    ),
    "full": Case(MDLMConfig(), batch=1, length=1024, rounds=9, calls=1),
}  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def both_models(config: MDLMConfig) -> tuple[HookedMDLM, torch.nn.Module]:
    """HookedMDLM and the transformers class with the same random weights."""
    from mdlm_interp.hf.configuration_mdlm import MDLMConfig as HFConfig
    from mdlm_interp.hf.modeling_mdlm import MDLM

    hooked = HookedMDLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hooked.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    plain = MDLM(HFConfig(**asdict(config))).eval()
    plain.load_state_dict(hooked.state_dict())
    return hooked, plain


def timed(forward: Callable[[Tensor], Tensor], ids: Tensor, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds of one forward pass, as the mean of a turn's."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        forward(ids)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def measure(case: Case) -> dict[str, float]:
    """Median seconds of both sides and their ratio; raises if the two give different logits."""
    hooked, plain = both_models(case.config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, case.config.vocab_size, (case.batch, case.length), generator=generator)
    turns: dict[str, list[tuple[float, float]]] = {"hooked": [], "plain": []}
    sides = [("hooked", hooked), ("plain", plain)]
    with one_thread(), torch.inference_mode():
        torch.testing.assert_close(hooked(ids), plain(ids))  # also warms both up
        for _ in range(case.rounds):
            for name, model in sides:
                turns[name].append(timed(model, ids, case.calls))
            sides.reverse()
    seconds = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in turns.items()}
    by_round = [h[0] / p[0] for h, p in zip(turns["hooked"], turns["plain"], strict=True)]
    return {
        "hooked_s": seconds["hooked"][0],
        "plain_s": seconds["plain"][0],
        "ratio": seconds["hooked"][0] / seconds["plain"][0],
        "cpu_ratio": seconds["hooked"][1] / seconds["plain"][1],
        "round_ratio_min": min(by_round),
        "round_ratio_median": median(by_round),
        "round_ratio_max": max(by_round),
    }


@pytest.mark.benchmark
def test_the_benchmark_runs_and_both_sides_agree():
    """Behavioural, at a size that says nothing about speed."""
    found = measure(SMOKE)
    assert found["ratio"] > 0
    assert set(found) >= {"hooked_s", "plain_s", "ratio", "cpu_ratio"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), action="append", help="which sizes (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds of one turn a side (default: by size)")
    options = parser.parse_args()
    results = {}
    sys.stdout.write(
        f"{'case':6} {'hooked':>10} {'plain':>10} {'ratio':>7} {'CPU':>7}   rounds: min median max\n"
    )
    for name in options.case or CASES:
        case = CASES[name]
        if options.rounds is not None:
            case = Case(**{**vars(case), "rounds": options.rounds})
        found = results[name] = measure(case)
        spread = " ".join(f"{found['round_ratio_' + at]:.3f}" for at in ("min", "median", "max"))
        sys.stdout.write(
            f"{name:6} {1e3 * found['hooked_s']:8.2f}ms {1e3 * found['plain_s']:8.2f}ms "
            f"{found['ratio']:7.4f} {found['cpu_ratio']:7.4f}   {spread}\n"
        )
        sys.stdout.flush()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    sys.stdout.write(json.dumps({"benchmark": "hooks", "threads": 1, **machine, "results": results}) + "\n")


if __name__ == "__main__":
    main()
