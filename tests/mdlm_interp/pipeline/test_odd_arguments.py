"""Arguments that mean something else than they seem to: refused in one line, never taken for a default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.decoding import sample
from mdlm_interp.devices import usable_device
from mdlm_interp.errors import ConfigError, DataError
from tests.mdlm_interp.pipeline.test_model_commands import refused, run

ROOT = Path(__file__).parents[3]
LATIN = os.fsdecode("café [MASK]".encode("latin-1"))
"""What Python makes of an argument that is not UTF-8."""


@pytest.mark.parametrize("command", ["fill", "sample"])
def test_text_that_is_not_utf8_is_refused(capsys, model_directory, command):
    assert refused(capsys, command, LATIN, "--model", model_directory).endswith(
        "error: the text is not Unicode: its character 3 is '\\udce9', which stands for a byte that was not UTF-8 "
        "or for half a character; convert the text to UTF-8 first\n"
    )


def test_a_batch_with_text_that_is_no_unicode_is_refused_like_one_text(tokenizer):
    with pytest.raises(DataError, match=r"its character 1 is '\\ud83d'"):
        tokenizer.encode_batch(["fine", "x\ud83d"])
    with pytest.raises(TypeError):
        tokenizer.encode_batch([3])


def test_a_directory_whose_name_is_not_utf8_is_written_and_named(tmp_path, model_directory):
    """In a process of its own: the test's captured output has no encoding to fail in."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    command = [sys.executable, "-m", "mdlm_interp", "export-hf", str(out), "--model", str(model_directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/caf\\udce9: load it with")
    assert (out / "tokenizer.json").exists()


def test_a_prediction_that_the_terminal_cannot_show_is_escaped(model_directory):
    command = [sys.executable, "-m", "mdlm_interp", "fill", "é [MASK]", "--model", str(model_directory)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\\xe9")


DEVICES = [
    ("nonsense", "device must be cpu, cuda, cuda:1, mps or the like, got 'nonsense'; use cpu"),
    ("", "device must be cpu, cuda, cuda:1, mps or the like, got ''; use cpu"),
    ("meta", "device 'meta' was asked for, which keeps shapes and no numbers; use cpu or an accelerator"),
    ("xla", "device 'xla' was asked for, but torch cannot use it here (PyTorch is not linked with"),
    (
        "hpu",
        "device 'hpu' was asked for, but torch cannot use it here (No module named 'torch.hpu'); use cpu",
    ),
    ("cuda:99", "device 'cuda:99' was asked for, but torch "),
]


@pytest.mark.parametrize(("device", "message"), DEVICES, ids=[device or "empty" for device, _ in DEVICES])
@pytest.mark.parametrize(
    "command", [("fill", "a [MASK]"), ("sample",), ("ppl", "no.txt")], ids=lambda c: c[0]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(capsys, command, device, message):
    assert message in refused(capsys, *command, "--device", device, "--model", "no/such/model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(capsys):
    error = refused(capsys, "fill", "a [MASK]", "--device", "cuda")
    assert "device 'cuda' was asked for, but torch finds no CUDA device; use cpu" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_is_taken_and_gives_the_cpus_logits_within_1e_3(model_directory):
    """Bounded: float32 kernels of two makers; the logits are of order ten."""
    ids = torch.arange(12)[None]
    models = [HookedMDLM.from_pretrained(model_directory, device=device) for device in ("cpu", "cuda")]
    with torch.no_grad():
        logits = [model(ids.to(model.device)).cpu() for model in models]
    assert models[1].device.type == "cuda"
    assert (logits[0] - logits[1]).abs().max() <= 1e-3


@pytest.mark.parametrize(("device", "message"), DEVICES[:5], ids=lambda value: value[:6])
def test_loading_in_python_refuses_the_same_devices(model_directory, device, message):
    with pytest.raises(ConfigError) as caught:
        HookedMDLM.from_pretrained(model_directory, device=device)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")], ids=str)
def test_the_cpu_is_always_there(device):
    assert usable_device(device).type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sample", "--length", 0),
            "length must be in [1, 24], the model's context, or none for all of it; got 0",
        ),
        (("sample", "--length", -1), "length must be in [1, 24]"),
        (
            ("ppl", "TEXT", "--length", 0),
            "length must be in [3, 24], the model's context, or none for all of it",
        ),
        (("ppl", "TEXT", "--length", 0, "--no-wrap"), "length must be in [1, 24]"),
        (("ppl", "TEXT", "--max-sequences", 0), "max_sequences must be at least 1, got 0"),
        (("ppl", "TEXT", "--max-sequences", -1), "max_sequences must be at least 1, got -1"),
        (("ppl", "TEXT", "--times", 0), "times must be at least 1, got 0"),
        (("ppl", "TEXT", "--batch-size", 0), "batch_size must be at least 1, got 0"),
        (("fill", "a [MASK]", "--top-k", 0), "top_k must be in [1, 299], got 0"),
        (("fill", "a [MASK]", "--tokenizer", ""), "'' is no model directory"),
        (("fill", "a [MASK]", "--model", ""), "'' is no model directory"),
        (("export-hf", "OUT", "--tokenizer", ""), "'' is no model directory"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_zero_and_empty_are_not_taken_for_the_default(
    capsys, tmp_path, monkeypatch, model_directory, text_file, arguments, message
):
    monkeypatch.chdir(model_directory)  # which an empty path would mean
    places = {"TEXT": text_file, "OUT": tmp_path / "out"}
    full = [places.get(argument, argument) for argument in arguments]
    model = () if "--model" in full else ("--model", model_directory)
    assert message in refused(capsys, *full, *model)


def test_samples_are_printed_as_they_are_made_whatever_the_batch(capsys, monkeypatch, model_directory):
    """Exact: each sample's draws are its own. So many samples as fit in no memory are only a long wait."""
    options = ("--model", model_directory, "--length", 8, "--steps", 2)
    whole = run(capsys, "sample", *options, "--n", 5)[1]
    assert run(capsys, "sample", *options, "--n", 5, "--batch-size", 2)[1] == whole
    assert whole.count("\n---\n") == 4
    assert len(set(whole.split("\n---\n"))) == 5

    def stop_at_the_second_batch(model, start, sampler, *, indices, **keywords):
        if indices[0] > 0:
            raise KeyboardInterrupt
        return sample(model, start, sampler, indices=indices, **keywords)

    monkeypatch.setattr("mdlm_interp.decoding.commands.sample", stop_at_the_second_batch)
    code, out, _ = run(capsys, "sample", *options, "--n", 10**15, "--batch-size", 5)
    assert code == 130
    assert out == whole


def test_none_is_the_models_context(capsys, model_directory):
    options = ("--model", model_directory, "--steps", 1)
    outputs = [
        run(capsys, "sample", *options, *given)[1] for given in ((), ("--length", "none"), ("--length", 24))
    ]
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("option", ["--tokenizer", "--device"])
def test_info_takes_no_option_that_would_not_matter(capsys, model_directory, option):
    assert f"unknown option {option}" in refused(capsys, "info", model_directory, option, "cpu")
