"""The commands, as the command line calls them: what they print, write and return."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from mdlm_interp.__main__ import main
from mdlm_interp.config_files import load_config
from mdlm_interp.program import invocation
from transcoder.config import METRICS, CLTRunConfig
from transcoder.trainer import Trainer
from transcoder.training_log import read_log

SMALL = ["--n-features", "32", "--k", "4", "--train.batch-size", "64", "--train.log-every", "2"]


def run(capsys, *argv):
    code = main(list(map(str, argv)))
    return code, *capsys.readouterr()


def test_training_and_evaluating_from_the_command_line(store, model_directory, tmp_path, capsys):
    code, out, _ = run(
        capsys, "clt", "train", store.path, "--out", tmp_path / "clt", "--train.steps", "4", *SMALL
    )
    assert code == 0
    assert "n_layers=3, d_model=32, n_features=32, k=4" in out
    last = read_log(tmp_path / "clt" / METRICS)[-1]
    assert f"after 4 steps on 256 rows: FVU {last['fvu']:.3f}, " in out
    command = out.splitlines()[-1].removeprefix(f"next: {invocation()} ")
    assert command == f"clt eval {tmp_path / 'clt'} {store.path} --model {model_directory}"
    code, out, _ = run(capsys, *command.split())
    assert code == 0
    assert "all MLPs replaced" in out
    report = json.loads((tmp_path / "clt" / "eval" / "report.json").read_text())
    assert report["n_sequences"] == 4  # a tenth of forty
    assert "training.png" in out
    code, _, error = run(capsys, *command.split())
    assert code == 2
    assert "report.json exists; choose another out directory" in error


def test_the_command_that_comes_next_can_be_pasted_and_one_step_is_singular(
    store, model_directory, tmp_path, capsys
):
    out = tmp_path / "my clt"
    code, said, _ = run(capsys, "clt", "train", store.path, "--out", out, "--train.steps", "1", *SMALL)
    assert code == 0
    assert "after 1 step on 64 rows: " in said
    command = said.splitlines()[-1].removeprefix(f"next: {invocation()} ")
    expected = ["clt", "eval", str(out), str(store.path), "--model", str(model_directory)]
    assert shlex.split(command) == expected


def test_a_config_file_with_overrides(store, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    lines = [
        f"store: {store.path}",
        f"out: {tmp_path / 'clt'}",
        "n_features: 32",
        "k: 4",
        "train: {steps: 9}",
    ]
    file.write_text("\n".join(lines))
    code, out, _ = run(capsys, "clt", "train", file, "--train.steps", "2")
    assert code == 0
    assert "after 2 steps" in out


def test_the_shipped_config_is_for_the_store_of_the_capture_config():
    configs = Path(__file__).parents[2] / "configs"
    capture = (configs / "capture_demo.yaml").read_text()
    assert f"out: {load_config(CLTRunConfig, configs / 'clt_demo.yaml').store}" in capture


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clt", "train", "{store}"], "missing --out (path)"),
        (["clt", "train", "{tmp}/none.zarr", "--out", "{tmp}/clt"], "none.zarr does not exist"),
        (
            ["clt", "train", "{store}", "--out", "{tmp}/clt", "--n-featurs", "3"],
            "did you mean '--n-features'?",
        ),
        (["clt", "train", "{store}", "--out", "{tmp}/clt", "--k", "600"], "k must be at most n_features"),
        (["clt", "train", "{store}", "--out", "{tmp}/clt", "--device", "gpu"], "device must be"),
        (["clt", "eval", "{tmp}/none", "{store}"], "has no config.json; is it a transcoder's directory?"),
        (
            ["clt", "eval", "{trained}", "{store}", "--batch-size", "0"],
            "batch_size must be at least 1, got 0",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, store, trained_directory, tmp_path, capsys):
    places = {"store": store.path, "tmp": tmp_path, "trained": trained_directory}
    code, _, error = run(capsys, *(word.format(**places) for word in argv))
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_an_interrupted_run_says_where_its_state_is_and_continues(store, tmp_path, capsys, monkeypatch):
    original = Trainer.step

    def step(self):
        if self.step_number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    command = ["clt", "train", store.path, "--out", tmp_path / "clt", "--train.steps", "5", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        code, out, _ = run(capsys, *command)
    assert code == 130
    assert f"the state is saved in {tmp_path / 'clt' / 'checkpoints' / 'step-00000003'}" in out
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "after 5 steps" in out
