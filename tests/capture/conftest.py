"""A tiny model with its tokenizer, text to capture, and one finished store that tests only read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from capture import ActivationStore, CaptureConfig, open_store, run_capture
from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer
from tests.capture.interrupts import interrupted_capture

SENTENCE = "the old fox sees a red river and nine small birds sing to every quiet stone near our house"
WORDS = SENTENCE.split()
LENGTH = 24


def story(number: int) -> str:
    """A short text, another for each number."""
    return " ".join(
        WORDS[(number * 7 + step * step + step // 3) % len(WORDS)] for step in range(12 + number % 9)
    )


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of width 32, weights perturbed so that nothing is zero."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([story(number) for number in range(50)], trainer)
    tokenizer = Tokenizer(backend)
    config = MDLMConfig(
        vocab_size=tokenizer.vocab_size, model_length=32, hidden_dim=32, cond_dim=16, n_blocks=2, n_heads=2
    )
    model = HookedMDLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Two files of twenty documents each."""
    directory = tmp_path_factory.mktemp("texts")
    files = tuple(directory / name for name in ("first.txt", "second.txt"))
    for number, file in enumerate(files):
        file.write_text("\n\n".join(story(20 * number + i) for i in range(20)), encoding="utf-8")
    return files


@pytest.fixture
def config(model_directory: Path, texts: tuple[Path, ...], tmp_path: Path) -> CaptureConfig:
    """A capture of 21 sequences of 24 tokens: 504 rows, not a multiple of a chunk."""
    return CaptureConfig(
        model=str(model_directory),
        files=texts,
        out=str(tmp_path / "run.zarr"),
        length=LENGTH,
        max_sequences=21,
        seed=5,
    )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 64 rows in chunks of 16: 504 rows take eight, and sequences of 24 lie across their edges."""
    monkeypatch.setattr("capture.schema.CHUNK_ROWS", 16)
    monkeypatch.setattr("capture.schema.SHARD_ROWS", 64)


@pytest.fixture
def capture(config: CaptureConfig, tmp_path: Path) -> Callable[..., ActivationStore]:
    """Run a variation of `config`, each into a directory of its own."""
    runs = 0

    def run(**changes: object) -> ActivationStore:
        nonlocal runs
        runs += 1
        return run_capture(replace(config, out=str(tmp_path / f"run{runs}.zarr"), **changes))  # type: ignore[arg-type]

    return run


@pytest.fixture
def begun(config: CaptureConfig, small_shards: None, monkeypatch: pytest.MonkeyPatch) -> CaptureConfig:
    """An interrupted capture of 504 rows, some of them committed."""
    config = replace(config, batch_size=4, forwards=1)
    interrupted_capture(config, monkeypatch, 6)
    assert len(open_store(config.out))
    return config
