"""The layers of the learner's network: RMSNorm, SwiGLU, rotary positions in two conventions, FiLM by time.

Every intermediate passes through a hook point, under MDLM's names where the thing exists there. What does not
exist here: gates (so `attn.hook_out` and `mlp.hook_out`), and modulation of the final norm. What exists only
here: `film.*` and `mlp.hook_pre_linear`.

Source:
    scottstts/Learning-Diffusion-LM at commit 72a8358, train_model.ipynb.
"""

# Axes: batch, pos, d (hidden_dim), head, d_head, half (d_head / 2), vocab

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.hooks import HookPoint
from mdlm_interp.layers import Affine, hooked_attention, inverse_frequencies
from mdlm_interp.learner_config import LearnerConfig, Rope
from mdlm_interp.shapes import Float, Int64

RMS_NORM_EPS = 1e-6
TIME_SCALE = 1000.0
"""t in [0, 1] is stretched to this before its sinusoids, as if it counted a thousand steps."""

FILM_HOOKS = tuple(f"film.hook_{part}_{branch}" for branch in ("attn", "mlp") for part in ("shift", "scale"))
BLOCK_HOOKS = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_in",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
HEAD_HOOKS = ("ln_final.hook_scale", "ln_final.hook_normalized", "hook_final_in", "hook_logits")


def block_hooks(config: LearnerConfig) -> tuple[str, ...]:
    """Names of a block's hook points, in execution order."""
    return (*FILM_HOOKS, *BLOCK_HOOKS) if config.time_conditioning else BLOCK_HOOKS


def rotary_tables(
    d_head: int, n_positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]]:
    """cos and sin of position times inverse frequency, in float32 at least."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return NativeArithmetic().rotary_tables(inverse_frequencies(d_head, device, kind), n_positions)


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "pos half"],
    sin: Float[Tensor, "pos half"],
    rope: Rope,
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn pairs of dimensions by the position's angles.

    The two conventions differ by the order of dimensions, even ones first:

    >>> x = torch.arange(1.0, 9.0).reshape(1, 2, 1, 4)
    >>> cos, sin = rotary_tables(4, 2, x.device, x.dtype)
    >>> evens_first = torch.tensor([0, 2, 1, 3])
    >>> torch.equal(
    ...     rotate(x, cos, sin, "interleaved")[..., evens_first],
    ...     rotate(x[..., evens_first], cos, sin, "half_split"),
    ... )
    True

    Source:
        torchtune, RotaryPositionalEmbeddings (interleaved); flash-attn, apply_rotary_emb_torch (both).
    """
    if rope == "half_split":
        return NativeArithmetic().rotate(x, cos, sin)
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


def time_features(t: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Sinusoids of 1000 t: sines, then cosines; frequencies from 1 to 1e-4 with both ends."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype)
    angles = TIME_SCALE * t[:, None] * torch.exp(-math.log(10_000.0) * steps / (half - 1))
    features = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return functional.pad(features, (0, width - 2 * half))


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), times a weight; its scale can be read or replaced."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))

    def forward(
        self, x: Float[Tensor, "batch pos d"], at: Mapping[str, HookPoint], name: str
    ) -> Float[Tensor, "batch pos d"]:
        """The normalised stream."""
        scale = at[f"{name}.hook_scale"](torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_NORM_EPS))
        return at[f"{name}.hook_normalized"](x * scale * self.weight)


