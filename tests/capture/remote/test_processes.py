"""Processes that are killed, or write together, leave the bytes of one that was not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capture import CaptureConfig
from capture.manifest import MANIFEST, from_bytes
from capture.places import Directory
from capture.remote import ObjectStore
from tests.capture.remote.stores import contents, small


def command(config: CaptureConfig, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "mdlm_interp", "capture", "run", *map(str, config.files), "--model", config.model,
        "--length", "24", "--seed", "5", "--batch-size", "4", "--shard-rows", "256", "--hooks",
        ",".join(config.hooks), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(
    model_directory: Path, texts: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> CaptureConfig:
    """All the text, into a directory."""
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    return small(model_directory, texts, out, max_sequences=None)


@pytest.fixture(scope="module")
def alone(whole: CaptureConfig) -> dict[str, bytes]:
    """What one process writes."""
    subprocess.run(command(whole, "--out", whole.out), check=True, capture_output=True)
    return contents(Directory(Path(whole.out)))


def committed(place: ObjectStore) -> int:
    content = place.read(MANIFEST)
    return 0 if content is None else len(from_bytes(content, MANIFEST).shards)


@pytest.mark.slow
def test_a_killed_writer_is_followed_by_the_next_to_the_same_bytes(whole, alone, url, through):
    ours = command(whole, "--out", url, "--endpoint", through.endpoint)
    place = ObjectStore(url, endpoint=through.endpoint)
    for goal in (0, 1, 2):
        # Slow enough that it is still there to be killed.
        through.fault = lambda method, path: time.sleep(0.02 if method == "PUT" else 0)
        with subprocess.Popen(ours, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and (committed(place) < goal or "rank-0.lock" not in place.names()):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert "rank-0.lock" in place.names()
        assert committed(place) >= goal
    subprocess.run(ours, check=True, capture_output=True)
    assert contents(place) == alone


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_process(whole, alone, url, service):
    there = ["--out", url, "--endpoint", service, "--world-size", "2"]
    ours = [command(whole, *there, "--rank", str(rank)) for rank in (0, 1)]
    processes = [subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in ours]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(ObjectStore(url, endpoint=service)) == alone
