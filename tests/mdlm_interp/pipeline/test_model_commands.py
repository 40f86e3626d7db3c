"""info, fill, sample, ppl, train-lm, train-tokenizer and export-hf, as typed on the command line."""

from __future__ import annotations

import json

import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.__main__ import main
from mdlm_interp.tokenizers import load_tokenizer


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that must refuse."""
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_fill_prints_the_text_and_the_candidates(capsys, model_directory):
    code, out, _ = run(capsys, "fill", "the old [MASK] runs", "--model", model_directory, "--top-k", 3)
    first, second = out.splitlines()
    assert code == 0
    assert "[MASK]" not in first
    assert second.startswith("  position ")
    assert second.count("'") >= 6


def test_sample_is_reproducible_and_seeded(capsys, model_directory):
    arguments = ("sample", "the old", "--model", model_directory, "--length", 12, "--steps", 4, "--n", 2)
    first, again = (run(capsys, *arguments)[1] for _ in range(2))
    other = run(capsys, *arguments, "--seed", 1)[1]
    assert first == again != other
    assert first.startswith("the old")
    assert "\n---\nthe old" in first


def test_ppl_reports_the_bound_with_its_estimator(capsys, model_directory, text_file):
    code, out, _ = run(capsys, "ppl", text_file, "--model", model_directory, "--max-sequences", 4)
    assert code == 0
    for piece in (
        "perplexity      <= ",
        "bits per byte   <= ",
        "over 4 sequences of 24 tokens",
        "estimator: cont",
    ):
        assert piece in out


def test_info_describes_the_model_and_lists_hooks(capsys, model_directory, tiny_model):
    code, out, _ = run(capsys, "info", model_directory, "--hooks")
    parameters = sum(p.numel() for p in tiny_model.parameters())
    assert code == 0
    assert f"parameters         {parameters:,}" in out
    assert out.count("\n  ") == len(tiny_model.hook_names)


def test_training_from_the_command_line_ends_in_a_model_that_loads(capsys, tmp_path, text_file):
    assert run(capsys, "train-tokenizer", text_file, "--out", tmp_path / "tok", "--vocab-size", 300)[0] == 0
    config = tmp_path / "run.yaml"
    config.write_text(
        f"files: [{text_file}]\ntokenizer: {tmp_path / 'tok'}\nout: {tmp_path / 'run'}\n"
        "model: {vocab_size: 300, model_length: 24, hidden_dim: 16, cond_dim: 8, n_blocks: 1, n_heads: 2}\n"
        "steps: 6\nbatch_size: 4\nwarmup_steps: 2\nheld_out_share: 0.2\nvalidate_every: 3\n"
    )
    code, out, _ = run(capsys, "train-lm", config, "--log-every", 2)
    model = tmp_path / "run" / "model"
    assert code == 0
    for name in ("unigram", "bigram", "model"):
        assert f"\n{name} " in out
    assert "held-out text, wrapped sequences: an end-of-text at both ends, as trained\n" in out
    record = json.loads((model / "training.json").read_text())
    assert list(record["held_out"]) == ["wrapped"]
    assert record["held_out"]["wrapped"]["nats_per_token"]["model"] > 0
    assert str(tmp_path) not in json.dumps(record)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    loaded = HookedMDLM.from_pretrained(model)
    assert torch.isfinite(loaded(torch.tensor([load_tokenizer(model).encode("the old fox")]))).all()
    assert f"{model} exists: that run is complete" in refused(capsys, "train-lm", config)


def test_export_from_the_command_line_writes_a_folder_once(capsys, tmp_path, model_directory):
    out = tmp_path / "exported"
    assert run(capsys, "export-hf", out, "--model", model_directory)[0] == 0
    assert {"config.json", "model.safetensors", "modeling_mdlm.py", "tokenizer.json"} <= {
        f.name for f in out.iterdir()
    }
    assert "exists" in refused(capsys, "export-hf", out, "--model", model_directory)


def test_mistakes_get_one_line_that_names_the_remedy(capsys, tmp_path, model_directory, text_file):
    model = ("--model", model_directory)
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("café".encode("latin-1"))
    assert "the text has no [MASK]" in refused(capsys, "fill", "nothing", *model)
    assert "missing --text" in refused(capsys, "fill", *model)
    assert "is no model directory" in refused(capsys, "fill", "a [MASK]", "--model", tmp_path / "nowhere")
    assert "holds no text" in refused(capsys, "ppl", empty, *model)
    assert "is not UTF-8" in refused(capsys, "ppl", latin, *model)
    assert "does not exist" in refused(capsys, "ppl", tmp_path / "missing.txt", *model)
    assert "length must be in [3, 24]" in refused(capsys, "ppl", text_file, "--length", 25, *model)
    assert "length must be in [1, 24]" in refused(capsys, "sample", "--length", 25, *model)
    assert "n must be at least 1" in refused(capsys, "sample", "--n", 0, *model)
    assert "exists; choose another" in refused(
        capsys, "train-tokenizer", text_file, "--out", model_directory, "--vocab-size", 300
    )
    assert "did you mean '--top-k'" in refused(capsys, "fill", "a [MASK]", "--topk", 3, *model)
    assert "device must be cpu" in refused(capsys, "fill", "a [MASK]", "--device", "gpuu", *model)


def test_a_tokenizer_of_another_model_is_refused(capsys, tmp_path, model_directory, text_file):
    assert run(capsys, "train-tokenizer", text_file, "--out", tmp_path, "--vocab-size", 290)[0] == 0
    error = refused(capsys, "fill", "a [MASK]", "--model", model_directory, "--tokenizer", tmp_path)
    assert "the tokenizer has 290 ids, the model 300" in error


def test_text_that_yields_too_few_ids_for_a_tokenizer_is_refused(capsys, tmp_path, text_file):
    error = refused(capsys, "train-tokenizer", text_file, "--out", tmp_path, "--vocab-size", 4000)
    assert "of 4000 ids; give more text or lower vocab_size" in error
