"""What a training run leaves on disk: whose directory it is, what may continue it, and what a failure costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor, equal, zeros

from mdlm_interp import HookedMDLM
from mdlm_interp.__main__ import main
from mdlm_interp.atomic_files import PREFIX
from mdlm_interp.errors import CheckpointError, OutputExistsError, WriteError
from mdlm_interp.training.checkpoint import LOG, LOSS_CURVE, RECORD, STATE, saved_step
from mdlm_interp.training.data import read_streams
from mdlm_interp.training.tokenizer import save_tokenizer, train_tokenizer
from mdlm_interp.training.trainer import Trainer, train

ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipe(tmp_path, text_file, tokenizer) -> Path:
    """A config file of a run of six steps."""
    (tmp_path / "tok").mkdir()
    tokenizer.save(tmp_path / "tok")
    path = Path(tmp_path / "run.yaml")
    path.write_text(
        f"files: [{text_file}]\ntokenizer: {tmp_path / 'tok'}\nout: {tmp_path / 'run'}\n"
        "model: {vocab_size: 300, model_length: 24, hidden_dim: 16, cond_dim: 8, n_blocks: 1, n_heads: 2}\n"
        "steps: 6\nbatch_size: 4\nwarmup_steps: 2\nheld_out_share: 0.2\nvalidate_every: 3\nlog_every: 2\n"
        "checkpoint_every: 2\nvalidation_sequences: 4\n"
    )
    return path


def called(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that must refuse."""
    code, _, error = called(capsys, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    return error


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def interrupting(at: int, number: signal.Signals = signal.SIGINT):
    """A step that is interrupted from outside while it runs."""
    original = Trainer.step

    def step(self: Trainer) -> tuple[float, float]:
        if self.step_number == at:
            os.kill(os.getpid(), number)
        return original(self)

    return step


# Which run may continue


def test_continuing_with_other_settings_is_refused(config, tokenizer, streams):
    train(replace(config, steps=5), tokenizer, streams)
    with pytest.raises(CheckpointError, match=r"was trained with lr = 0.003, the run asks for 0.1; restore"):
        train(replace(config, lr=0.1), tokenizer, streams)


def test_the_hashes_of_text_and_tokenizer_stand_in_every_record(config, tokenizer, streams, text_file):
    trainer = train(replace(config, steps=5), tokenizer, streams)
    inputs = trainer.record["inputs"]
    content = text_file.read_bytes()
    digest = subprocess.run(["sha256sum", text_file], capture_output=True, text=True, check=True).stdout[:64]
    assert inputs == {
        "sources": [{"file": text_file.name, "bytes": len(content), "sha256": digest}],
        "tokenizer_sha256": tokenizer.sha256,
    }
    assert json.loads((config.out / RECORD).read_text())["inputs"] == inputs


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("steps", [5, 12])
def test_a_run_whose_text_has_changed_is_not_continued(
    config, tokenizer, text_file, tmp_path, checkpoint, steps
):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        shutil.copy(text_file, path)
    config = replace(config, files=tuple(texts))
    train(replace(config, steps=5), tokenizer, read_streams(texts, tokenizer, 0.2))
    if not checkpoint:
        (config.out / STATE).unlink()
    before = (config.out / LOG).read_bytes()
    texts[1].write_text(texts[1].read_text().replace("fox", "cat", 1))
    changed = read_streams(texts, tokenizer, 0.2)
    message = (
        r"text file \S+/b.txt is not what the run in \S+ was trained on: it has 12,\d+ bytes .*; restore it"
    )
    with pytest.raises(CheckpointError, match=message):
        train(replace(config, steps=steps), tokenizer, changed)
    assert (config.out / LOG).read_bytes() == before


def test_text_that_has_moved_but_is_equal_continues_with_the_same_bits(
    config, tokenizer, text_file, tmp_path
):
    whole = replace(config, out=tmp_path / "whole")
    expected = train(whole, tokenizer, read_streams([text_file], tokenizer, 0.2)).tensors()
    train(replace(config, steps=5), tokenizer, read_streams([text_file], tokenizer, 0.2))
    moved = tmp_path / "elsewhere" / "renamed.txt"
    moved.parent.mkdir()
    shutil.copy(text_file, moved)
    config = replace(config, files=(moved,), tokenizer=Path("elsewhere"))
    assert same(expected, train(config, tokenizer, read_streams([moved], tokenizer, 0.2)).tensors())


def test_a_run_with_more_or_fewer_text_files_is_not_continued(config, tokenizer, streams, text_file):
    train(replace(config, steps=5), tokenizer, streams)
    twice = replace(config, files=(text_file, text_file))
    with pytest.raises(CheckpointError, match="was trained on 1 text files, the run names 2; name the same"):
        train(twice, tokenizer, read_streams(twice.files, tokenizer, 0.2))


def test_a_run_with_another_tokenizer_of_the_same_size_is_not_continued(config, tokenizer, text_file):
    train(replace(config, steps=5), tokenizer, read_streams([text_file], tokenizer, 0.2))
    other = train_tokenizer(text_file.read_text().replace("the", "thou").split("\n\n"), 300)
    with pytest.raises(
        CheckpointError, match=r"tokenizer unused is not what the run in \S+ was trained with"
    ):
        train(config, other, read_streams([text_file], other, 0.2))


def test_a_damaged_checkpoint_is_refused(config, tokenizer, streams):
    train(replace(config, steps=5), tokenizer, streams)
    path = config.out / STATE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"is damaged .* remove it to start the run anew"):
        train(config, tokenizer, streams)
    path.unlink()
    assert train(config, tokenizer, streams).step_number == 12


