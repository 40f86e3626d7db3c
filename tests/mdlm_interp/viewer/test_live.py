"""Decoding in a terminal: keys, the end, Ctrl-C and errors; and lines where there is no terminal."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.errors import ConfigError
from mdlm_interp.viewer import Film
from mdlm_interp.viewer.keys import Keys
from mdlm_interp.viewer.player import Player
from tests.mdlm_interp.viewer.pseudo_terminal import CLOSE, COMMAND, CURSOR, OPEN, ROOT, STYLE, Terminal
from tests.mdlm_interp.viewer.vocabulary import STORY, WORDS, written

LIVE = ("sample", "One day,", "--length", 12, "--by", "left_to_right", "--steps", 8, "--live")
SLOW = ("--speed", 0.25)
"""Four seconds a step: what happens sooner is the keys' doing."""


def assert_restored(terminal: Terminal) -> None:
    assert terminal.is_as_before()
    assert terminal.output.count(OPEN) == terminal.output.count(CLOSE) == 1
    assert terminal.output.rindex(CURSOR) > terminal.output.rindex(OPEN)


def test_the_keys_of_a_replay(saved):
    with Terminal(COMMAND, "explore", "trajectory", saved, *SLOW) as terminal:
        terminal.wait_for(r"step 0/4.*q quit")
        assert not terminal.is_as_before()
        terminal.press(" ")
        terminal.wait_for("step 0/4.*paused")
        assert terminal.is_silent(0.5)
        terminal.press("\x1b[C")  # right
        terminal.wait_for("step 1/4.*One day")
        terminal.press("n")
        terminal.wait_for("step 2/4")
        terminal.press("\x1b[D")
        terminal.wait_for("step 1/4")
        terminal.press("\x1b[B")  # down: the other sequence
        terminal.wait_for("sequence 2 of 2.*The dog")
        terminal.press("\x1b[F")  # end
        terminal.wait_for("step 4/4")
        terminal.press("r")
        terminal.wait_for("step 0/4")
        terminal.press(" ++++++++")  # on, and fast
        terminal.wait_for("step 4/4.*paused")
        assert terminal.is_silent(0.5)
        assert terminal.process.poll() is None
        terminal.press("q")
        assert terminal.finish() == 0
        assert_restored(terminal)
        assert "The dog was very big" in STYLE.sub("", terminal.output.rpartition(CLOSE)[2])


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interruption_gives_the_terminal_back(saved, how):
    with Terminal(COMMAND, "explore", "trajectory", saved, *SLOW) as terminal:
        terminal.wait_for("step 0/4.*q quit")
        if how == "ctrl-c":
            terminal.press("\x03")
        else:
            terminal.process.send_signal(signal.SIGTERM)
        assert terminal.finish() == 130
        assert_restored(terminal)
        assert "interrupted" in terminal.output.rpartition(CLOSE)[2]


def test_an_error_gives_the_terminal_back_and_is_seen():
    statements = (
        "from mdlm_interp.viewer.player import live_view\n"
        "from mdlm_interp import load_tokenizer\n"
        "with live_view(load_tokenizer('bundled')): raise RuntimeError('weights on fire')"
    )
    with Terminal(statements) as terminal:
        assert terminal.finish() == 1
        assert_restored(terminal)
        assert "weights on fire" in terminal.output.rpartition(CLOSE)[2]


def test_a_run_waits_for_the_viewer_and_goes_on_without(capsys):
    """The same text as without a view, whatever was pressed."""
    assert main([*map(str, LIVE[:-1])]) == 0
    text = capsys.readouterr().out.strip()
    with Terminal(COMMAND, *LIVE) as terminal:
        terminal.wait_for(r"step 1/8")
        terminal.press(" ")
        terminal.wait_for("paused")
        assert terminal.is_silent(0.5)
        terminal.press("q")
        assert terminal.finish() == 0
        assert_restored(terminal)
        after = terminal.output.rpartition(CLOSE)[2]
        assert text.split("\n")[-1].strip() in after
        assert "step" not in after


def test_keys_that_nobody_used_do_not_reach_the_shell(saved):
    with Terminal(COMMAND, "explore", "trajectory", saved, *SLOW) as terminal:
        terminal.wait_for("step 0/4.*q quit")
        terminal.press("qrm -r x\n")
        assert terminal.finish() == 0
        assert "rm -r x" not in terminal.output
        assert terminal.is_as_before()


def test_without_a_terminal_each_step_is_a_line(capsys):
    assert main([*map(str, LIVE[:-1])]) == 0
    text = capsys.readouterr().out
    assert main([*map(str, LIVE)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.removesuffix(text).splitlines()
    assert captured.out.endswith(text)
    assert captured.err == ""
    assert [line.split()[1] for line in lines] == [f"{step}/8" for step in range(9)]
    assert "\x1b" not in captured.out
    assert lines[0].count("___") == 9 - lines[0].count("<|endoftext|>")


def test_a_pipe_is_no_terminal_whatever_the_environment_says(saved):
    result = subprocess.run(
        [sys.executable, "-m", "mdlm_interp", "explore", "trajectory", saved],
        cwd=ROOT,
        env={"PATH": "", "FORCE_COLOR": "1", "TERM": "xterm"},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5
    assert "?1049" not in result.stdout


def test_keys_that_are_no_terminal_only_wait():
    with open("/dev/null") as nothing, Keys(nothing) as keys:
        assert not keys.available
        assert keys.get(0.01) is None


def test_the_speed_has_bounds():
    film = Film.of(written(STORY))
    with pytest.raises(ConfigError, match=r"speed must be in \[0.25, 64\] steps a second, got 0"):
        Player(film, WORDS, speed=0.0)
