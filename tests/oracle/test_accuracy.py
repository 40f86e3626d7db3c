"""Exact logits are closer to float64 than native float32's, and memory stays within three times native's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdlm_interp import HookedMDLM, MDLMConfig
from oracle import Oracle
from tests.mdlm_interp.test_golden import build, load_golden

ROOT = Path(__file__).parents[2]


def errors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute errors of exact and native logits against upstream's float64."""
    golden = load_golden(name)
    model = build(golden, torch.float32)
    exact = Oracle(model).logits(golden.input_ids, golden.sigma)
    with torch.no_grad():
        native = model(golden.input_ids, golden.sigma)
    return (exact - golden.logits).abs(), (native - golden.logits).abs()


@pytest.mark.parametrize("name", ["mdlm_tiny_a", "mdlm_tiny_b"])
def test_exact_logits_are_at_least_twice_as_close_to_float64_as_native_ones(name):
    """Bounded: measured 0.28 of native's root mean square and 0.29 of its maximum; 0.5 is what is promised."""
    exact, native = errors(name)
    assert float(exact.square().mean().sqrt()) < 0.5 * float(native.square().mean().sqrt())
    assert float(exact.max()) < 0.5 * float(native.max())
    assert float(exact.max()) < 5e-6


@pytest.mark.slow
def test_exact_logits_are_at_least_twice_as_close_to_float64_at_full_size():
    """Bounded, as above: the published model's width, depth and heads with random weights, 1,024 tokens."""
    model = HookedMDLM(MDLMConfig(vocab_size=2000)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".norm" in name else 0.0, 0.05, generator=generator)
        ids = torch.randint(0, 2000, (1, 1024), generator=generator)
        native = model(ids)
        exact = Oracle(model, cache_bytes=0).logits(ids)
        wide = model.double()(ids)
    exact_error, native_error = (exact - wide).abs(), (native - wide).abs()
    assert float(exact_error.square().mean().sqrt()) < 0.5 * float(native_error.square().mean().sqrt())
    assert float(exact_error.max()) < 0.5 * float(native_error.max())


MEMORY = """
import re, sys, torch
from pathlib import Path
from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp import HookedMDLM, MDLMConfig
from oracle import Oracle
torch.set_num_threads(1)
model = HookedMDLM(MDLMConfig(n_blocks=2, hidden_dim=768, vocab_size=20000)).eval()
ids = torch.randint(0, 20000, (1, 1024))
with torch.no_grad():
    run = Oracle(model).logits if sys.argv[1] == "exact" else model
    run(ids[:, :8])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the weights
    run(ids)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_peak_memory_is_at_most_three_times_native_s():
    """Bounded: whole processes at length 1024, weights and their float64 copies included."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a part of a process is read from Linux's /proc")

    def peak(kind: str) -> int:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, kind],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    assert peak("exact") <= 3 * peak("native")
