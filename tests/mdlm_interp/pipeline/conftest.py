"""A tiny text, tokenizer and model on disk, for what runs from text to numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.data import TokenStreams, read_streams
from mdlm_interp.training.tokenizer import train_tokenizer

VOCAB_SIZE = 300
LENGTH = 24
SUBJECTS = ("the old fox", "a red bird", "my small dog", "one quiet child", "the tall man")
ENDINGS = ("sees the river.", "sings to the stone.", "sleeps near our house.", "runs over the hill.")


def sentences(count: int) -> list[str]:
    """Different short texts with structure that a model can learn."""
    return [
        " ".join(f"{SUBJECTS[(n * 7 + k) % 5]} {ENDINGS[(n * 3 + k * k) % 4]}" for k in range(6)) + f" {n}"
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(sentences(40), VOCAB_SIZE)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(sentences(60)) + "\n", "utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_config() -> MDLMConfig:
    return MDLMConfig(
        vocab_size=VOCAB_SIZE,
        model_length=LENGTH,
        hidden_dim=16,
        cond_dim=8,
        n_blocks=2,
        n_heads=2,
        dropout=0.0,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: MDLMConfig) -> HookedMDLM:
    """Random weights everywhere, so that predictions depend on the input."""
    model = HookedMDLM(tiny_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = 0.4 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + draws if ".norm" in name else draws)
    return model.eval()


@pytest.fixture(scope="session")
def model_directory(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: HookedMDLM, tokenizer: Tokenizer
) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def config(tmp_path: Path, text_file: Path, tiny_config: MDLMConfig) -> TrainLMConfig:
    """A training run of seconds."""
    return TrainLMConfig(
        files=(text_file,),
        tokenizer=Path("unused"),
        out=tmp_path / "run",
        model=tiny_config,
        steps=12,
        batch_size=4,
        lr=3e-3,
        warmup_steps=2,
        ema_decay=0.5,
        wrap_share=0.5,
        short_share=0.3,
        held_out_share=0.2,
        validate_every=100,
        validation_sequences=8,
        checkpoint_every=5,
        log_every=3,
    )


@pytest.fixture
def streams(text_file: Path, tokenizer: Tokenizer) -> TokenStreams:
    return read_streams([text_file], tokenizer, 0.2)
