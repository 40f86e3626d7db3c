"""A disk that refuses: one line, exit code 2, nothing lost that was written, nothing half-written that counts."""

import os
from dataclasses import replace

import pytest
import torch

from mdlm_interp.__main__ import main
from mdlm_interp.errors import CheckpointError, WriteError
from transcoder.checkpoint import load_clt, save_clt
from transcoder.config import METRICS
from transcoder.report import write_report
from transcoder.run import train
from transcoder.training_log import append_entry, read_log
from transcoder.training_state import latest_training_state, save_training_state

SMALL = ["--n-features", "256", "--k", "4", "--train.batch-size", "64", "--train.log-every", "2"]


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_on_a_full_disk_is_one_line_and_the_same_command_finishes_later(
    store, tmp_path, capsys, full_disk
):
    out = tmp_path / "clt"
    command = [*map(str, ["clt", "train", store.path, "--out", out, "--train.steps", "4"]), *SMALL]
    with full_disk(20_000):
        assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{out}/checkpoints/step-00000004 cannot be written: File too large; " in error
    assert latest_training_state(out) is None
    assert not list(out.rglob("*partial*"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_clt(out)
    assert main(command) == 0
    assert [line["step"] for line in read_log(out / METRICS)] == [2, 4]


def test_a_full_disk_keeps_the_last_state_and_the_run_continues_with_the_same_bits(
    run_config, tmp_path, monkeypatch, full_disk
):
    whole = train(run_config)
    stopped = replace(run_config, out=tmp_path / "stopped")

    def save(out, tensors, state, *, keep):
        with full_disk(20_000 if state["step"] > 5 else 10**9):
            return save_training_state(out, tensors, state, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr("transcoder.training_loop.save_training_state", save)
        with pytest.raises(WriteError, match=r"step-00000010 cannot be written: File too large"):
            train(stopped)
    state = latest_training_state(stopped.out)
    assert state is not None
    assert state.name == "step-00000005"
    assert same_weights(whole, train(stopped))


def test_a_short_run_that_cannot_write_its_result_has_left_its_state(run_config, tmp_path, monkeypatch):
    short = replace(run_config, train=replace(run_config.train, checkpoint_every=1000))
    whole = train(short)
    stopped = replace(short, out=tmp_path / "stopped")

    def refuse(clt, directory):
        raise WriteError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("transcoder.run.save_clt", refuse)
        with pytest.raises(WriteError, match="no room"):
            train(stopped)
    state = latest_training_state(stopped.out)
    assert state is not None
    assert state.name == "step-00000012"
    steps = []
    monkeypatch.setattr("transcoder.trainer.Trainer.step", lambda self: steps.append(self.step_number))
    assert same_weights(whole, train(stopped))
    assert steps == []
    assert [line["step"] for line in read_log(stopped.out / METRICS)] == [3, 6, 9, 12]


def test_metrics_that_cannot_be_written_are_one_line(tmp_path, full_disk):
    path = tmp_path / METRICS
    append_entry(path, {"step": 1})
    with full_disk(20), pytest.raises(WriteError, match=r"metrics.jsonl cannot be written: File too large"):
        append_entry(path, {"step": 2})
    assert path.read_text().startswith('{"step": 1}\n')


def test_a_save_without_room_leaves_no_transcoder(clt, tmp_path, full_disk):
    with (
        full_disk(20_000),
        pytest.raises(WriteError, match=r"clt.safetensors cannot be written: File too large"),
    ):
        save_clt(clt, tmp_path / "clt")
    assert list((tmp_path / "clt").iterdir()) == []
    save_clt(clt, tmp_path / "clt")
    assert same_weights(clt, load_clt(tmp_path / "clt"))


def test_a_report_without_room_is_one_line_leaves_no_file_and_its_figures_are_told(
    store, model_directory, trained_directory, tmp_path, capsys, full_disk
):
    out = tmp_path / "report"
    command = ["clt", "eval", trained_directory, store.path, "--model", model_directory, "--out", out]
    with full_disk(20_000):
        assert main(list(map(str, command))) == 2
    told, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "cannot be written: File too large" in error
    assert "in the model: NELBO" in told
    assert list(out.iterdir()) == []
    assert main(list(map(str, command))) == 0


def test_files_are_as_readable_as_any_other(run_config, trained, model, store, tmp_path):
    from transcoder import evaluate

    before = os.umask(0o022)
    try:
        train(run_config)
        write_report(evaluate(model, trained, store, max_sequences=2), tmp_path / "report", about={})
    finally:
        os.umask(before)
    files = [*run_config.out.iterdir(), *(tmp_path / "report").iterdir()]
    assert len(files) == 9
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o644"}
