"""The demo on a tiny model: every step runs, everything promised is there, and its next commands work."""

import json
import re
import shlex

import pytest

from capture import open_store
from mdlm_interp.__main__ import main
from mdlm_interp.errors import OutputExistsError
from mdlm_interp.program import invocation
from mdlm_interp.tokenizers import Tokenizer
from transcoder.demo import make_directory
from transcoder.demo_report import effects, plot_effects
from transcoder.effects import FeatureEffect, PredictionEffects
from transcoder.report import MEAN_NOTE


class Words(Tokenizer):
    """A tokenizer of a few awkward tokens."""

    def __init__(self):
        pass

    texts = (" park", "park", " ", "\n", "\ufffd", " $$", "[MASK]")

    def token(self, token_id):
        return self.texts[token_id]


@pytest.fixture
def found():
    """Two effects on token 0, at positions 2 and 6."""
    common = {"probability_before": 0.5, "probability_after": 0.25, "attribution": -0.2}
    shown = [
        FeatureEffect(layer=0, feature=7, position=2, activation=1.5, logit_change=-0.5, **common),
        FeatureEffect(layer=1, feature=3, position=6, activation=0.5, logit_change=0.1, **common),
    ]
    return PredictionEffects(6, 0, shown, [(0, 0.5), (2, 0.1)], [(3, 0.4), (4, 0.2)])


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
    assert MEAN_NOTE in out
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


def test_tokens_are_shown_as_words_with_their_position(found):
    text = "\n".join(effects("a sentence", [1, 1, 5, 1, 1, 1, 6], found, Words()))
    assert "the model's first choice at position 6: park. Ablating" in text
    assert "| P(park) |" in re.sub(" +", " ", text)
    rows = re.sub(" +", " ", text)
    assert "| layer 0 feature 7 | $$ at 2 |" in rows
    assert "| layer 1 feature 3 | [MASK] at 6 |" in rows
    assert "| park | 50.0% | '\\n' | 40.0% |" in rows
    assert "| ' ' | 10.0% | part of a character | 20.0% |" in rows
    assert not re.search("[Ġ\ufffd]", text)


@pytest.mark.parametrize(("token", "word"), [(0, "park"), (5, "$$"), (4, "part of a character")])
def test_the_plot_of_effects_says_what_its_numbers_are(found, token, word):
    figure = plot_effects(PredictionEffects(6, token, found.effects, [], []), Words())
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_title() == f"Ablating one feature: effect on “{word}” at position 6"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["layer 1 feature 3, position 6", "layer 0 feature 7, position 2"]


def test_fewer_sequences_can_be_asked_for_as_a_full_disk_advises(model_directory, tmp_path, capsys):
    options = [
        "--max-sequences",
        "6",
        "--n-features",
        "24",
        "--k",
        "4",
        "--train-steps",
        "2",
        "--n-ablations",
        "1",
    ]
    assert main(["demo", "--out", str(tmp_path / "out"), "--model", str(model_directory), *options]) == 0
    assert open_store(tmp_path / "out" / "activations.zarr").n_sequences == 6
    capsys.readouterr()
