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


PEAKS = """
import json, resource, sys
from capture.writer import StoreWriter
from mdlm_interp.__main__ import main

peaks, append = [], StoreWriter.append

def recording(self, rows):
    append(self, rows)
    peaks.append((rows.start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

StoreWriter.append = recording
code = main(sys.argv[1:])
peaks.append((peaks[-1][0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
print(json.dumps(peaks))
sys.exit(code)
"""
"""The command line, and at last the largest resident size so far [kB] at the first row of each batch."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(text, tmp_path):
    """Bounded: the 30,000th row is past all that is lent and cached; 270,000 more are 1 GB of activations.

    The allocator keeps a little more as threads come upon one another by chance, less and less often; what is kept
    for each row would be kept in the second half too.
    """
    options = ["--hooks=blocks.*.hook_mlp_out", "--positions=masked", "--shard-rows=512", "--max-rows=300000"]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, "capture", "run", str(text), *options, "--out", str(tmp_path / "run.zarr")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert len(open_store(tmp_path / "run.zarr")) > 290_000, "the text ended before"
    peaks = [(row, kilobytes * 1024) for row, kilobytes in json.loads(done.stdout.splitlines()[-1])]
    early, middle = (next(size for row, size in peaks if row >= rows) for rows in (30_000, 150_000))
    assert peaks[-1][1] < 1.1 * early, peaks
    assert peaks[-1][1] < middle + 15e6, peaks
