"""The forward pass against upstream's own, run in float64 on random weights.

Every claim here is bounded: the golden files were written by the upstream network, and each logit and
each stored activation must lie within `BOUNDS` of its float64 values. Run as a script to print the largest
errors: `python tests/mdlm_interp/test_golden.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mdlm_interp.arithmetic import Arithmetic
from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM

DIRECTORY = Path(__file__).parents[1] / "golden"
FILES = ("mdlm_tiny_a", "mdlm_tiny_b")

BOUNDS = {torch.float64: 1e-10, torch.float32: 5e-5}
"""float64: far above rounding (1e-14), far below any mistake (1e-3). float32: five times upstream's own
float32 error on these files."""

HOOK_OF = {
    "embed": "hook_embed",
    "cond": "hook_cond",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_ctx": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.attn.hook_out",
    "mlp_out": "blocks.{}.mlp.hook_out",
    "attn_pattern": "blocks.{}.attn.hook_pattern",
    "final_in": "hook_final_in",
}
"""Hook point of each kind of golden activation; attn_out and mlp_out were taken before the gate."""

AT_POSITIONS = ("embed", "final_in", "resid_post", "attn_ctx")
"""Kinds that a file may store at `act64.positions` only."""


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    config: MDLMConfig
    weights: dict[str, Tensor]
    input_ids: Tensor
    short_input_ids: Tensor
    sigma: Tensor
    logits: Tensor
    short_logits: Tensor
    activations: dict[str, Tensor]
    """By golden key without its prefix, such as "attn_ctx.0"."""
    positions: Tensor | None


def load_golden(name: str) -> Golden:
    """Read tests/golden/NAME.json and NAME.safetensors."""
    described = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    stored = load_file(DIRECTORY / f"{name}.safetensors")
    activations = {
        key.removeprefix("act64."): value for key, value in stored.items() if key.startswith("act64.")
    }
    return Golden(
        config=MDLMConfig.from_mapping(described["config"], source=name),
        weights={key: value for key, value in stored.items() if key.startswith("backbone.")},
        input_ids=stored["in.input_ids"],
        short_input_ids=stored["in.short_input_ids"],
        sigma=stored["in.timesteps"],
        logits=stored["out.logits_fp64"],
        short_logits=stored["out.short_logits_fp64"],
        positions=activations.pop("positions", None),
        activations=activations,
    )


def build(
    golden: Golden, dtype: torch.dtype, arithmetic: Arithmetic | None = None, config: MDLMConfig | None = None
) -> HookedMDLM:
    """A model with the golden weights."""
    model = HookedMDLM(config or golden.config, arithmetic).to(dtype)
    model.load_state_dict(golden.weights)
    return model.eval()


def hook_name(key: str) -> str:
    """The hook point that a golden activation was recorded at."""
    kind, _, block = key.partition(".")
    return HOOK_OF[kind].format(block)


@torch.no_grad()
def errors_against(golden: Golden, model: HookedMDLM) -> dict[str, float]:
    """Largest absolute error of the logits (long input, then short, on this instance) and each activation."""

    def worst(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        # A mistake may well produce NaN, which no comparison would call too large.
        return float((found.double() - expected).abs().nan_to_num(nan=torch.inf).max())

    errors = {"logits": worst(model(golden.input_ids, golden.sigma), golden.logits)}
    names = [hook_name(key) for key in golden.activations]
    logits, cache = model.run_with_cache(golden.input_ids, names, timesteps=golden.sigma)
    errors["logits, explicit attention"] = worst(logits, golden.logits)
    for key, expected in golden.activations.items():
        found = cache[hook_name(key)]
        if golden.positions is not None and key.partition(".")[0] in AT_POSITIONS:
            found = found[:, golden.positions]
        errors[key] = worst(found.flatten(2) if key.startswith("attn_ctx") else found, expected)
    errors["short logits"] = worst(model(golden.short_input_ids, golden.sigma), golden.short_logits)
    return errors


def failures(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """The entries beyond the bound, largest first."""
    beyond = {key: error for key, error in errors.items() if not error <= BOUNDS[dtype]}
    return dict(sorted(beyond.items(), key=lambda entry: -entry[1]))


def largest_errors() -> list[tuple[str, torch.dtype, str, float, float]]:
    """File, dtype, worst activation or logits, its error, and the error of the logits."""
    rows = []
    for name in FILES:
        golden = load_golden(name)
        for dtype in BOUNDS:
            errors = errors_against(golden, build(golden, dtype))
            key = max(errors, key=lambda key: errors[key])
            rows.append((name, dtype, key, errors[key], errors["logits"]))
    return rows


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_logits_and_every_activation_lie_within_the_bound_of_upstream(name, dtype):
    golden = load_golden(name)
    assert failures(errors_against(golden, build(golden, dtype)), dtype) == {}


@pytest.mark.parametrize("name", FILES)
def test_every_golden_activation_has_a_hook_point(name):
    golden = load_golden(name)
    model = build(golden, torch.float32)
    kinds = {key.partition(".")[0] for key in golden.activations}
    assert kinds == set(HOOK_OF)
    assert {hook_name(key) for key in golden.activations} <= set(model.hook_names)


def test_sigma_has_no_effect_without_time_conditioning():
    """Exact: sigma is replaced by zero before anything reads it."""
    golden = load_golden("mdlm_tiny_a")
    model = build(golden, torch.float32)
    assert torch.equal(model(golden.input_ids, golden.sigma), model(golden.input_ids))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
def test_sigma_of_another_shape_is_refused_with_and_without_time_conditioning(shape):
    for name in ("mdlm_tiny_a", "mdlm_tiny_b"):
        golden = load_golden(name)
        with pytest.raises(DataError, match=r"timesteps must have shape \[2\], one sigma a sequence, got"):
            build(golden, torch.float32)(golden.input_ids[:2], torch.zeros(shape))


def test_the_state_dict_has_exactly_the_published_names_and_shapes():
    golden = load_golden("mdlm_tiny_a")
    ours = {key: tuple(value.shape) for key, value in build(golden, torch.float32).state_dict().items()}
    assert ours == {key: tuple(value.shape) for key, value in golden.weights.items()}


if __name__ == "__main__":
    for file, kind, key, worst, at_logits in largest_errors():
        print(f"{file}  {kind!s:13}  largest {worst:.2e} ({key})  logits {at_logits:.2e}")  # noqa: T201
