"""What one process computes, printed as JSON: run by test_machines.py and, by hand, on other machines.

python tests/oracle/machine_probe.py            in the repository's root; needs torch, numpy and safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from oracle import Oracle, exact_sample, golden, ops, plain_path
from oracle.fingerprint import tensor_digest
from oracle.paths import fused_for


def native_digest(device: torch.device) -> str:
    """One hash of the native float32 pass over everything that the exact one hashes."""
    model = golden.synthetic_model().to(device)
    ids, sigma = (tensor.to(device) for tensor in golden.synthetic_inputs())
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids, timesteps=sigma)
    lines = [tensor_digest(name, tensor) for name, tensor in {**cache, "logits": logits}.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def operations_digest(device: torch.device) -> str:
    """One hash of larger operations than the small model's: several tiles, chunks and thousands of repairs."""
    draws = np.random.Generator(np.random.Philox(7))

    def draw(*shape: int) -> torch.Tensor:
        # Sums of uniform integers: numpy's normal draws use a mathematical library.
        values = draws.integers(-(2**20), 2**20, (4, *shape)).sum(0)
        return torch.from_numpy((values * 2.0**-20).astype(np.float32)).to(device)

    x, weight, bias = draw(70, 1500), draw(310, 1500), draw(310)
    x[:, ::97] *= 700.0
    q, k, v = (draw(2, 90, 3, 24) for _ in range(3))
    results = {
        "linear": ops.linear(x, weight, bias),
        "one row": ops.linear(x[:1], weight),
        "attention": ops.attention(q * 3, k, v),
        "softmax": ops.softmax(draw(20, 3000) * 8),
        "layer_norm": ops.layer_norm(draw(3, 50, 768) + 2, draw(768))[0],
        "gelu": ops.gelu_tanh(draw(60_001) * 4),
        "silu": ops.silu(draw(60_001) * 9),
        "rotate": ops.rotate(q, *ops.rotary_tables(draw(12).abs(), 90)),
    }
    lines = [tensor_digest(name, tensor) for name, tensor in results.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main() -> None:
    """Print the hashes of the exact passes, the native one, and the machine."""
    device = torch.device(os.environ.get("PROBE_DEVICE", "cpu"))
    if "PROBE_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["PROBE_THREADS"]))
    oracle = Oracle(golden.synthetic_model().to(device))
    ids, sigma = (tensor.to(device) for tensor in golden.synthetic_inputs())
    exact = [oracle.fingerprint(ids, timesteps=sigma), operations_digest(device)]
    with plain_path():
        plain = [oracle.fingerprint(ids, timesteps=sigma), operations_digest(device)]
    text = exact_sample(oracle, torch.full((2, 16), 60, device=device), steps=5, seed=11).tolist()
    report = {
        "exact": exact,
        "plain": plain,
        "text": text,
        "native": native_digest(device),
        "machine": f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "compiled loops": fused_for(device) is not None,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
