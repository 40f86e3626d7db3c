"""The published architecture at full size, with random weights: 12 blocks of width 768, 50,258 ids.

What is checked is what needs no published weights: parameter count, the saved file's layout, and a forward
pass over the whole context. Everything shares one model; peak memory is about 3 GB.
"""

# Axes: batch, pos, d_vocab

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mdlm_interp import HookedMDLM, MDLMConfig

pytestmark = pytest.mark.slow

CONFIG = MDLMConfig()
N_PARAMETERS = 169_627_218
DATA_BYTES = 678_509_000
FILE_BYTES = 678_522_728
"""Size of the published model.safetensors."""


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published file."""
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (50_258, 768),
        "sigma_map.mlp.0.weight": (128, 256),
        "sigma_map.mlp.0.bias": (128,),
        "sigma_map.mlp.2.weight": (128, 128),
        "sigma_map.mlp.2.bias": (128,),
        "rotary_emb.inv_freq": (32,),
        "output_layer.norm_final.weight": (768,),
        "output_layer.linear.weight": (50_258, 768),
        "output_layer.linear.bias": (50_258,),
        "output_layer.adaLN_modulation.weight": (1536, 128),
        "output_layer.adaLN_modulation.bias": (1536,),
    }
    for i in range(12):
        shapes |= {
            f"blocks.{i}.norm1.weight": (768,),
            f"blocks.{i}.attn_qkv.weight": (2304, 768),
            f"blocks.{i}.attn_out.weight": (768, 768),
            f"blocks.{i}.norm2.weight": (768,),
            f"blocks.{i}.mlp.0.weight": (3072, 768),
            f"blocks.{i}.mlp.0.bias": (3072,),
            f"blocks.{i}.mlp.2.weight": (768, 3072),
            f"blocks.{i}.mlp.2.bias": (768,),
            f"blocks.{i}.adaLN_modulation.weight": (4608, 128),
            f"blocks.{i}.adaLN_modulation.bias": (4608,),
        }
    return {"backbone." + name: shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def model() -> HookedMDLM:
    """A full-size model in which nothing is zero."""
    model = HookedMDLM(CONFIG).eval()
    generator = torch.Generator().manual_seed(20240611)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name or "output_layer.linear" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def saved(model: HookedMDLM) -> Iterator[Path]:
    """The model's directory, removed after the last test: pytest would keep 680 MB a run."""
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        yield Path(name)


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (1, 1024), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def logits(model: HookedMDLM, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids)
    return output


def test_parameters_are_the_published_169_627_218(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == N_PARAMETERS


def test_saved_tensors_have_the_published_names_shapes_dtype_and_sizes(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        shapes = {name: tuple(view.get_shape()) for name, view in found.items()}
        dtypes = {view.get_dtype() for view in found.values()}
    assert len(shapes) == 131
    assert shapes == published_shapes()
    assert dtypes == {"F32"}
    assert sum(4 * math.prod(shape) for shape in shapes.values()) == DATA_BYTES
    assert (saved / "model.safetensors").stat().st_size == FILE_BYTES
    stored = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert stored == CONFIG.to_mapping()


def test_forward_at_the_full_context_gives_finite_varied_logits(logits):
    assert logits.shape == (1, 1024, 50_258)
    assert logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())
    assert 1.0 < logits.std().item() < 10.0


def test_float32_at_the_full_context_is_within_2e_4_of_float64(saved, input_ids, logits):
    # Five times the largest error of upstream's own float32 network at this size and length.
    reference = HookedMDLM.from_pretrained(saved, dtype=torch.float64)
    with torch.no_grad():
        exact = reference(input_ids)
    worst = max((ours - theirs).abs().max().item() for ours, theirs in zip(logits[0], exact[0], strict=True))
    assert worst <= 2e-4, worst


def test_transformers_class_with_the_same_weights_gives_the_same_bits(model, input_ids, logits):
    pytest.importorskip("transformers")
    from mdlm_interp.hf.configuration_mdlm import MDLMConfig as HFConfig
    from mdlm_interp.hf.modeling_mdlm import MDLM

    with torch.device("meta"):
        twin = MDLM(HFConfig()).eval()
    twin.load_state_dict(model.state_dict(), assign=True)  # shares the memory
    with torch.no_grad():
        assert torch.equal(twin(input_ids), logits)
