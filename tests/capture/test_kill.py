"""kill -9 at random moments, then the same command again: no row lost, no byte different.

`MDLM_INTERP_KILLS=50 python -m pytest tests/capture/test_kill.py -m slow` makes as many kills as it says.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capture import open_store

KILLS = int(os.environ.get("MDLM_INTERP_KILLS", "5"))
ROWS = 4 * 1024 * KILLS
HOOKS = "blocks.*.hook_resid_post,blocks.*.mlp.hook_in,blocks.*.hook_mlp_out"
COMMAND = [
    sys.executable, "-m", "mdlm_interp", "capture", "run", "--hooks", HOOKS, "--positions", "masked",
    "--shard-rows", "512", "--max-rows", str(ROWS),
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of made-up words, enough for all rows."""
    draw = random.Random(0)
    words = ["".join(draw.choice("aeioubdgklmnrst") for _ in range(draw.randint(2, 7))) for _ in range(500)]
    lines = [
        json.dumps({"text": " ".join(draw.choice(words) for _ in range(draw.randint(50, 400)))})
        for _ in range(max(ROWS // 60, 1000))
    ]
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(lines))
    return file


def shards(store: Path) -> int:
    """Committed shards, as the manifest says at this moment."""
    try:
        manifest = json.loads((store / "manifest.json").read_text())
    except FileNotFoundError:
        return 0
    return len(manifest["shards"])


def complete(store: Path) -> bool:
    return bool(json.loads((store / "manifest.json").read_text())["complete"])


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_capture_survives_being_killed(text, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    subprocess.run([*COMMAND, str(text), "--out", str(whole)], env=environment, check=True)
    draw, kills = random.Random(1), 0
    for _ in range(20 * KILLS):
        process = subprocess.Popen([*COMMAND, str(text), "--out", str(killed)], env=environment)
        before = shards(killed)
        goal = before + draw.randint(0, 8)
        while process.poll() is None and shards(killed) < goal:
            time.sleep(0.001)
        # Writing goes on beside the forward pass, so any moment from here on finds it somewhere.
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        assert shards(killed) >= before, "committed rows were lost"
        if kills == KILLS:
            subprocess.run([*COMMAND, str(text), "--out", str(killed)], env=environment, check=True)
            break
    assert kills == KILLS, "the text ended before the kills did"
    assert complete(killed)
    left, right = contents(whole), contents(killed)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


def peak_bytes(command: list[str]) -> int:
    """Largest resident size of a command, by the system's account of finished children."""
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], check=True, capture_output=True, text=True
    )
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(text, tmp_path):
    peaks = []
    for rows in (30_000, 300_000):
        command = [*COMMAND[:-1], str(rows), "--hooks=blocks.*.hook_mlp_out", str(text)]
        command.remove("--hooks")
        command.remove(HOOKS)
        peaks.append(peak_bytes([*command, "--out", str(tmp_path / f"{rows}.zarr")]))
        assert len(open_store(tmp_path / f"{rows}.zarr")) > 0.95 * rows, "the text ended before"
    # All memory that is lent has been touched by 30,000 rows; 270,000 more are 1 GB of activations.
    assert peaks[1] < peaks[0] + 30e6, peaks
