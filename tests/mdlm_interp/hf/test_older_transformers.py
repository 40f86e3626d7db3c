"""The tests of this directory on the other line of transformers."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

OLDER_LINE = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
    "safetensors==0.8.0",
    "numpy==2.4.6",
    "pyyaml==6.0.3",
    "tqdm==4.70.1",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "jaxtyping==0.3.11",
    "beartype==0.23.1",
)
"""The other transformers line; configs/constraints.txt pins the one that the rest of the suite runs on."""

NO_NETWORK = re.compile(
    "Temporary failure in name resolution|Name or service not known|nodename nor servname|getaddrinfo failed|"
    "Network is unreachable|No route to host|Connection refused|ConnectTimeout|Read timed out|ProxyError"
)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # pip may have to fetch torch
def test_this_directory_passes_on_transformers_4(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True, symlinks=os.name != "nt")
    python = str(tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    install = [python, "-m", "pip", "install", "--quiet", "--retries", "1", *OLDER_LINE]
    installed = subprocess.run(install, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if installed.returncode and (reason := NO_NETWORK.search(installed.stderr)):
        pytest.skip(f"pip reaches no package index ({reason.group()}), so transformers 4 cannot be installed")
    assert installed.returncode == 0, installed.stderr
    # The shared conftest needs packages that these tests do not.
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-m",
        "not slow",
        str(HERE),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout
