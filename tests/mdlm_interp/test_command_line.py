"""The command line: what loads, what is printed where, and which exit code comes back."""

import errno
import inspect
import os
import signal
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

from mdlm_interp import __version__
from mdlm_interp.__main__ import COMMANDS, main, wait_politely
from mdlm_interp.errors import ConfigError, StoreError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "yaml", "safetensors", "tokenizers", "huggingface_hub", "zarr", "matplotlib")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def command(monkeypatch):
    """Puts a function on the table, as the command `probe` or another name."""

    def register(function, name: str = "probe") -> None:
        module = types.ModuleType("probe_module")
        module.__dict__["target"] = function
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(COMMANDS, name, ("probe_module:target", "a probe"))

    return register


def raising(error: BaseException):
    def target(argv: list[str]) -> int:
        raise error

    return target


# The table


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_resolves_to_a_function_of_its_arguments(name):
    module, _, attribute = COMMANDS[name][0].partition(":")
    function = getattr(import_module(module), attribute)
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    assert len(required) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_names_it(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    assert f"usage: mdlm-interp {name}" in " ".join(capsys.readouterr().out.split())


# Help and version


def loaded_by(statement: str) -> list[str]:
    """Which of the heavy packages a statement imports in a fresh interpreter."""
    report = f"import sys; print('loaded', *({{*{HEAVY!r}}} & sys.modules.keys()))"
    result = python("-c", f"{statement}\n{report}")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_help_loads_nothing_heavy():
    assert loaded_by("from mdlm_interp.__main__ import main; main(['--help'])") == []
    assert loaded_by("from mdlm_interp.__main__ import main; main(['capture', '--help'])") == []


def test_the_check_of_what_is_loaded_can_fail():
    assert loaded_by("import yaml") == ["yaml"]


def test_python_m_and_the_functions_help_are_the_same_and_list_every_command(capsys):
    result = python("-m", "mdlm_interp", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == result.stdout
    for name, (_, summary) in COMMANDS.items():
        assert any(line.split() == [*name.split(), *summary.split()] for line in result.stdout.splitlines())


def test_a_groups_help_lists_the_group_only(capsys):
    assert main(["clt", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mdlm-interp clt COMMAND")
    assert "clt train" in text
    assert "capture run" not in text


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mdlm-interp {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "no command given; mdlm-interp --help lists them"),
        (["smaple"], "unknown command 'smaple'; did you mean 'sample'?"),
        (["captur", "run"], "unknown command 'captur'; did you mean 'capture'?"),
        (["capture", "rnu"], "unknown command 'capture rnu'; did you mean 'capture run'?"),
        (
            ["capture"],
            f"capture needs a command; known: {str([n for n in COMMANDS if n.startswith('capture ')])[1:-1]}",
        ),
        (["--vresion"], "unknown option --vresion; did you mean '--version'?"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(argv, line, capsys):
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"mdlm-interp: error: {line}\n")


# Running a command


def test_a_command_gets_the_arguments_after_its_name_and_its_code_comes_back(command):
    seen: list[list[str]] = []

    def target(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    command(target)
    command(target, "capture probe")
    assert main(["probe", "a", "--debug"]) == 7
    assert main(["capture", "probe", "a"]) == 7
    assert main(["--debug", "probe"]) == 7
    assert seen == [["a", "--debug"], ["a"], []]


def test_a_users_mistake_is_one_line_without_traceback(command, capsys):
    command(raising(ConfigError("first\n  second")), "capture probe")
    assert main(["capture", "probe"]) == 2
    assert capsys.readouterr() == ("", "mdlm-interp capture probe: error: first second\n")


def test_debug_adds_the_traceback_and_keeps_the_line_and_the_code(command, capsys):
    command(raising(StoreError("broken")))
    assert main(["--debug", "probe"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("StoreError: broken\nmdlm-interp probe: error: broken\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "a.zarr"), "a.zarr: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "/x: Is a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "y"), "y: No such file or directory"),
    ],
)
def test_a_path_or_disk_that_the_user_chose_is_the_users_mistake(error, line, command, capsys):
    command(raising(error))
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == f"mdlm-interp probe: error: {line}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ours"),
        ValueError("ours"),
        PermissionError(errno.EACCES, "no file named"),
        OSError(errno.EIO, "Input/output error", "/x"),
        BrokenPipeError(errno.EPIPE, "a worker's pipe, while our output is fine"),
        SystemExit(3),
    ],
)
def test_anything_else_is_a_bug_and_is_not_caught(error, command):
    command(raising(error))
    with pytest.raises(type(error)) as caught:
        main(["probe"])
    assert caught.value is error


def test_a_bug_shows_its_traceback_and_exits_with_1():
    result = python("-c", PROGRAM.format(body="raise RuntimeError('ours')"))
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("RuntimeError: ours\n")


def test_an_interrupt_is_one_line_and_exit_code_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "mdlm-interp probe: interrupted\n"


def test_the_handler_of_sigterm_is_put_back(command):
    during = []

    def target(argv: list[str]) -> int:
        during.append(signal.getsignal(signal.SIGTERM))
        return 0

    command(target)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["probe"]) == 0
    assert during == [signal.default_int_handler]
    assert signal.getsignal(signal.SIGTERM) == before


PROGRAM = """
import signal, sys, time, types
from mdlm_interp import __main__ as command_line

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored

def target(argv):
    {body}

sys.modules["probe_module"] = types.ModuleType("probe_module")
sys.modules["probe_module"].target = target
command_line.COMMANDS["probe"] = ("probe_module:target", "a probe")
sys.exit(command_line.main(["probe"]))
"""

SLEEPS = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("saved")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_command_save_and_exits_with_130(number):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=SLEEPS)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "saved\n", "mdlm-interp probe: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_ends_the_command_quietly(lines, unbuffered):
    body = f"sys.stdin.readline(); [print('x') for _ in range({lines})]; return 0"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert err == ""


def test_the_users_own_setting_for_waiting_threads_is_kept(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    wait_politely()
    assert os.environ["GOMP_SPINCOUNT"] == "2000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    wait_politely()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_politely()
    assert "GOMP_SPINCOUNT" not in os.environ
