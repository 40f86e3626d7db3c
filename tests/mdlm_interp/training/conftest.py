"""A tiny text and tokenizer, and training runs of seconds on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mdlm_interp import MDLMConfig
from mdlm_interp.learner_config import LearnerConfig
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.data import TokenStreams, read_streams
from mdlm_interp.training.learner import TrainLearnerConfig
from mdlm_interp.training.tokenizer import train_tokenizer

LENGTH = 24
VOCAB_SIZE = 300
SUBJECTS = ("the old fox", "a red bird", "my small dog", "one quiet child", "the tall man")
ENDINGS = ("sees the river.", "sings to the stone.", "sleeps near our house.", "runs over the hill.")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are so small that waiting for a second thread costs ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty different short texts with structure that a model can learn."""
    return [
        " ".join(f"{SUBJECTS[(n * 7 + k) % 5]} {ENDINGS[(n * 3 + k * k) % 4]}" for k in range(6)) + f" {n}"
        for n in range(60)
    ]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts[:40], VOCAB_SIZE)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(texts) + "\n", "utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def streams(text_file: Path, tokenizer: Tokenizer) -> TokenStreams:
    return read_streams([text_file], tokenizer, 0.2)


@pytest.fixture
def mdlm_config(tmp_path: Path, text_file: Path, tokenizer_directory: Path) -> TrainLMConfig:
    return TrainLMConfig(
        files=(text_file,),
        tokenizer=tokenizer_directory,
        out=tmp_path / "mdlm",
        model=MDLMConfig(
            vocab_size=VOCAB_SIZE,
            model_length=LENGTH,
            hidden_dim=16,
            cond_dim=8,
            n_blocks=2,
            n_heads=2,
            dropout=0.0,
        ),
        steps=8,
        batch_size=7,
        lr=3e-3,
        warmup_steps=2,
        ema_decay=0.5,
        wrap_share=0.5,
        short_share=0.3,
        held_out_share=0.2,
        validate_every=100,
        validation_sequences=8,
        checkpoint_every=100,
        log_every=3,
    )


@pytest.fixture
def learner_config(tmp_path: Path, text_file: Path, tokenizer_directory: Path) -> TrainLearnerConfig:
    return TrainLearnerConfig(
        files=(text_file,),
        tokenizer=tokenizer_directory,
        out=tmp_path / "learner",
        model=LearnerConfig(
            vocab_size=VOCAB_SIZE, model_length=LENGTH, hidden_dim=16, n_blocks=2, n_heads=2, dropout=0.0
        ),
        steps=8,
        batch_size=7,
        lr=3e-3,
        warmup_steps=2,
        ema_decay=0.5,
        order="packed",
        wrap_share=0.0,
        held_out_share=0.2,
        validate_every=100,
        validation_sequences=8,
        checkpoint_every=100,
        log_every=3,
    )