class TiedEmbedding(nn.Module):
    """One table that embeds tokens and gives their logits."""

    def __init__(self, vocab_size: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d))

    def forward(self, input_ids: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d"]:
        """Rows of the table."""
        return functional.embedding(input_ids, self.weight)

    def unembed(
        self, h: Float[Tensor, "batch pos d"], arithmetic: NativeArithmetic
    ) -> Float[Tensor, "batch pos vocab"]:
        """Inner product with each row."""
        return arithmetic.linear(h, self.weight)


class Gated(nn.Module):
    """Linear to twice the width, one half times SiLU of the other, linear: SwiGLU as published."""

    def __init__(self, d_in: int, width: int, d_out: int) -> None:
        super().__init__()
        self.first = Affine(d_in, 2 * width)
        self.second = Affine(width, d_out)

    def forward(
        self, x: Float[Tensor, "*rows d_in"], arithmetic: NativeArithmetic
    ) -> Float[Tensor, "*rows d_out"]:
        """Without hook points, for the path of time."""
        value, gate = self.first(x, arithmetic).chunk(2, dim=-1)
        out: Tensor = self.second(value * functional.silu(gate), arithmetic)
        return out


class LearnerBlock(nn.Module):
    """One transformer block; time shifts and scales what attention and MLP read, and gates nothing."""

    def __init__(self, config: LearnerConfig, points: Mapping[str, HookPoint]) -> None:
        super().__init__()
        d = config.hidden_dim
        self.at = points
        self.n_heads, self.dropout, self.rope = config.n_heads, config.dropout, config.rope
        self.multiplier = config.residual_multiplier
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.attn_qkv = Affine(d, 3 * d)
        self.attn_out = Affine(d, d)
        self.mlp = Gated(d, config.d_mlp, d)
        self.film = Gated(d, d, 4 * d) if config.time_conditioning else None

    def forward(
        self,
        x: Float[Tensor, "batch pos d"],
        cond: Float[Tensor, "batch d"] | None,
        rotary: tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]],
        arithmetic: NativeArithmetic,
    ) -> Float[Tensor, "batch pos d"]:
        """resid_pre to resid_post."""
        at = self.at
        shift_attn, scale_attn, shift_mlp, scale_mlp = self._modulation(x, cond, arithmetic)
        x = at["hook_resid_pre"](x)
        h = _modulate(self.norm1.forward(x, at, "ln1"), shift_attn, scale_attn, arithmetic)
        h = self._attention(at["attn.hook_in"](h), rotary, arithmetic)
        x = at["hook_resid_mid"](x + at["hook_attn_out"](self._branch(h)))
        h = _modulate(self.norm2.forward(x, at, "ln2"), shift_mlp, scale_mlp, arithmetic)
        h = self._mlp(at["mlp.hook_in"](h), arithmetic)
        return at["hook_resid_post"](x + at["hook_mlp_out"](self._branch(h)))

    def _modulation(
        self, x: Tensor, cond: Tensor | None, arithmetic: NativeArithmetic
    ) -> tuple[Tensor | None, ...]:
        """Shift and scale of attention and of the MLP [batch 1 d]; None where the network has no time."""
        if self.film is None:
            return None, None, None, None
        if cond is None:
            film = x.new_zeros(x.shape[0], 1, 4 * x.shape[2])
        else:
            film = self.film.forward(cond, arithmetic)[:, None]
        parts = film.chunk(4, dim=-1)
        return tuple(self.at[name](part) for name, part in zip(FILM_HOOKS, parts, strict=True))

    def _attention(
        self, h: Float[Tensor, "batch pos d"], rotary: tuple[Tensor, Tensor], arithmetic: NativeArithmetic
    ) -> Float[Tensor, "batch pos d"]:
        at = self.at
        qkv = self.attn_qkv(h, arithmetic).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = (at[f"attn.hook_{name}"](qkv[:, :, i]) for i, name in enumerate("qkv"))
        q = at["attn.hook_rot_q"](rotate(q, *rotary, self.rope))
        k = at["attn.hook_rot_k"](rotate(k, *rotary, self.rope))
        z = hooked_attention(q, k, v, arithmetic, at)
        out: Tensor = self.attn_out(z.flatten(-2), arithmetic)
        return out

    def _mlp(
        self, h: Float[Tensor, "batch pos d"], arithmetic: NativeArithmetic
    ) -> Float[Tensor, "batch pos d"]:
        value, gate = self.mlp.first(h, arithmetic).chunk(2, dim=-1)
        gate = self.at["mlp.hook_pre"](gate)
        value = self.at["mlp.hook_pre_linear"](value)
        h = self.at["mlp.hook_post"](value * functional.silu(gate))
        out: Tensor = self.mlp.second(h, arithmetic)
        return out

    def _branch(self, h: Tensor) -> Tensor:
        """What a branch adds to the residual stream."""
        h = functional.dropout(h, self.dropout) if self.training and self.dropout else h
        return h if self.multiplier == 1.0 else h * self.multiplier


def _modulate(
    h: Tensor, shift: Tensor | None, scale: Tensor | None, arithmetic: NativeArithmetic
) -> Float[Tensor, "batch pos d"]:
    if shift is None or scale is None:
        return h
    return arithmetic.modulate(h, shift, scale)
