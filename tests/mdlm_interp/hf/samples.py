"""Models of both kinds with the golden weights or random ones, and a tokenizer, for what concerns transformers.

Plain functions, not fixtures: on another version of transformers these tests run without the shared conftests,
whose packages that environment does not have.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer

pytest.importorskip("transformers")

from mdlm_interp.hf.configuration_mdlm import MDLMConfig as HFConfig
from mdlm_interp.hf.modeling_mdlm import MDLM

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_NAMES = ("mdlm_tiny_a", "mdlm_tiny_b")
INV_FREQ = "backbone.rotary_emb.inv_freq"
PARIS = "The capital of France is [MASK]."
EXPORTED = {"README.md", "config.json", "configuration_mdlm.py", "model.safetensors", "modeling_mdlm.py"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


def golden(name: str) -> tuple[dict[str, Tensor], HFConfig]:
    fields = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["config"]
    return load_file(GOLDEN / f"{name}.safetensors"), HFConfig(**fields)


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}


def golden_model(name: str, dtype: torch.dtype) -> tuple[MDLM, dict[str, Tensor]]:
    tensors, config = golden(name)
    model = MDLM(config).eval()
    model.load_state_dict(weights(tensors))
    return model.to(dtype), tensors


def hooked(name: str) -> HookedMDLM:
    tensors, config = golden(name)
    model = HookedMDLM(MDLMConfig.from_mapping(config.to_dict(), source=name)).eval()
    model.load_state_dict(weights(tensors))
    return model


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "The capital of France is Paris. The capital of Italy is Rome. Water is wet, and fire is hot."
    ] * 4
    backend.train_from_iterator(text, trainer)
    return Tokenizer(backend)


def random_model(vocab_size: int, time_conditioning: bool = False) -> HookedMDLM:
    config = MDLMConfig(
        vocab_size=vocab_size,
        model_length=32,
        hidden_dim=32,
        cond_dim=16,
        n_blocks=2,
        n_heads=2,
        time_conditioning=time_conditioning,
    )
    model = HookedMDLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # also what starts at zero
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
