"""The model that ships with the package: small, loads offline, and knows some English."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.checkpoints import bundled_directory
from mdlm_interp.documents import read_documents, token_blocks
from mdlm_interp.evaluation import nelbo
from mdlm_interp.filling import fill_masks
from mdlm_interp.tokenizers import Tokenizer

DEMO_TEXT = Path(__file__).parents[2] / "mdlm_interp" / "assets" / "demo.txt"


@pytest.fixture(scope="module")
def model() -> HookedMDLM:
    return HookedMDLM.from_pretrained("bundled")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bundled")


def test_it_is_as_small_as_promised_and_fits_its_tokenizer(model, tokenizer):
    assert (bundled_directory() / "model.safetensors").stat().st_size <= 16_000_000
    assert model.config.vocab_size == tokenizer.vocab_size
    assert 2000 <= tokenizer.vocab_size <= 4096
    assert 4 <= model.config.n_blocks <= 8
    assert 128 <= model.config.hidden_dim <= 256
    assert model.config.model_length >= 128
    assert not model.training


def test_it_loads_without_any_network(monkeypatch):
    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise AssertionError("the bundled model must not be downloaded")

    monkeypatch.setattr("socket.socket.connect", refuse)
    HookedMDLM.from_pretrained("bundled")
    load_tokenizer("bundled")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Once upon a time, there was a little [MASK] named Lily.", " girl"),
        ("Once upon a time, there was a little [MASK] named Tim.", " boy"),
        ("It was a sunny day. Lily wanted to [MASK] outside with her friends.", " play"),
        ("The United [MASK] of America", " States"),
    ],
)
def test_its_best_word_for_a_gap_is_one_that_a_reader_would_choose(model, tokenizer, text, word):
    (prediction,) = fill_masks(model, tokenizer, text).masks
    assert prediction.top[0][0] == word


def test_it_beats_the_count_models_on_text_it_has_not_seen(model, tokenizer):
    """Its recorded held-out figures, and here a unigram that was even fitted to the evaluated text itself."""
    held_out = json.loads((bundled_directory() / "training.json").read_text("utf-8"))["held_out"]
    assert list(held_out) == ["wrapped", "bare"]
    for figures in held_out.values():
        nats = figures["nats_per_token"]
        assert nats["model"] < nats["bigram"] < nats["unigram"]
    blocks = [b.ids for b in token_blocks(read_documents([DEMO_TEXT]), tokenizer, 128, wrap=False)]
    x_0 = torch.from_numpy(np.stack(blocks))
    counts = Counter(x_0.flatten().tolist())
    fitted = -sum(n / x_0.numel() * math.log(n / x_0.numel()) for n in counts.values())
    assert nelbo(model, x_0, times_per_sequence=4).nats_per_token < fitted


def test_its_log_tells_the_same_end_as_its_record():
    record = json.loads((bundled_directory() / "training.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (bundled_directory() / "log.jsonl").read_text("utf-8").splitlines()]
    last = [line for line in lines if "held_out_nats" in line][-1]
    assert last["step"] == record["config"]["steps"]
    # The final evaluation covers all held-out text, the log a part of it, in bare sequences.
    final = record["held_out"]["bare"]["nats_per_token"]["model"]
    assert last["held_out_nats"] == pytest.approx(final, abs=0.3)


def test_its_card_has_the_figures_of_its_record_for_each_form():
    card = (bundled_directory() / "README.md").read_text("utf-8")
    record = json.loads((bundled_directory() / "training.json").read_text("utf-8"))
    for name in ("unigram", "bigram", "model"):
        cells = [
            f"{record['held_out'][form][unit][name]:.3f}"
            for form in ("wrapped", "bare")
            for unit in ("nats_per_token", "bits_per_byte")
        ]
        assert f"| {name} | {' | '.join(cells)} |" in card
    for form in ("wrapped", "bare"):
        assert f"{record['held_out'][form]['tokens']:,}" in card
    assert record["inputs"]["tokenizer_sha256"] == load_tokenizer("bundled").sha256


def test_nothing_of_the_machine_that_trained_it_is_in_its_files():
    for file in bundled_directory().iterdir():
        if file.suffix in (".json", ".jsonl") and file.name != "tokenizer.json":
            assert "/root" not in file.read_text("utf-8")
            assert "/home" not in file.read_text("utf-8")


def test_the_readmes_ablation_prints_words_that_fit_and_then_others(capsys):
    """Behavioural: decoded tokens, not their byte-level spelling; and the change can be seen in them."""
    readme = (DEMO_TEXT.parents[2] / "README.md").read_text("utf-8")
    block = readme.partition("```python\n")[2].partition("```")[0]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102  (our own text)
    shape, whole, ablated = capsys.readouterr().out.splitlines()
    assert shape.startswith("torch.Size([1, ")
    assert "' park'" in whole
    assert "' store'" in whole
    assert "' store'" not in ablated
    assert "Ġ" not in whole + ablated
