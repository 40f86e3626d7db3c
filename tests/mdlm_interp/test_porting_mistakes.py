"""Frequent mistakes in a port of MDLM are caught by the golden comparison, and harmless choices pass it.

Each mistake is put into our own model and compared by the function that `test_golden` uses. The claim is
bounded: the comparison fails in float64 and in float32, and the logits move by at least half of what
was measured for that mistake on upstream's code (on the files where it can show).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.config import TIME_FEATURES
from mdlm_interp.model import HookedMDLM
from tests.mdlm_interp.test_golden import BOUNDS, FILES, Golden, build, errors_against, failures, load_golden

Build = Callable[[Golden, torch.dtype], HookedMDLM]


class SmallEps(NativeArithmetic):
    """DiT's LayerNorm eps."""

    def layer_norm(self, x, weight, scale=None):
        return functional.layer_norm(x, [x.shape[-1]], weight, None, 1e-6), super().layer_norm(x, weight)[1]


class UnbiasedVariance(NativeArithmetic):
    """Variance divided by d - 1."""

    def layer_norm(self, x, weight, scale=None):
        return super().layer_norm(x, weight, (x.var(-1, keepdim=True) + 1e-5).rsqrt())


class NormWeightDropped(NativeArithmetic):
    """LayerNorm without its weight."""

    def layer_norm(self, x, weight, scale=None):
        return super().layer_norm(x, torch.ones_like(weight), scale)


class ErfGelu(NativeArithmetic):
    """GELU in its exact form."""

    def gelu_tanh(self, x):
        return functional.gelu(x)


