"""The demo on a tiny model: every step runs, everything promised is there, and its next commands work."""

import json
import shlex

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.errors import OutputExistsError
from mdlm_interp.program import invocation
from transcoder.demo import make_directory


@pytest.fixture(scope="module")
def demo(model_directory, tmp_path_factory):
    """One run of the demo, its output and where it was run."""
    import contextlib
    import io
    import os

    place = tmp_path_factory.mktemp("demo")
    before = os.getcwd()
    os.chdir(place)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            small = ["--n-features", "24", "--k", "4", "--train-steps", "6", "--n-ablations", "3"]
            assert main(["demo", "--model", str(model_directory), *small]) == 0
    finally:
        os.chdir(before)
    return out.getvalue(), place


def test_the_six_steps_are_announced_in_order(demo):
    lines = [line for line in demo[0].splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == [f"[{number}/6]" for number in range(1, 7)]


def test_everything_it_shows_is_there(demo):
    out, place = demo
    assert out.count("[MASK]") >= 4
    assert "mask 1: " in out
    assert "| layer |" in out
    assert "likeliest words before and after ablating layer" in out
    assert "| share of the MLPs' contribution recovered" in out
    report = place / "mdlm-demo" / "report"
    for name in ("report.md", "fvu.png", "nelbo.png", "density.png", "training.png", "effects.png"):
        assert f"mdlm-demo/report/{name}" in out
        assert (report / name).stat().st_size > 0
    assert len(json.loads((report / "effects.json").read_text())["effects"]) == 3


def test_the_commands_to_try_next_work(demo, monkeypatch, capsys):
    out, place = demo
    monkeypatch.chdir(place)
    commands = [line.strip() for line in out.split("try next:")[1].splitlines() if line.strip()]
    assert len(commands) == 4
    for command in commands:
        assert command.startswith(f"{invocation()} ")
        words = shlex.split(command.removeprefix(invocation()))
        short = ["--train.steps", "2", "--n-features", "32"] if "train" in words else []
        kept = list(words)
        for option in short[::2]:
            at = kept.index(option)
            del kept[at : at + 2]
        assert main([*kept, *short]) == 0, capsys.readouterr().err
    assert {path.name for path in (place / "mdlm-demo").iterdir()} == {
        "activations.zarr", "clt", "clt-wide", "report", "report-2"
    }  # fmt: skip


def test_the_default_directory_is_the_first_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(make_directory(None)) for _ in range(3)] == ["mdlm-demo", "mdlm-demo-2", "mdlm-demo-3"]


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is not empty; choose another --out"):
        make_directory(tmp_path)
    with pytest.raises(OutputExistsError, match="is not empty"):
        make_directory(tmp_path / "mine.txt")
    assert make_directory(tmp_path / "new").is_dir()
