"""The README is true: every block in it runs, and its pictures and paths exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mdlm_interp.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^(<!-- \w+ -->\n)?```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for _, found, body in BLOCKS if found == language]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own, with the text file that the README's commands read."""
    monkeypatch.chdir(tmp_path)
    demo = (ROOT / "mdlm_interp" / "assets" / "demo.txt").read_text("utf-8")
    (tmp_path / "text.txt").write_text(demo, "utf-8")
    return tmp_path


def test_every_block_is_of_a_kind_that_something_runs():
    """bash blocks are run by .ci/run, each named by a comment; python and console blocks by this file."""
    assert {language for _, language, _ in BLOCKS} == {"bash", "python", "console"}
    named = [comment.strip() for comment, language, _ in BLOCKS if language == "bash"]
    assert named == ["<!-- demo -->", "<!-- test -->"]
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "readme_block demo" in script
    assert "readme_block test" in script


def test_the_python_and_console_blocks_run_in_order(here, capsys):
    """Exact: each command exits with 0; a python block runs as a user would paste it."""
    for _, language, body in BLOCKS:
        if language == "python":
            exec(compile(body, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102  (our own text)
        elif language == "console":
            for line in body.strip().splitlines():
                program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
                assert program == "mdlm-interp"
                assert main(arguments) == 0, line
    assert (here / "run.zarr" / "zarr.json").exists()
    assert (here / "exported-model" / "modeling_mdlm.py").exists()
    assert capsys.readouterr().out


def test_every_command_that_the_readme_shows_exists():
    shown = re.findall(
        r"mdlm-interp ([a-z-]+(?: (?:run|info|train|eval|verify|fingerprint|record|sample|export|import)\b)?)",
        TEXT,
    )
    unknown = {name for name in shown if name not in COMMANDS}
    assert unknown == set()
    assert len(shown) > 8


def test_pictures_and_paths_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT) + re.findall(
        r"`((?:configs|mdlm_interp)/[\w./]*)`", TEXT
    ):
        assert (ROOT / path).exists(), path
