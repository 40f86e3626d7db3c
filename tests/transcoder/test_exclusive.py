"""Two runs never write to one directory: the second is one line, and a lock ends with whoever held it."""

import os
import signal
import subprocess
import sys

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.errors import CheckpointError
from transcoder.exclusive import LOCK, only_run
from transcoder.run import train


def test_a_second_run_in_the_same_directory_is_one_line_and_changes_nothing(run_config, capsys):
    command = ["clt", "train", str(run_config.store), "--out", str(run_config.out), "--train.steps", "2"]
    with only_run(run_config.out):
        assert main(command) == 2
        assert [path.name for path in run_config.out.iterdir()] == [LOCK]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    remedy = "wait for it, stop it, or choose another out directory"
    assert f"{run_config.out} is being trained in by another process; {remedy}" in said
    assert not run_config.out.exists()


def test_the_lock_is_held_from_the_first_look_to_the_last_file(run_config, monkeypatch):
    seen = []

    def look(name):
        original = getattr(sys.modules["transcoder.run"], name)

        def looking(*given, **named):
            with (
                pytest.raises(CheckpointError, match="is being trained in by another process"),
                only_run(run_config.out),
            ):
                pass
            seen.append(name)
            return original(*given, **named)

        monkeypatch.setattr(f"transcoder.run.{name}", looking)

    for name in ("source_of", "prepare", "begin_log", "fit", "finish"):
        look(name)
    train(run_config)
    assert seen == ["source_of", "prepare", "begin_log", "fit", "finish"]
    assert not (run_config.out / LOCK).exists()


def test_a_killed_holder_keeps_nobody_out(tmp_path):
    out = tmp_path / "clt"
    program = f"""
import sys, time
from pathlib import Path
from transcoder.exclusive import only_run
with only_run(Path({str(out)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) or "."}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process"), only_run(out):
            pass
        holder.send_signal(signal.SIGKILL)
    assert (out / LOCK).exists()
    with only_run(out):
        assert (out / LOCK).exists()
    assert not out.exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_not_held(tmp_path, monkeypatch):
    """The file is another one by the time that the lock is there, so it is taken again."""
    import fcntl

    flock = fcntl.flock
    taken: list[int] = []

    def flocking(descriptor, how):
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flocking)
    with only_run(tmp_path):
        assert len(taken) == 2
        with pytest.raises(CheckpointError), only_run(tmp_path):
            pass
