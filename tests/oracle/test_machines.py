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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle import golden

PROBE = Path(__file__).with_name("machine_probe.py")

# Each value of each setting stands in one of these at least; a process tries several numbers of threads, and the
# first of them makes its first calls, with more threads than there are cores where it is 4 or 8.
SETUPS: dict[str, dict[str, str]] = {
    "as it is": {"PROBE_THREADS": "1,2,4"},
    "default": {
        "PROBE_THREADS": "4,1,2",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "avx2": {
        "PROBE_THREADS": "2,4,1",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "avx512": {
        "PROBE_THREADS": "1,4",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_CBWR": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
    "oversubscribed": {"OMP_NUM_THREADS": "8", "PROBE_THREADS": "8,2", "ATEN_CPU_CAPABILITY": "avx2"},
    "oversubscribed, fixed products": {
        "OMP_NUM_THREADS": "8",
        "PROBE_THREADS": "8",
        "MKL_CBWR": "COMPATIBLE",
    },
}
AT_A_TIME = 2
"""Processes that run together: enough for all cores of a small machine, and they oversubscribe each other."""

MORE_SETUPS: dict[str, dict[str, str]] = {
    **{f"{n} threads": {"PROBE_THREADS": str(n)} for n in (1, 2, 4)},
    **{f"ATen {isa}": {"ATEN_CPU_CAPABILITY": isa} for isa in ("default", "avx2", "avx512")},
    **{f"MKL {branch}": {"MKL_CBWR": branch} for branch in ("COMPATIBLE", "AVX2", "AVX512")},
    **{f"oneDNN {isa}": {"ONEDNN_MAX_CPU_ISA": isa} for isa in ("SSE41", "AVX2", "AVX512_CORE")},
    **{f"MKL instructions {isa}": {"MKL_ENABLE_INSTRUCTIONS": isa} for isa in ("SSE4_2", "AVX2")},
    **{f"OpenBLAS {core}": {"OPENBLAS_CORETYPE": core} for core in ("Prescott", "Haswell", "SkylakeX")},
    "plain path": {"MDLM_INTERP_EXACT_PATH": "plain"},
    "compiled for an old processor": {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""},
}


def run(command: list[str], settings: dict[str, str]) -> dict[str, Any]:
    ours = ("MKL_", "ATEN_", "ONEDNN_", "OPENBLAS_", "OMP_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
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


def runs_here(settings: dict[str, str]) -> bool:
    """Whether this processor has what is forced on it: torch takes the word for it and would crash."""
    wanted = settings.get("ATEN_CPU_CAPABILITY", "default").upper()
    has = torch.backends.cpu.get_cpu_capability()
    return wanted in ("DEFAULT", has) or (wanted == "AVX2" and has == "AVX512")


@cache
def report(name: str) -> dict[str, Any]:
    return run([sys.executable], {**SETUPS, **MORE_SETUPS}[name])


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """What each of SETUPS gives, by its name."""
    names = [name for name, settings in SETUPS.items() if runs_here(settings)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return dict(zip(names, pool.map(report, names), strict=True))


def exact_part(found: dict[str, Any]) -> dict[str, Any]:
    """One set of hashes, whatever the path and the threads, and the witness's for its short sequence."""
    assert len(found["exact"]) == 1, found
    assert found["witness"] == found["exact"][0][-1], found
    return {"exact": found["exact"], "text": found["text"]}


@pytest.mark.parametrize("name", list(SETUPS)[1:])
def test_exact_results_have_one_fingerprint(name, reports):
    if name not in reports:
        pytest.skip("this processor lacks what the set-up forces on it")
    assert exact_part(reports[name]) == exact_part(reports["as it is"])


def test_the_fingerprint_is_the_golden_one(reports):
    golden_one = next(file for file in golden.packaged_goldens() if file.stem == "synthetic")
    assert exact_part(reports["as it is"])["exact"][0][0] == golden.load(golden_one)["fingerprint"]


def test_native_results_have_several(reports):
    """The control: the same matrix tells native results apart."""
    assert len({digest for found in reports.values() for digest in found["native"]}) > 1


def test_the_set_ups_name_every_value_of_every_setting():
    """What CI tries, and what the README's table says."""
    tried: dict[str, set[str]] = {}
    for settings in SETUPS.values():
        for key, value in settings.items():
            tried.setdefault(key, set()).update(value.split(","))
    assert tried["PROBE_THREADS"] == {"1", "2", "4", "8"}
    assert tried["ATEN_CPU_CAPABILITY"] == {"default", "avx2", "avx512"}
    assert tried["MKL_CBWR"] == {"COMPATIBLE", "AVX2", "AVX512"}
    assert tried["ONEDNN_MAX_CPU_ISA"] == {"SSE41", "AVX2", "AVX512_CORE"}
    assert tried["OPENBLAS_CORETYPE"] == {"Prescott", "Haswell", "SkylakeX"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_SETUPS)
def test_exact_results_have_one_fingerprint_over_the_whole_matrix(name):
    if not runs_here(MORE_SETUPS[name]):
        pytest.skip("this processor lacks what the set-up forces on it")
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
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert exact_part(run([sys.executable], {"PROBE_DEVICE": "cuda"})) == exact_part(report("as it is"))
