"""The network's layers: parameters under upstream's names, every intermediate through a hook point.

Modules here only hold parameters; all numbers come from the `Arithmetic` passed to `forward`.

Source:
    kuleshov-group/mdlm, models/dit.py at commit c112c526 (DDiTBlock, DDitFinalLayer, TimestepEmbedder).
"""

# Axes: batch, pos, d (hidden_dim), c (cond_dim), head, d_head, half (d_head / 2)

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdlm_interp.arithmetic import Arithmetic
from mdlm_interp.config import LAYER_NORM_EPS, ROTARY_BASE, TIME_FEATURES, MDLMConfig
from mdlm_interp.hooks import HookPoint
from mdlm_interp.shapes import Float, Int64

BLOCK_HOOKS = (
    *(f"adaln.hook_{part}_{branch}" for branch in ("attn", "mlp") for part in ("shift", "scale", "gate")),
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
    "attn.hook_out",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "mlp.hook_out",
    "hook_mlp_out",
    "hook_resid_post",
)
HEAD_HOOKS = (
    "adaln_final.hook_shift",
    "adaln_final.hook_scale",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "hook_final_in",
    "hook_logits",
)


class Affine(nn.Module):
    """Weight [out, in] and optional bias of a linear map, left uninitialised until loaded or drawn."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Float[Tensor, "*rows d_in"], arithmetic: Arithmetic) -> Float[Tensor, "*rows d_out"]:
        """x times weight transposed, plus bias."""
        return arithmetic.linear(x, self.weight, self.bias)


class TwoAffines(nn.Module):
    """Two linear maps named 0 and 2, as they are upstream around an activation without state."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.add_module("0", Affine(d_in, d_hidden))
        self.add_module("2", Affine(d_hidden, d_out))

    @property
    def first(self) -> Affine:
        """The map before the activation."""
        return cast(Affine, self._modules["0"])

    @property
    def second(self) -> Affine:
        """The map after the activation."""
        return cast(Affine, self._modules["2"])


class Norm(nn.Module):
    """The weight of a LayerNorm without bias."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))


class Embedding(nn.Module):
    """The token embedding; upstream names the parameter `embedding`, not `weight`."""

    def __init__(self, vocab_size: int, d: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, d))

    def forward(self, input_ids: Int64[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d"]:
        """Rows of the table; no scaling, no positions."""
        return functional.embedding(input_ids, self.embedding)


def inverse_frequencies(
    d_head: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " half"]:
    """Radians a position by which each pair of a head's dimensions is turned."""
    exponents = torch.arange(0, d_head, 2, device=device, dtype=dtype) / d_head
    return 1.0 / (ROTARY_BASE**exponents)


class Rotary(nn.Module):
    """The inverse frequencies, which the published checkpoint stores as a buffer."""

    inv_freq: Tensor

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(d_head))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # A half-precision copy of the frequencies would misplace tokens; they stay float32 at least.
        kept = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype in (torch.float16, torch.bfloat16):
            self.inv_freq = kept.to(self.inv_freq.device)
        return self


