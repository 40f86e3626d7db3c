"""The program's own name, as it stands in the commands that it suggests, and the words after it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from mdlm_interp.program import command_line, counted, invocation


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file named mdlm-interp in a directory that the shell does not search."""
    program = tmp_path / "bin" / "mdlm-interp"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", "")
    return program


def test_a_program_that_the_shell_finds_goes_by_its_name(installed, monkeypatch):
    monkeypatch.setenv("PATH", str(installed.parent))
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert invocation() == "mdlm-interp"


def test_a_program_that_the_shell_does_not_find_goes_by_its_path(installed, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert invocation() == str(installed)


def test_another_program_of_the_same_name_is_not_suggested(installed, tmp_path, monkeypatch):
    other = tmp_path / "other" / "mdlm-interp"
    other.parent.mkdir()
    other.touch(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert invocation() == str(installed)


def test_a_module_run_by_python_is_called_so(installed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/mdlm_interp/__main__.py"])
    assert invocation() == f"{sys.executable} -m mdlm_interp"


def test_a_shell_reads_a_suggested_command_as_the_words_that_were_meant(installed, monkeypatch):
    spaced = installed.parent.rename(installed.parent.with_name("a bin")) / installed.name
    monkeypatch.setattr(sys, "argv", [str(spaced)])
    words = ["info", "a b.zarr", "it's $HOME", "*", ""]
    assert shlex.split(command_line(*words, Path("c d"))) == [str(spaced), *words, "c d"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1024, "1,024 rows")]
)
def test_one_is_singular(number, text):
    assert counted(number, "row") == text


def test_a_plural_without_an_s_is_given():
    assert [counted(number, "batch", "batches") for number in (1, 3)] == ["1 batch", "3 batches"]
