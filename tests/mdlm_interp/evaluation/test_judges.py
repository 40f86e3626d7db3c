"""Perplexity of texts under a second model: the chain rule written out, and another MDLM's bound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mdlm_interp import HookedMDLM, MDLMConfig, load_tokenizer
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.evaluation import judge_samples, nelbo

transformers = pytest.importorskip("transformers", reason="causal judges are loaded by transformers")
TEXTS = ["The house is of the other", "of the the the house is", "Th"]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, gpt2_directory: Path) -> Path:
    """A GPT-2 of two layers with random weights, and the byte-level tokenizer of `gpt2_directory`."""
    directory = tmp_path_factory.mktemp("causal")
    tokenizer = load_tokenizer(gpt2_directory)
    tokenizer.save(directory)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.6,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory, safe_serialization=True)
    return directory


def test_a_causal_judge_s_figure_is_the_chain_rule(causal, gpt2_directory):
    """Bounded by float32: token by token, each from a pass over those before it."""
    found = judge_samples(TEXTS, causal)
    model = transformers.GPT2LMHeadModel.from_pretrained(causal).eval()
    tokenizer = load_tokenizer(gpt2_directory)
    total, count, cut = 0.0, 0, 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        cut += len(ids) > 8
        for place in range(1, min(len(ids), 8)):
            with torch.inference_mode():
                logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[place]])
            count += 1
    assert (found.n_tokens, found.n_cut) == (count, cut)
    assert found.n_cut > 0
    assert found.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.n_texts == 2, "a text of one token has nothing to score"
    assert "chain rule of a causal language model" in found.estimator


def test_an_mdlm_judge_s_figure_is_its_bound(tmp_path, gpt2_directory):
    tokenizer = load_tokenizer(gpt2_directory)
    config = MDLMConfig(
        vocab_size=tokenizer.vocab_size, model_length=16, hidden_dim=16, cond_dim=8, n_blocks=1, n_heads=2
    )
    model = HookedMDLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3
            )
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    found = judge_samples(TEXTS[:2], tmp_path, seed=4)
    totals = []
    for number, text in enumerate(TEXTS[:2]):
        ids = tokenizer.encode(text)[:16]
        totals.append(
            (
                nelbo(model.eval(), torch.tensor([ids]), seed=4, first=number).nats_per_token * len(ids),
                len(ids),
            )
        )
    assert found.nats_per_token == pytest.approx(
        sum(t for t, _ in totals) / sum(n for _, n in totals), rel=1e-5
    )
    assert found.n_tokens == sum(n for _, n in totals)
    assert found.estimator.startswith("continuous-time bound, 4 stratified times a sequence")


def test_pickled_weights_are_not_loaded(causal, tmp_path):
    for file in causal.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = transformers.GPT2LMHeadModel.from_pretrained(causal)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="is no causal language model with a tokenizer that transformers loads"
    ):
        judge_samples(TEXTS, tmp_path)


def test_what_is_no_judge_is_refused(tmp_path, causal):
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        judge_samples(TEXTS, tmp_path)
    with pytest.raises(DataError, match="at least one text to judge"):
        judge_samples([], causal)
    with pytest.raises(DataError, match="no text has a token that the judge can score"):
        judge_samples(["T"], causal)