class HalfMinusOne(NativeArithmetic):
    """Time frequencies divided by half the width less one, as in tensor2tensor."""

    def time_features(self, sigma, width):
        half = width // 2
        steps = torch.arange(half, dtype=sigma.dtype)
        angles = sigma[:, None] * torch.exp(-math.log(10_000.0) * steps / (half - 1))
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class SinesFirst(NativeArithmetic):
    """Sines before cosines."""

    def time_features(self, sigma, width):
        return super().time_features(sigma, width).roll(width // 2, dims=-1)


class TimeForSigma(NativeArithmetic):
    """t where the network wants sigma(t)."""

    def time_features(self, sigma, width):
        return super().time_features(-torch.expm1(-sigma) / (1 - 1e-3), width)


class Interleaved(NativeArithmetic):
    """Rotary pairs of neighbouring dimensions."""

    def rotate(self, x, cos, sin):
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RotatedValues(NativeArithmetic):
    """Rotary on v as well."""

    def rotary_tables(self, inv_freq, n_positions):
        self.tables = super().rotary_tables(inv_freq, n_positions)
        return self.tables

    def mix(self, pattern, v):
        return super().mix(pattern, self.rotate(v, *self.tables))

    def attention(self, q, k, v):
        return super().attention(q, k, self.rotate(v, *self.tables))


class ScaleAlone(NativeArithmetic):
    """x * scale + shift."""

    def modulate(self, x, shift, scale):
        return x * scale + shift


class PositionsFromOne(NativeArithmetic):
    """Rotary positions 1, 2, ...: only differences of positions matter."""

    def rotary_tables(self, inv_freq, n_positions):
        cos, sin = super().rotary_tables(inv_freq, n_positions + 1)
        return cos[1:], sin[1:]


class MasksExcluded(NativeArithmetic):
    """Mask tokens left out of the keys, as padding would be."""

    is_masked: Tensor

    def attention_scores(self, q, k):
        return super().attention_scores(q, k).masked_fill(self.is_masked[:, None, None], -torch.inf)

    def attention(self, q, k, v):
        return self.mix(self.softmax(self.attention_scores(q, k)), v)


def with_arithmetic(mistaken: type[NativeArithmetic]) -> Build:
    return lambda golden, dtype: build(golden, dtype, mistaken())


def masks_excluded(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
    arithmetic = MasksExcluded()
    model = build(golden, dtype, arithmetic)

    def note(_: object, inputs: tuple[Tensor, ...]) -> None:
        arithmetic.is_masked = inputs[0] == golden.config.mask_id

    model.register_forward_pre_hook(note)
    return model


def outer_silu_missing(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
    model = build(golden, dtype)
    sigma_map = model.backbone.sigma_map

    def forward(sigma, arithmetic):
        hidden = sigma_map.mlp.first(arithmetic.time_features(sigma, TIME_FEATURES), arithmetic)
        return sigma_map.mlp.second(arithmetic.silu(hidden), arithmetic)

    sigma_map.forward = forward  # type: ignore[method-assign]
    return model


def sigma_not_zeroed(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
    return build(golden, dtype, config=replace(golden.config, time_conditioning=True))


def inv_freq_in_float64(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
    model = build(golden, dtype)
    exponents = torch.arange(0, golden.config.d_head, 2, dtype=torch.float64) / golden.config.d_head
    model.backbone.rotary_emb.inv_freq = (10_000.0**-exponents).to(dtype)
    return model


def rows_reordered(pattern: str, parts: tuple[int, ...]) -> Build:
    """Reading a projection's output in another order is the same as having its rows in another order."""

    def mistaken(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
        weights = dict(golden.weights)
        for name in fnmatch.filter(weights, pattern):
            pieces = weights[name].chunk(len(parts))
            weights[name] = torch.cat([pieces[part] for part in parts])
        return build(replace(golden, weights=weights), dtype)

    return mistaken


def heads_outermost(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
    weights = dict(golden.weights)
    for name in weights:
        if name.endswith("attn_qkv.weight"):
            weights[name] = (
                weights[name].unflatten(0, (golden.config.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            )
    return build(replace(golden, weights=weights), dtype)


def final_modulation_dropped(golden: Golden, dtype: torch.dtype) -> HookedMDLM:
    kept = {k: v * 0 if "output_layer.adaLN" in k else v for k, v in golden.weights.items()}
    return build(replace(golden, weights=kept), dtype)


@dataclass(frozen=True)
class Mistake:
    """What it is, and how far it moves the largest logit in tiny_a and tiny_b; None where it cannot show."""

    name: str
    build: Build
    tiny_a: float | None
    tiny_b: float | None

    def change(self, file: str) -> float | None:
        return {"mdlm_tiny_a": self.tiny_a, "mdlm_tiny_b": self.tiny_b}[file]


MISTAKES = (
    Mistake("LayerNorm eps 1e-6", with_arithmetic(SmallEps), 7e-3, 7e-3),
    Mistake("erf GELU", with_arithmetic(ErfGelu), 1e-3, 2e-3),
    Mistake("frequency divisor half - 1", with_arithmetic(HalfMinusOne), None, 7e-2),
    Mistake("unbiased variance", with_arithmetic(UnbiasedVariance), 0.15, 0.15),
    Mistake("t instead of sigma", with_arithmetic(TimeForSigma), None, 4.2),
    Mistake("sines before cosines", with_arithmetic(SinesFirst), 9.8, 9.8),
    Mistake("outer SiLU missing", outer_silu_missing, 6.6, 6.6),
    Mistake("sigma not zeroed", sigma_not_zeroed, 5.6, None),
    Mistake("interleaved rotary", with_arithmetic(Interleaved), 4.3, 8.0),
    Mistake("rotary on v", with_arithmetic(RotatedValues), 8.1, 8.1),
    Mistake("chunks scale, shift, gate", rows_reordered("*blocks.*.adaLN*", (1, 0, 2, 4, 3, 5)), 10.0, 10.0),
    Mistake("chunks MLP first", rows_reordered("*blocks.*.adaLN*", (3, 4, 5, 0, 1, 2)), 10.0, 10.0),
    Mistake("qkv as (h three d)", heads_outermost, 11.0, 11.0),
    Mistake("scale instead of 1 + scale", with_arithmetic(ScaleAlone), 7.0, 7.0),
    Mistake("final adaLN dropped", final_modulation_dropped, 4.5, 4.5),
    Mistake("final adaLN's order swapped", rows_reordered("*output_layer.adaLN*", (1, 0)), 6.9, 6.9),
    Mistake("norm weight dropped", with_arithmetic(NormWeightDropped), 3.9, 3.9),
    Mistake("mask tokens excluded from keys", masks_excluded, 6.0, 6.0),
)

SHOWN = [(m, file) for m in MISTAKES for file in FILES if m.change(file) is not None]
UNSEEN = [(m, file) for m in MISTAKES for file in FILES if m.change(file) is None]


def named(cases: list[tuple[Mistake, str]]) -> list[str]:
    return [f"{mistake.name}, {file}" for mistake, file in cases]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("mistake", "file"), SHOWN, ids=named(SHOWN))
def test_the_golden_comparison_fails_for(mistake, file, dtype):
    golden = load_golden(file)
    errors = errors_against(golden, mistake.build(golden, dtype))
    beyond = failures(errors, dtype)
    assert {"logits", "logits, explicit attention", "short logits"} <= set(beyond), errors
    assert errors["logits"] >= 0.5 * mistake.change(file), errors


@pytest.mark.parametrize(("mistake", "file"), UNSEEN, ids=named(UNSEEN))
def test_a_file_that_does_not_exercise_the_mistake_passes(mistake, file):
    """Shows that the failures above come from the mistake and not from how it is injected."""
    golden = load_golden(file)
    assert failures(errors_against(golden, mistake.build(golden, torch.float64)), torch.float64) == {}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("file", FILES)
def test_rotary_positions_from_one_are_harmless(file, dtype):
    golden = load_golden(file)
    assert failures(errors_against(golden, build(golden, dtype, PositionsFromOne())), dtype) == {}


@pytest.mark.parametrize("file", FILES)
def test_inverse_frequencies_recomputed_in_float64_are_harmless(file):
    """The reference has the stored float32 buffer: 2e-7 away in float64, nothing that float32 can tell."""
    golden = load_golden(file)
    assert failures(errors_against(golden, inv_freq_in_float64(golden, torch.float32)), torch.float32) == {}
    errors = errors_against(golden, inv_freq_in_float64(golden, torch.float64))
    assert max(errors.values()) < 5e-7, errors