@pytest.mark.parametrize("place", [-1, -4000, -40_000])
def test_one_flipped_bit_of_a_checkpoint_is_found(config, tokenizer, streams, place):
    train(replace(config, steps=5), tokenizer, streams)
    path = config.out / STATE
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"is damaged \(its tensors do not match their SHA-256\); remove it"
    ):
        train(config, tokenizer, streams)


def test_a_safetensors_file_that_is_no_checkpoint_is_refused(config, tokenizer, streams):
    train(replace(config, steps=5), tokenizer, streams)
    save_file({"x": zeros(1)}, config.out / STATE)
    with pytest.raises(CheckpointError, match="no checkpoint of train-lm, or an earlier version's; choose"):
        train(config, tokenizer, streams)


# Whose directory


@pytest.mark.parametrize("name", [LOG, LOSS_CURVE, STATE, RECORD])
def test_a_file_that_no_run_made_is_never_overwritten(capsys, recipe, config, tokenizer, streams, name):
    config.out.mkdir()
    (config.out / name).write_text("somebody's work")
    error = refused(capsys, "train-lm", recipe, "--files", "no-such-text.txt")  # refused before it is read
    assert f"{config.out / name} exists and was not made by train-lm" in error
    assert "choose another out directory or move it away" in error
    with pytest.raises(OutputExistsError, match="was not made by train-lm"):
        train(config, tokenizer, streams)
    assert [path.name for path in config.out.iterdir()] == [name]
    assert (config.out / name).read_text() == "somebody's work"


