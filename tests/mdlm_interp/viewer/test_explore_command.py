"""`mdlm-interp explore trajectory`, as typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.decoding import Trajectory
from tests.mdlm_interp.viewer.vocabulary import STORY, written


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["explore", "trajectory", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_page_is_one_file_and_never_written_over_another_unasked(capsys, saved, tmp_path: Path):
    file = tmp_path / "page.html"
    assert run(capsys, saved, "--out", file) == (0, f"{file}: open it in a browser\n", "")
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]
    first = file.read_text("utf-8")
    assert "<h1>Decoding: run</h1>" in first
    code, out, error = run(capsys, saved, "--out", file, "--title", "Other")
    assert (code, out) == (2, "")
    assert "page.html exists; choose another path, or replace it with --overwrite" in error
    assert file.read_text("utf-8") == first
    code, _, error = run(capsys, tmp_path / "nowhere", "--out", file)  # asked before any work is done
    assert "page.html exists" in error
    assert run(capsys, saved, "--out", file, "--title", "Other", "--overwrite")[0] == 0
    assert "<h1>Other</h1>" in file.read_text("utf-8")


def test_without_a_file_the_steps_are_shown_here(capsys, saved):
    code, out, error = run(capsys, saved, "--sequences", 1)
    assert (code, error) == (0, "")
    assert out.splitlines()[0] == "step 0/4  4 masked  0 new | The ___ ___ ___ ___"
    assert out.splitlines()[-1] == "step 4/4  t 0.200  0 masked  1 new | The dog was very[ big]"
    assert len(out.splitlines()) == 5


def test_the_pages_alternatives_are_those_that_sample_keeps(capsys, tmp_path: Path):
    arguments = [
        "--length",
        "8",
        "--steps",
        "2",
        "--alternatives",
        "5",
        "--trajectory",
        str(tmp_path / "run"),
    ]
    assert main(["sample", *arguments]) == 0
    trajectory = Trajectory.load(tmp_path / "run")
    assert trajectory.top_tokens.shape == (2, 1, 8, 5)
    assert run(capsys, tmp_path / "run", "--out", tmp_path / "page.html")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--overwrite",), "overwrite and title are about a page; name its file with --out"),
        (("--sequences", "0,1"), "the terminal shows one sequence first, got 2"),
        (("--sequences", "2"), r"sequences must be in [0, 2), the trajectory's rows; got 2"),
        (
            ("--sequences", "5", "--out", "x.html"),
            r"sequences must be in [0, 2), the trajectory's rows; got 5",
        ),
        (("--tokenizer", "nowhere"), "nowhere"),
        (("--speed", "0"), "speed must be in [0.25, 64] steps a second, got 0"),
    ],
)
def test_mistakes_are_one_line(capsys, saved, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(capsys, saved, *arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_trajectory_is_told(capsys, tmp_path):
    code, _, error = run(capsys, tmp_path, "--out", tmp_path / "page.html")
    assert code == 2
    assert "is it a trajectory?" in error


@pytest.mark.parametrize("page", [False, True])
def test_another_models_tokenizer_is_refused(capsys, tmp_path, page):
    written(STORY).save(tmp_path / "run")
    out = ["--out", tmp_path / "page.html"] if page else []
    code, _, error = run(capsys, tmp_path / "run", *out)
    assert code == 2
    assert "the trajectory's mask is token 11, the tokenizer's 4095; name the tokenizer of the model" in error


def test_alternatives_without_a_trajectory_are_refused(capsys):
    assert main(["sample", "--alternatives", "5"]) == 2
    assert "alternatives are kept in a trajectory, at least 0 of them, got 5" in capsys.readouterr().err
