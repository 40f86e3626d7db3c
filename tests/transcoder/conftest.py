"""A tiny model with its tokenizer, one captured store, and a transcoder trained on it for a moment."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capture import ActivationStore, CaptureConfig, open_store, run_capture
from capture.statistics import HookStatistics
from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.training.tokenizer import train_tokenizer
from transcoder.checkpoint import load_clt
from transcoder.config import CLTRunConfig, TrainConfig, TranscoderConfig
from transcoder.data import store_normalisation
from transcoder.model import CrossLayerTranscoder
from transcoder.run import train

SENTENCE = "the old fox sees a red river and nine small birds sing to every quiet stone near our house"
WORDS = SENTENCE.split()
LENGTH = 24
N_LAYERS, D_MODEL, N_FEATURES, K = 3, 32, 24, 4
SHAPE = TranscoderConfig(n_layers=N_LAYERS, d_model=D_MODEL, n_features=N_FEATURES, k=K)


def story(number: int) -> str:
    """A short text, another for each number."""
    count = 12 + number % 9
    return " ".join(WORDS[(number * 7 + step * step + step // 3) % len(WORDS)] for step in range(count))


def random_model(vocab_size: int, seed: int = 1) -> HookedMDLM:
    """Three blocks of width 32; every parameter drawn, so that no gate is zero and no block the identity."""
    config = MDLMConfig(
        vocab_size=vocab_size,
        model_length=128,
        hidden_dim=D_MODEL,
        cond_dim=16,
        n_blocks=N_LAYERS,
        n_heads=2,
        time_conditioning=True,
    )
    model = HookedMDLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = 0.25 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + draws if ".norm" in name else draws)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are so small that waiting for a second thread costs ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer, as `from_pretrained` takes them."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([story(number) for number in range(50)], 290)
    random_model(tokenizer.vocab_size).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def model(model_directory: Path) -> HookedMDLM:
    return HookedMDLM.from_pretrained(model_directory)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n\n".join(story(number) for number in range(60)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def store(model_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Forty sequences of 24 tokens: 960 rows, whose sequences lie across the edges of chunks."""
    out = tmp_path_factory.mktemp("store") / "run.zarr"
    config = CaptureConfig(
        model=str(model_directory), files=(text,), out=str(out), length=LENGTH, max_sequences=40, seed=3
    )
    return run_capture(config)


@pytest.fixture
def clt(store: ActivationStore) -> CrossLayerTranscoder:
    """Initial weights, biases drawn too, with the store's normalisation."""
    norms = [store_normalisation(store, hooks) for hooks in (SHAPE.input_hooks, SHAPE.output_hooks)]
    transcoder = CrossLayerTranscoder(SHAPE, *norms, seed=4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for bias in (transcoder.b_enc, transcoder.b_dec):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return transcoder


@pytest.fixture(scope="session")
def short_settings() -> TrainConfig:
    """Twelve steps of fifty rows, windows of two chunks, and features that die young."""
    return TrainConfig(
        steps=12,
        batch_size=50,
        lr=5e-3,
        warmup_steps=2,
        dead_after_tokens=50,
        auxk=5,
        window_chunks=2,
        log_every=3,
        checkpoint_every=5,
        plots=False,
        seed=6,
    )


@pytest.fixture
def run_config(store: ActivationStore, short_settings: TrainConfig, tmp_path: Path) -> CLTRunConfig:
    """A run with these settings."""
    return CLTRunConfig(
        store=store.path,
        out=tmp_path / "clt",
        n_features=64,
        k=2,
        held_out_fraction=0.2,
        train=short_settings,
    )


@pytest.fixture(scope="session")
def trained_directory(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 150 steps; only to be read."""
    out = tmp_path_factory.mktemp("trained") / "clt"
    settings = TrainConfig(
        steps=150, batch_size=128, lr=5e-3, warmup_steps=5, dead_after_tokens=2000, plots=False, seed=6
    )
    run = CLTRunConfig(store=store.path, out=out, n_features=64, k=8, held_out_fraction=0.2, train=settings)
    train(run)
    return out


@pytest.fixture
def trained(trained_directory: Path) -> CrossLayerTranscoder:
    return load_clt(trained_directory)


@pytest.fixture
def rows(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """Inputs and targets [layer row d_model] of 64 rows of the store."""
    read = store.read(list(range(64)))
    return (
        torch.stack([read[name] for name in SHAPE.input_hooks]),
        torch.stack([read[name] for name in SHAPE.output_hooks]),
    )


@pytest.fixture
def ids(store: ActivationStore) -> Tensor:
    """Two noised sequences of the store."""
    return store.tokens()[1][4:6]


@pytest.fixture
def sigma() -> Tensor:
    return torch.tensor([0.4, 1.7])


@pytest.fixture(scope="session")
def listening() -> Callable[[HookedMDLM], int]:
    """Counts the functions that are installed on a model's hook points."""
    return lambda model: sum(len(point.listeners) for point in model._registry.points.values())


@pytest.fixture
def reopened(store: ActivationStore) -> ActivationStore:
    """The store again, for tests that put something in its place."""
    return open_store(store.path)


@pytest.fixture
def capture(
    model_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ActivationStore]:
    """Captures the same forty sequences with something else about it."""

    def run(**changes: Any) -> ActivationStore:
        out = tmp_path_factory.mktemp("other-store") / "run.zarr"
        settings = {
            "model": str(model_directory),
            "files": (text,),
            "length": LENGTH,
            "max_sequences": 40,
            "seed": 3,
        }
        return run_capture(CaptureConfig(out=str(out), **{**settings, **changes}))

    return run


class InterruptedStore(ActivationStore):
    """A store whose capture stopped after some sequences, as a reader shows it."""

    complete = False
    n_sequences = 0

    def __init__(self, store: ActivationStore, n_sequences: int) -> None:
        self.__dict__.update(store.__dict__)
        self._store, self.n_sequences = store, n_sequences
        self._rows = n_sequences * store.length

    def tokens(self) -> tuple[Tensor, Tensor]:
        x_0, x_t = self._store.tokens()
        return x_0[: self.n_sequences], x_t[: self.n_sequences]

    def times(self) -> Tensor:
        return self._store.times()[: self.n_sequences]

    def statistics(self, hook: str) -> HookStatistics:
        return self._store.statistics(hook)


@pytest.fixture
def interrupted(store: ActivationStore) -> InterruptedStore:
    """Thirty of the store's forty sequences."""
    return InterruptedStore(store, 30)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Lets no file grow beyond some bytes, as a full disk does, for everything that writes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
