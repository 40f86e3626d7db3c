"""`mdlm-interp explore analytics`, with and without a transcoder."""

import json

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.analysis import logit_lens, prediction_stability
from transcoder.trajectories import feature_lives


@pytest.fixture
def command(model_directory, trajectory, tmp_path):
    """Runs it into a new directory."""
    trajectory.save(tmp_path / "trajectory")

    def run(clt, *arguments):
        out = tmp_path / "out"
        given = ["--trajectory", tmp_path / "trajectory", "--out", out, "--model", model_directory]
        return main(["explore", "analytics", str(clt), *map(str, given), *map(str, arguments)]), out

    return run


def pictures(out):
    return sorted(path.name for path in out.glob("*.png"))


def test_everything_is_written_with_a_transcoder(command, trained_directory, replacement, trajectory, capsys):
    code, out = command(trained_directory, "--heads")
    assert code == 0
    assert pictures(out) == [
        "direct_attribution.png",
        "feature_onsets.png",
        "feature_overlap.png",
        "lens.png",
        "lens_by_commit.png",
        "sinks.png",
        "stability.png",
    ]
    found = json.loads((out / "analytics.json").read_text())
    assert (found["format"], found["version"]) == ("mdlm-interp trajectory analytics", 1)
    stability = prediction_stability(replacement.model, trajectory)
    assert found["stability"]["summary"]["agreement"] == stability.summary()["agreement"]
    assert len(found["stability"]["positions"]) == 14
    assert found["logit_lens"] == logit_lens(replacement.model, trajectory).summary()
    lives = feature_lives(replacement, trajectory)
    assert found["feature_onsets"] == {"layers": lives.summary(), "rates": [lives.rates(i) for i in range(3)]}
    components = [row["component"] for row in found["direct_attribution"]["components"]]
    assert "attn 1 head 1" in components
    said = capsys.readouterr().out
    assert "14 positions filled" in said
    assert "block 2 (the model's own): final token" in said
    assert "features of layer 2:" in said


def test_features_are_left_out_without_one(command, capsys):
    code, out = command("none", "--rows", "1")
    assert code == 0
    assert len(pictures(out)) == 5
    found = json.loads((out / "analytics.json").read_text())
    assert found["clt"] is None
    assert "feature_onsets" not in found
    assert {row["row"] for row in found["stability"]["positions"]} == {1}
    assert "features of layer" not in capsys.readouterr().out


def test_what_is_not_defined_is_null_and_never_nan(command):
    code, out = command("none")
    assert code == 0

    def refuse(text):
        raise AssertionError(f"{text} in the JSON")

    found = json.loads((out / "analytics.json").read_text(), parse_constant=refuse)
    # A position that the first step filled has no two steps to compare.
    first = [row for row in found["stability"]["positions"] if row["commit"] == 0]
    assert first
    assert all(row["shared"] is None for row in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", 0], "k must be at least 1, got 0"),
        (["--rows", 7], "rows must be in [0, 2), got 7"),
        (["--trajectory2", "x"], "unknown option --trajectory2; did you mean '--trajectory'?"),
    ],
)
def test_a_mistake_is_told_in_one_line(command, capsys, arguments, message):
    code, out = command("none", *arguments)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_nothing_is_overwritten(command, capsys):
    _, out = command("none")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert command("none")[0] == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
