"""One set of hashes under every setting that changes native results. Every claim is exact.

Each set-up is a process of its own that runs `machine_probe.py`. The native pass must fail the same test, or the
matrix would show nothing. To add interpreters (other torch versions, emulated processors), name commands that start
them, separated by `;`, in MDLM_INTERP_PROBE_PYTHONS, for example

    /opt/torch26/bin/python; qemu-aarch64-static -L /opt/arm64 /opt/arm64/usr/bin/python3

and run `pytest -m slow tests/oracle/test_machines.py`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PROBE = Path(__file__).with_name("machine_probe.py")

SETUPS: dict[str, dict[str, str]] = {
    "as it is": {},
    "no vector units, fixed products, 1 thread": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "PROBE_THREADS": "1",
    },
    "avx2, oneDNN and MKL limited, oversubscribed": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OMP_NUM_THREADS": "8",
        "OPENBLAS_CORETYPE": "Prescott",
    },
}
MORE_SETUPS: dict[str, dict[str, str]] = {
    **{f"{n} threads": {"PROBE_THREADS": str(n)} for n in (1, 2, 4)},
    **{f"ATen {isa}": {"ATEN_CPU_CAPABILITY": isa} for isa in ("default", "avx2")},
    **{f"MKL {branch}": {"MKL_CBWR": branch} for branch in ("COMPATIBLE", "AVX2", "AVX512")},
    **{f"oneDNN {isa}": {"ONEDNN_MAX_CPU_ISA": isa} for isa in ("SSE41", "AVX2", "AVX512_CORE")},
    **{f"MKL instructions {isa}": {"MKL_ENABLE_INSTRUCTIONS": isa} for isa in ("SSE4_2", "AVX2")},
    "plain path": {"MDLM_INTERP_EXACT_PATH": "plain"},
    "compiled for an old processor": {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""},
}


def run(command: list[str], settings: dict[str, str]) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MKL_", "ATEN_"))}
    result = subprocess.run(
        [*command, "-W", "ignore", str(PROBE)],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@cache
def report(name: str) -> dict[str, Any]:
    return run([sys.executable], {**SETUPS, **MORE_SETUPS}[name])


def exact_part(found: dict[str, Any]) -> dict[str, Any]:
    assert found["exact"] == found["plain"]
    return {"exact": found["exact"], "text": found["text"]}


@pytest.mark.parametrize("name", list(SETUPS)[1:])
def test_exact_results_have_one_fingerprint(name):
    assert exact_part(report(name)) == exact_part(report("as it is"))


def test_native_results_have_several():
    """The control: the same matrix tells native results apart."""
    assert len({report(name)["native"] for name in SETUPS}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_SETUPS)
def test_exact_results_have_one_fingerprint_over_the_whole_matrix(name):
    assert exact_part(report(name)) == exact_part(report("as it is"))


@pytest.mark.slow
def test_other_interpreters_have_the_same_fingerprint():
    commands = [
        part.strip() for part in os.environ.get("MDLM_INTERP_PROBE_PYTHONS", "").split(";") if part.strip()
    ]
    if not commands:
        pytest.skip("MDLM_INTERP_PROBE_PYTHONS names no other interpreters")
    for command in commands:
        found = run(shlex.split(command), {})
        assert exact_part(found) == exact_part(report("as it is")), found["machine"]


@pytest.mark.slow
def test_a_cuda_device_has_the_same_fingerprint():
    """The CPU sibling is every other test of this file."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert exact_part(run([sys.executable], {"PROBE_DEVICE": "cuda"})) == exact_part(report("as it is"))
