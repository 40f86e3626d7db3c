"""metrics.jsonl: what is not a line of ours is an error with its number, and another's file is left alone."""

import json
import shutil
from dataclasses import replace

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.errors import CheckpointError, OutputExistsError
from transcoder.config import METRICS
from transcoder.run import train
from transcoder.trainer import Trainer
from transcoder.training_log import read_log, trim_log

ENTRY = {"step": 1, "rows": 2, "loss": 0.5, "fvu": 0.5, "l0": 2.0, "dead": 0, "fvu_by_layer": [0.4, 0.6]}
GOOD = json.dumps(ENTRY)


class KilledError(Exception):
    """Stands for a process that ends without warning."""


@pytest.fixture
def killed(run_config, monkeypatch):
    """The directory of a run that died after its first line of metrics, before its first state."""
    original = Trainer.step

    def step(self):
        if self.step_number == 4:
            raise KilledError
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KilledError):
            train(run_config)
    assert [line["step"] for line in read_log(run_config.out / METRICS)] == [3]
    return run_config.out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("garbage", "Expecting value"),
        (GOOD[:40], "Unterminated string|Expecting"),
        ("{}", "no number 'step'"),
        ("[1]", "no JSON object"),
        ("", "Expecting value"),
        ("\x00\x01", "Expecting value"),
        (json.dumps({**ENTRY, "fvu": float("nan")}), "no number or null 'fvu'"),
        (json.dumps({**ENTRY, "fvu_by_layer": []}), "no list of numbers or nulls 'fvu_by_layer'"),
        (json.dumps({**ENTRY, "fvu_by_layer": [1.0]}), "another number of layers than the first line has"),
    ],
)
def test_a_line_that_is_none_is_an_error_with_file_and_number(tmp_path, line, reason):
    path = tmp_path / METRICS
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(
        CheckpointError, match=rf"metrics.jsonl, line 2 is not a line of .* \({reason}.*restore"
    ):
        read_log(path)
    with pytest.raises(CheckpointError, match="line 2 is not a line"):
        trim_log(path, 5)
    assert path.read_text() == f"{GOOD}\n{line}\n{GOOD}\n"


def test_bytes_that_are_no_text_are_an_error_with_their_line(tmp_path):
    (tmp_path / METRICS).write_bytes(GOOD.encode() + b"\n\xff\xfe{}\n")
    with pytest.raises(CheckpointError, match="line 2 is not a line of training metrics"):
        read_log(tmp_path / METRICS)


def test_a_truncated_last_line_is_an_error_to_read_and_dropped_to_continue(tmp_path):
    path = tmp_path / METRICS
    path.write_text(f"{GOOD}\n{GOOD[:30]}")
    with pytest.raises(CheckpointError, match="line 2 is not a line"):
        read_log(path)
    trim_log(path, 5)
    assert read_log(path) == [ENTRY]


def test_evaluating_with_damaged_metrics_is_one_line(
    store, model_directory, trained_directory, tmp_path, capsys
):
    shutil.copytree(trained_directory, tmp_path / "clt")
    metrics = tmp_path / "clt" / METRICS
    metrics.write_text(metrics.read_text() + "{garbage}\n")
    command = ["clt", "eval", tmp_path / "clt", store.path, "--model", model_directory]
    assert main(list(map(str, command))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{metrics}, line 16 is not a line of training metrics" in error
    assert not (tmp_path / "clt" / "eval").exists()


def test_evaluating_without_metrics_leaves_out_their_curve(
    store, model_directory, trained_directory, tmp_path, capsys
):
    shutil.copytree(trained_directory, tmp_path / "clt")
    for content in (None, ""):
        (tmp_path / "clt" / METRICS).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "clt" / METRICS).write_text(content)
        out = tmp_path / f"report-{content is None}"
        command = ["clt", "eval", tmp_path / "clt", store.path, "--model", model_directory, "--out", out]
        assert main(list(map(str, command))) == 0
        assert not (out / "training.png").exists()


@pytest.mark.parametrize("content", ["somebody's notes\n", GOOD + "\n"])
def test_metrics_of_no_run_here_are_left_alone(run_config, content):
    run_config.out.mkdir()
    (run_config.out / METRICS).write_text(content)
    with pytest.raises(
        OutputExistsError, match=r"metrics.jsonl exists and there is no run .* choose another out"
    ):
        train(run_config)
    assert (run_config.out / METRICS).read_text() == content
    assert [path.name for path in run_config.out.iterdir()] == [METRICS]


def test_a_run_that_died_before_its_first_state_starts_again(run_config, killed, tmp_path):
    again = train(run_config)
    whole = train(replace(run_config, out=tmp_path / "whole"))
    assert [line["step"] for line in read_log(killed / METRICS)] == [3, 6, 9, 12]
    ours, theirs = again.state_dict(), whole.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_metrics_of_a_run_with_other_settings_are_left_alone(run_config, killed):
    before = (killed / METRICS).read_bytes()
    with pytest.raises(
        CheckpointError, match=r"was trained with n_features = 64, the run asks for 32; restore"
    ):
        train(replace(run_config, n_features=32))
    assert (killed / METRICS).read_bytes() == before
