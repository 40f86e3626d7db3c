"""What one process computes, printed as JSON: run by test_machines.py and, by hand, on other machines.

python tests/oracle/machine_probe.py            in the repository's root; needs torch, numpy and safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from mdlm_interp.model import HookedMDLM
from oracle import Oracle, exact_sample, golden, ops, plain_path, witness_forward
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


def witness_digest(model: HookedMDLM, ids: torch.Tensor, sigma: torch.Tensor) -> str:
    """The fingerprint of a short sequence by the second implementation (NumPy, whose products OpenBLAS makes)."""
    weights = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    logits, activations = witness_forward.forward(
        weights, model.config, ids.cpu().numpy(), sigma.cpu().numpy()
    )
    return witness_forward.fingerprint(activations, logits)


def main() -> None:
    """Print the hashes of the exact passes, the native one, and the machine."""
    device = torch.device(os.environ.get("PROBE_DEVICE", "cpu"))
    threads = [int(n) for n in os.environ.get("PROBE_THREADS", str(torch.get_num_threads())).split(",")]
    model = golden.synthetic_model().to(device)
    ids, sigma = (tensor.to(device) for tensor in golden.synthetic_inputs())
    short = ids[:1, :3], sigma[:1]
    exact: set[tuple[str, ...]] = set()
    native = set()
    for n in threads:  # with the first of them everything is called for the first time
        torch.set_num_threads(n)
        oracle = Oracle(model)
        for path in (nullcontext, plain_path):
            with path():
                digests = (oracle.fingerprint(ids, timesteps=sigma), operations_digest(device))
                exact.add((*digests, oracle.fingerprint(short[0], timesteps=short[1])))
        native.add(native_digest(device))
    text = exact_sample(Oracle(model), torch.full((2, 16), 60, device=device), steps=5, seed=11).tolist()
    report = {
        "exact": sorted(exact),
        "witness": witness_digest(model, *short),
        "text": text,
        "native": sorted(native),
        "machine": f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "compiled loops": fused_for(device) is not None,
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