class SigmaMap(nn.Module):
    """The noise level sigma to the conditioning vector."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = TwoAffines(TIME_FEATURES, cond_dim, cond_dim)

    def forward(self, sigma: Float[Tensor, " batch"], arithmetic: Arithmetic) -> Float[Tensor, "batch c"]:
        """SiLU(W2 SiLU(W0 features)): the second SiLU stands outside sigma_map upstream."""
        # The sinusoid needs float32 at least; the projections are in the weights' dtype, which may be half.
        features = arithmetic.time_features(sigma, TIME_FEATURES).to(self.mlp.first.weight.dtype)
        hidden = arithmetic.silu(self.mlp.first.forward(features, arithmetic))
        return arithmetic.silu(self.mlp.second.forward(hidden, arithmetic))


def hooked_layer_norm(
    x: Float[Tensor, "batch pos d"],
    norm: Norm,
    arithmetic: Arithmetic,
    at: Mapping[str, HookPoint],
    name: str,
) -> Float[Tensor, "batch pos d"]:
    """LayerNorm whose scale can be read or replaced; replacing it recomputes the output with that scale."""
    normalized, scale = arithmetic.layer_norm(x, norm.weight)
    point = at[f"{name}.hook_scale"]
    if point.listeners:
        scale, edited = point.run(_with_gradient(scale, x) if x.requires_grad else scale)
        if edited:
            normalized, _ = arithmetic.layer_norm(x, norm.weight, scale)
    return at[f"{name}.hook_normalized"](normalized)


def _with_gradient(
    scale: Float[Tensor, "batch pos 1"], x: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "batch pos 1"]:
    """The same bits, with the gradient that a fused kernel leaves out: that of 1 / sqrt(variance + eps)."""
    same = (x.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    return scale.detach() + (same - same.detach())


def hooked_attention(
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos head d_head"],
    v: Float[Tensor, "batch pos head d_head"],
    arithmetic: Arithmetic,
    at: Mapping[str, HookPoint],
) -> Float[Tensor, "batch pos head d_head"]:
    """Attention as one operation, or step by step if somebody listens to its scores or pattern."""
    if at["attn.hook_attn_scores"].listeners or at["attn.hook_pattern"].listeners:
        scores = at["attn.hook_attn_scores"](arithmetic.attention_scores(q, k))
        z = arithmetic.mix(at["attn.hook_pattern"](arithmetic.softmax(scores)), v)
    else:
        z = arithmetic.attention(q, k, v)
    return at["attn.hook_z"](z)


class Block(nn.Module):
    """One transformer block with adaLN modulation and gates."""

    def __init__(self, config: MDLMConfig, points: Mapping[str, HookPoint]) -> None:
        super().__init__()
        d = config.hidden_dim
        self.at = points
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.norm1 = Norm(d)
        self.attn_qkv = Affine(d, 3 * d, bias=False)
        self.attn_out = Affine(d, d, bias=False)
        self.norm2 = Norm(d)
        self.mlp = TwoAffines(d, config.d_mlp, d)
        self.adaLN_modulation = Affine(config.cond_dim, 6 * d)

    def forward(
        self,
        x: Float[Tensor, "batch pos d"],
        cond: Float[Tensor, "batch c"],
        rotary: tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]],
        arithmetic: Arithmetic,
    ) -> Float[Tensor, "batch pos d"]:
        """resid_pre to resid_post."""
        at = self.at
        parts = self.adaLN_modulation(cond, arithmetic)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn = (
            at[f"adaln.hook_{name}_attn"](part)
            for name, part in zip(("shift", "scale", "gate"), parts[:3], strict=True)
        )
        shift_mlp, scale_mlp, gate_mlp = (
            at[f"adaln.hook_{name}_mlp"](part)
            for name, part in zip(("shift", "scale", "gate"), parts[3:], strict=True)
        )
        x = at["hook_resid_pre"](x)
        h = hooked_layer_norm(x, self.norm1, arithmetic, at, "ln1")
        h = at["attn.hook_in"](arithmetic.modulate(h, shift_attn, scale_attn))
        h = at["attn.hook_out"](self._attention(h, rotary, arithmetic))
        x = arithmetic.add(x, at["hook_attn_out"](arithmetic.mul(gate_attn, self._drop(h))))
        x = at["hook_resid_mid"](x)
        h = hooked_layer_norm(x, self.norm2, arithmetic, at, "ln2")
        h = at["mlp.hook_in"](arithmetic.modulate(h, shift_mlp, scale_mlp))
        h = at["mlp.hook_out"](self._mlp(h, arithmetic))
        x = arithmetic.add(x, at["hook_mlp_out"](arithmetic.mul(gate_mlp, self._drop(h))))
        return at["hook_resid_post"](x)

    def _attention(
        self, h: Float[Tensor, "batch pos d"], rotary: tuple[Tensor, Tensor], arithmetic: Arithmetic
    ) -> Float[Tensor, "batch pos d"]:
        at = self.at
        # The last axis is laid out (three, head, d_head); (head, three, d_head) is a common mistake.
        qkv = self.attn_qkv(h, arithmetic).unflatten(-1, (3, self.n_heads, -1))
        q = at["attn.hook_q"](qkv[:, :, 0])
        k = at["attn.hook_k"](qkv[:, :, 1])
        v = at["attn.hook_v"](qkv[:, :, 2])
        q = at["attn.hook_rot_q"](arithmetic.rotate(q, *rotary))
        k = at["attn.hook_rot_k"](arithmetic.rotate(k, *rotary))
        z = hooked_attention(q, k, v, arithmetic, at)
        return self.attn_out.forward(z.flatten(-2), arithmetic)

    def _mlp(self, h: Float[Tensor, "batch pos d"], arithmetic: Arithmetic) -> Float[Tensor, "batch pos d"]:
        h = self.at["mlp.hook_pre"](self.mlp.first.forward(h, arithmetic))
        h = self.at["mlp.hook_post"](arithmetic.gelu_tanh(h))
        return self.mlp.second.forward(h, arithmetic)

    def _drop(self, h: Tensor) -> Tensor:
        return functional.dropout(h, self.dropout) if self.training and self.dropout else h


class OutputLayer(nn.Module):
    """Final norm, modulation without gate, and the untied output projection."""

    def __init__(self, config: MDLMConfig, points: Mapping[str, HookPoint]) -> None:
        super().__init__()
        self.at = points
        self.norm_final = Norm(config.hidden_dim)
        self.linear = Affine(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = Affine(config.cond_dim, 2 * config.hidden_dim)

    def forward(
        self, x: Float[Tensor, "batch pos d"], cond: Float[Tensor, "batch c"], arithmetic: Arithmetic
    ) -> Float[Tensor, "batch pos vocab"]:
        """Raw logits: SUBS is not part of the model, and the mask token has a column like any other."""
        at = self.at
        shift, scale = self.adaLN_modulation(cond, arithmetic)[:, None].chunk(2, dim=-1)
        shift, scale = at["adaln_final.hook_shift"](shift), at["adaln_final.hook_scale"](scale)
        h = hooked_layer_norm(x, self.norm_final, arithmetic, at, "ln_final")
        h = at["hook_final_in"](arithmetic.modulate(h, shift, scale))
        return at["hook_logits"](self.linear(h, arithmetic))
