"""Small models with random weights; untouched initial weights would make every block the identity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from mdlm_interp.config import MDLMConfig
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer

SMALL = MDLMConfig(
    vocab_size=41, model_length=16, hidden_dim=24, cond_dim=10, n_blocks=2, n_heads=3, time_conditioning=True
)


def random_weights(model: HookedMDLM, seed: int = 0) -> HookedMDLM:
    """Draw every parameter, adaLN and output layer included, so that every hook point matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = 0.3 * torch.randn(parameter.shape, generator=generator)
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
def small_config() -> MDLMConfig:
    return SMALL


@pytest.fixture
def make_model() -> Callable[..., HookedMDLM]:
    """Builds a small model with random weights; keyword arguments go to HookedMDLM."""
    return lambda config=SMALL, seed=0, **keywords: random_weights(HookedMDLM(config, **keywords), seed)


@pytest.fixture
def model(make_model):
    """A time-conditioned HookedMDLM of two blocks."""
    return make_model()


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Token ids [2, 7], masks included."""
    drawn = torch.randint(0, SMALL.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    drawn[:, 3] = SMALL.mask_id
    return drawn


@pytest.fixture(scope="session")
def sigma() -> Tensor:
    return torch.tensor([0.3, 2.1])


@pytest.fixture
def cache(model, ids, sigma):
    """Every activation of `model` on `ids`."""
    return model.run_with_cache(ids, timesteps=sigma)[1]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the suite's run-time type checks off, to hand our own checks what the annotations exclude."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def listening() -> Callable[[HookedMDLM], int]:
    """Counts the functions that are installed on a model's hook points."""
    return lambda model: sum(len(point.listeners) for point in model._registry.points.values())


@pytest.fixture(scope="session")
def gpt2_directory(tmp_path_factory):
    """GPT-2's two tokenizer files with its 256 bytes but only a handful of merges."""
    merges = ["T h", "Th e", "Ġ o", "Ġo f", "Ġ i", "Ġi s", "Ġ t", "h e", "Ġt he", "Ã ©"]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    directory = tmp_path_factory.mktemp("gpt2")
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)})
    (directory / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def gpt2_tokenizer(gpt2_directory) -> Tokenizer:
    """The tokenizer of `gpt2_directory`: <|endoftext|> is its last id but one, [MASK] its last."""
    return load_tokenizer(gpt2_directory)
