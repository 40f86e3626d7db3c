"""`mdlm-interp sample`, as typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.decoding import Trajectory
from mdlm_interp.decoding.commands import SampleConfig
from mdlm_interp.errors import ConfigError

SHORT = ("--length", "12", "--prompt", "One day,")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["sample", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--by", "analytic", "--steps", 5),
        ("--by", "first_hitting"),
        ("--by", "confidence", "--per-step", 3, "--temperature", 0),
        ("--by", "entropy", "--steps", 3, "--top-k", 20, "--top-p", 0.9),
        ("--by", "margin", "--threshold", 0.5),
        ("--by", "left_to_right", "--steps", 4, "--block-length", 4),
        ("--by", "random", "--suppress", "5,6", "--guidance", 0.5, "--steps", 4),
        ("--positions", "11,10,9,8,7,6,5,4,3,2,1,0", "--steps", 6),
        ("--remask", "loop", "--steps", 12),
        ("--remask", "conf", "--eta", 1, "--steps", 6),
        ("--remask", "low_confidence", "--by", "confidence", "--steps", 8),
        ("--rewrite", "least_confident", "--steps", 3),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)) or "default",
)
def test_every_sampler_can_be_asked_for(capsys, arguments):
    code, out, error = run(capsys, *SHORT, *arguments)
    assert (code, error) == (0, "")
    assert out.startswith("One day,")
    assert "[MASK]" not in out
    assert run(capsys, *SHORT, *arguments)[1] == out


def test_batches_and_seeds(capsys):
    two = run(capsys, *SHORT, "--n", 3, "--batch-size", 2, "--steps", 4)[1]
    assert two == run(capsys, *SHORT, "--n", 3, "--batch-size", 1, "--steps", 4)[1]
    assert two.count("---\n") == 2
    assert two != run(capsys, *SHORT, "--n", 3, "--seed", 1, "--steps", 4)[1]


def test_a_trajectory_is_written_and_never_over_another(capsys, tmp_path: Path):
    arguments = (*SHORT, "--steps", 4, "--n", 2, "--trajectory", tmp_path / "run")
    assert run(capsys, *arguments)[0] == 0
    found = Trajectory.load(tmp_path / "run")
    assert found.final.shape == (2, 12)
    assert found.sampler["schedule"]["steps"] == 4
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "exists and is not empty" in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"per_step": 2}, "per_step needs an order, got by 'ancestral'; add --by confidence"),
        ({"by": "confidence", "per_step": 2, "steps": 3}, "steps and per_step both say how many positions"),
        ({"by": "first_hitting", "steps": 3}, "first_hitting fills one position a step; leave steps out"),
        ({"by": "random", "remask": "cap"}, "remask cap is a kind of ancestral sampling; leave by"),
        ({"by": "random", "positions": (1,)}, "positions are an order of their own, got by 'random' too"),
        ({"rewrite": "most_confident", "by": "random"}, "rewrite has an order of its own"),
        ({"by": "random", "per_step": 1, "remask": "random"}, "taking back needs a schedule with a number"),
        (
            {"n": 3, "batch_size": 2, "trajectory": Path("x")},
            "a trajectory is of one batch: n is 3, batch_size 2",
        ),
        ({"top_p": 2.0}, r"top_p must be in \(0, 1\]"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eta": 0.5}, "eta is the strength of ReMDM, got remask none; add --remask cap or"),
        (
            {"by": "random", "remask": "random", "eta": 0.1},
            "eta is the strength of ReMDM, got remask random",
        ),
        ({"rewrite": "least_confident", "per_step": 0}, "per_step must be at least 1, got 0"),
        ({"rewrite": "most_confident", "threshold": 0.5}, "most_confident rewrites whatever the confidence"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        SampleConfig(**given)


def test_help_names_every_option(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for option in ("--by VALUE", "--per-step VALUE", "--remask VALUE", "--trajectory VALUE", "first_hitting"):
        assert option in out