def test_other_files_in_the_directory_are_left_alone(capsys, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("notes")
    assert called(capsys, "train-lm", recipe)[0] == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "notes"


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_in_its_directory(
    config, tokenizer, streams, monkeypatch
):
    step = Trainer.step

    def killed(self: Trainer) -> tuple[float, float]:
        if self.step_number == 4:
            raise MemoryError
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(MemoryError):
            train(config, tokenizer, streams)
    assert not (config.out / STATE).exists()
    with (config.out / LOG).open("a") as log:
        log.write('{"step": 4, "loss_')
    assert train(config, tokenizer, streams).step_number == 12
    steps = [json.loads(line)["step"] for line in (config.out / LOG).read_text().splitlines()]
    assert steps == [3, 6, 9, 12, 12, 12]


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_names_the_step_it_saved_and_the_same_command_continues(
    capsys, recipe, tmp_path, monkeypatch, number
):
    whole = tmp_path / "whole"
    assert called(capsys, "train-lm", recipe, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting(4, number))
        code, _, error = called(capsys, "train-lm", recipe)
    out = tmp_path / "run"
    assert code == 130
    assert error == (
        f"mdlm-interp train-lm: interrupted; step 5 is saved in {out}, "
        f"and the same command continues from there\n"
    )
    assert saved_step(out) == 5
    code, _, error = called(capsys, "train-lm", recipe)
    assert code == 0
    assert error.startswith(f"{out}: continuing from step 5 of ")
    assert same(load_file(whole / STATE), load_file(out / STATE))
    assert same(
        load_file(whole / "model" / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    )


def test_an_interruption_of_the_last_step_still_ends_the_command(capsys, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting(5))
        code, _, error = called(capsys, "train-lm", recipe)
    assert (code, "step 6 is saved" in error) == (130, True)
    assert called(capsys, "train-lm", recipe)[0] == 0


def test_an_interruption_while_the_text_is_read_says_that_nothing_is_saved(capsys, recipe, monkeypatch):
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mdlm_interp.training.text.read_streams", interrupted)
    code, _, error = called(capsys, "train-lm", recipe)
    assert (code, error) == (
        130,
        "mdlm-interp train-lm: interrupted; no step was saved yet, and the same command starts anew\n",
    )


# The disk


def test_a_save_that_fails_leaves_the_last_checkpoint(config, tokenizer, streams, monkeypatch):
    trainer = train(replace(config, steps=5), tokenizer, streams)
    before = load_file(config.out / STATE)

    def full_disk(_tensors: object, path: Path, **_keywords: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mdlm_interp.training.checkpoint.save_file", full_disk)
    with pytest.raises(WriteError, match=r"state.safetensors cannot be written: No space left .*; free some"):
        train(config, tokenizer, streams)
    assert same(before, load_file(config.out / STATE))
    assert trainer.step_number == 5


def test_a_log_that_cannot_be_written_is_told_in_one_line(config, tokenizer, streams, monkeypatch):
    original = Path.open

    def failing(self: Path, mode: str = "r", **keywords: str) -> IO[Any]:
        if self.name == LOG:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return original(self, mode, encoding=keywords.get("encoding"))

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(WriteError, match=r"log.jsonl cannot be written: Input/output error; the disk is"):
        train(config, tokenizer, streams)


LIMITED = """
import resource, signal, sys
from mdlm_interp.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""
"""The command line in a process whose files may hold no more than this: a full disk without root."""


def limited(n_bytes: int, *arguments: object) -> str:
    """The one line on stderr of a command that a full disk stops."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(n_bytes), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines)) == (2, 1), result.stderr
    return lines[0]


def test_a_disk_that_is_full_at_any_moment_ends_in_one_line_and_no_half_model(capsys, recipe, tmp_path):
    """One limit stops the first file of a run, the other its first checkpoint."""
    out = tmp_path / "run"
    assert called(capsys, "train-lm", recipe, "--out", tmp_path / "whole")[0] == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    for name in (RECORD, STATE):
        line = limited(sizes[name] - 100, "train-lm", recipe)
        assert f"{out / name} cannot be written: File too large; " in line
        assert not any(path.name.startswith((".", "model")) for path in out.iterdir())
    assert called(capsys, "train-lm", recipe)[0] == 0
    assert same(load_file(tmp_path / "whole" / STATE), load_file(out / STATE))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "training.json"])
def test_a_disk_that_fills_up_while_the_model_is_written_leaves_no_model_and_the_run_to_continue(
    capsys, recipe, tmp_path, monkeypatch, name
):
    def full_disk(*_arguments: object, **_keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    targets = {
        "model.safetensors": "mdlm_interp.checkpoints.save_file",
        "tokenizer.json": "mdlm_interp.tokenizers.Tokenizer.save",
        "training.json": "mdlm_interp.training.command.public_config",
    }
    with monkeypatch.context() as patch:
        patch.setattr(targets[name], full_disk)
        error = refused(capsys, "train-lm", recipe)
    assert "No space left on device; free some space" in error
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == sorted([RECORD, LOG, LOSS_CURVE, STATE])
    assert called(capsys, "train-lm", recipe)[0] == 0
    HookedMDLM.from_pretrained(out / "model")


def test_a_model_directory_that_is_empty_or_half_written_never_counts_as_complete(capsys, recipe, tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model.parent / f"{PREFIX}model").mkdir()
    (model / "config.json").write_text("{}")
    error = refused(capsys, "train-lm", recipe)
    assert f"{model} exists but is no finished model: it lacks model.safetensors, tokenizer.json" in error
    (model / "config.json").unlink()
    assert called(capsys, "train-lm", recipe)[0] == 0
    assert not (model.parent / f"{PREFIX}model").exists()
    assert f"{model} exists: that run is complete" in refused(capsys, "train-lm", recipe)


def test_an_out_that_is_a_file_is_told_in_one_line(capsys, recipe, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert "cannot be written: " in refused(capsys, "train-lm", recipe)
    assert (tmp_path / "run").read_text() == "a file"


def test_a_full_disk_leaves_no_half_tokenizer(tmp_path, text_file, tokenizer):
    out = tmp_path / "tok"
    line = limited(5000, "train-tokenizer", text_file, "--out", out, "--vocab-size", 300)
    assert line == (
        f"mdlm-interp train-tokenizer: error: {out / 'tokenizer.json'} cannot be written: File too large; "
        "the file system or `ulimit -f` caps the size of a file; choose another directory"
    )
    assert list(out.iterdir()) == []
    save_tokenizer(tokenizer, out)
    (tmp_path / "plain").touch()
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]
    assert (out / "tokenizer.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_tokenizer_that_would_be_overwritten_is_refused_before_the_text_is_read(capsys, recipe, tmp_path):
    arguments = ("train-tokenizer", tmp_path / "no-such-text.txt", "--out", tmp_path / "tok")
    assert "tokenizer.json exists; choose another" in refused(capsys, *arguments)


# Text that is not there


def test_a_recipe_without_its_text_names_what_is_missing_and_the_options_to_give(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("socket.socket.connect", None)  # whatever asks the network fails loudly
    recipe = ROOT / "configs" / "bundled_model.yaml"
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, "train-lm", recipe)
    assert (
        "is not here: data/openwebtext_a.jsonl, data/openwebtext_b.jsonl, data/tinystories.txt, "
        "the tokenizer data/tokenizer; " in error
    )
    assert "--files A.txt,B.jsonl and --tokenizer DIRECTORY" in error
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_its_text_but_no_tokenizer_says_how_to_make_one(capsys, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(capsys, "train-lm", recipe, "--tokenizer", tmp_path / "nowhere")
    assert (
        f"the tokenizer {tmp_path / 'nowhere'} does not exist; name its directory with --tokenizer" in error
    )
    assert "mdlm-interp train-tokenizer" in error
