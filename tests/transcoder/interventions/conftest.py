"""The bundled model with a transcoder of drawn weights, and the tiny model with its trained one."""

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.filling import encode_prompt
from mdlm_interp.tokenizers import load_tokenizer
from transcoder import CrossLayerTranscoder, ReplacementModel, TranscoderConfig

SENTENCE = "The dog ran in the park. The [MASK] was happy and [MASK] home."


@pytest.fixture(scope="session")
def bundled() -> HookedMDLM:
    return HookedMDLM.from_pretrained("bundled")


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture(scope="session")
def state(bundled, tokenizer):
    """A sentence with two masks [1 pos]."""
    return encode_prompt(bundled, tokenizer, SENTENCE)


@pytest.fixture(scope="session")
def beside(bundled) -> ReplacementModel:
    """The bundled model beside a transcoder of drawn weights whose outputs are as large as the MLPs'."""
    config = TranscoderConfig(
        n_layers=bundled.config.n_blocks, d_model=bundled.config.hidden_dim, n_features=64, k=8
    )
    return ReplacementModel(bundled, CrossLayerTranscoder(config, seed=7).requires_grad_(False))


@pytest.fixture
def replacement(model, trained) -> ReplacementModel:
    """The tiny model beside the transcoder that was trained on it."""
    return ReplacementModel(model, trained.requires_grad_(False))


@pytest.fixture
def active(replacement, ids, sigma):
    """A feature of layer 1 that is active at position 5 of the first sequence."""
    with torch.no_grad():
        return int(replacement.feature_acts(ids, sigma)[1, 0, 5].argmax())
