"""Every numerical operation of the network, behind one object.

The model is written once (`layers.py`, `model.py`); what a product or a softmax *means* is decided by
the `Arithmetic` it is given. `NativeArithmetic` is torch's own kernels in any dtype. The oracle package
hands in another one whose results are defined to the bit.
"""

# Axes: batch, pos, d (any width), head, d_head, query, key, half (d_head / 2)

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from mdlm_interp.config import LAYER_NORM_EPS
from mdlm_interp.shapes import Float, Shaped


@runtime_checkable
class Arithmetic(Protocol):
    """The operations a forward pass is made of. Tensors passed in are never modified."""

    def linear(
        self, x: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """x times weight transposed, plus bias, as one operation."""
        ...

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Element-wise sum, broadcasting."""
        ...

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Element-wise product, broadcasting."""
        ...

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """adaLN: x times (1 + scale), plus shift."""
        ...

    def layer_norm(
        self,
        x: Float[Tensor, "batch pos d"],
        weight: Float[Tensor, " d"],
        scale: Float[Tensor, "batch pos 1"] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos 1"]]:
        """(x - mean) * scale * weight, and the scale used: 1 / sqrt(biased variance + 1e-5) unless given."""
        ...

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """GELU in its tanh form."""
        ...

    def silu(self, x: Tensor) -> Tensor:
        """x times the logistic function of x."""
        ...

    def attention_scores(
        self, q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """q . k / sqrt(d_head)."""
        ...

    def softmax(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
        """Over the last axis; rows sum to 1."""
        ...

    def mix(
        self, pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key head d_head"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """Values weighted by an attention pattern."""
        ...

    def attention(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key head d_head"],
        v: Float[Tensor, "batch key head d_head"],
    ) -> Float[Tensor, "batch query head d_head"]:
        """mix(softmax(attention_scores(q, k)), v) for when nobody looks inside."""
        ...

    def rotary_tables(
        self, inv_freq: Float[Tensor, " half"], n_positions: int
    ) -> tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]]:
        """cos and sin of position times inverse frequency."""
        ...

    def rotate(
        self,
        x: Float[Tensor, "batch pos head d_head"],
        cos: Float[Tensor, "pos half"],
        sin: Float[Tensor, "pos half"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Rotary embedding in the split-half convention."""
        ...

    def time_features(self, sigma: Shaped[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
        """Sinusoid of the noise level sigma: width / 2 cosines, then as many sines."""
        ...


class NativeArithmetic:
    """torch's own kernels, in the dtype of the weights; bits depend on the machine, threads and batch.

    Args:
        fused_attention: Use torch's fused kernel when nobody looks at scores or pattern. Training on CPU
            does without: the fused kernel's bfloat16 backward pass takes a third of a step.
    """

    def __init__(self, fused_attention: bool = True) -> None:
        self.fused_attention = fused_attention

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Arithmetic.linear`."""
        return functional.linear(x, weight, bias)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Arithmetic.add`."""
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Arithmetic.mul`."""
        return a * b

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """See `Arithmetic.modulate`."""
        return x * (1 + scale) + shift

    def layer_norm(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos 1"]]:
        """See `Arithmetic.layer_norm`. The scale comes from the same kernel, so reading it changes no bit."""
        if scale is not None:
            return (x - x.mean(-1, keepdim=True)) * scale * weight, scale
        normalized, _, computed = torch.native_layer_norm(x, [x.shape[-1]], weight, None, LAYER_NORM_EPS)
        return normalized, computed.to(x.dtype)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """See `Arithmetic.gelu_tanh`."""
        return functional.gelu(x, approximate="tanh")

    def silu(self, x: Tensor) -> Tensor:
        """See `Arithmetic.silu`."""
        return functional.silu(x)

    def attention_scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        """See `Arithmetic.attention_scores`."""
        return torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) * (1.0 / math.sqrt(q.shape[-1]))

    def softmax(self, scores: Tensor) -> Tensor:
        """See `Arithmetic.softmax`."""
        return scores.softmax(-1)

    def mix(self, pattern: Tensor, v: Tensor) -> Float[Tensor, "batch query head d_head"]:
        """See `Arithmetic.mix`."""
        return torch.matmul(pattern, v.transpose(1, 2)).transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch query head d_head"]:
        """See `Arithmetic.attention`; within 1e-5 of the explicit path in float32 (tested)."""
        if not self.fused_attention:
            return self.mix(self.softmax(self.attention_scores(q, k)), v)
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return mixed.transpose(1, 2)

    def rotary_tables(
        self, inv_freq: Tensor, n_positions: int
    ) -> tuple[Float[Tensor, "pos half"], Float[Tensor, "pos half"]]:
        """See `Arithmetic.rotary_tables`. Never cached: upstream's cache went stale when a model moved."""
        positions = torch.arange(n_positions, device=inv_freq.device, dtype=inv_freq.dtype)
        angles = positions[:, None] * inv_freq
        return angles.cos(), angles.sin()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        """Pair dimension j with j + d_head / 2, as flash-attn does with interleaved=False.

        The interleaved convention pairs 2j with 2j + 1; a checkpoint trained with one is nonsense under
        the other. flash-attn's own definition is x * cos + rotate_half(x) * sin with doubled tables:

        >>> x = torch.arange(1.0, 9.0).reshape(1, 2, 1, 4)
        >>> arithmetic = NativeArithmetic()
        >>> cos, sin = arithmetic.rotary_tables(torch.tensor([1.0, 0.01]), 2)
        >>> def flash(x, cos, sin, interleaved):
        ...     if interleaved:
        ...         half_turn = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        ...         cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        ...     else:
        ...         first, second = x.chunk(2, dim=-1)
        ...         half_turn = torch.cat((-second, first), dim=-1)
        ...         cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        ...     return x * cos[:, None] + half_turn * sin[:, None]
        >>> torch.equal(arithmetic.rotate(x, cos, sin), flash(x, cos, sin, interleaved=False))
        True
        >>> torch.equal(arithmetic.rotate(x, cos, sin), flash(x, cos, sin, interleaved=True))
        False
        >>> swap = torch.tensor([0, 2, 1, 3])  # the two conventions differ by this permutation of dimensions
        >>> torch.equal(
        ...     arithmetic.rotate(x[..., swap], cos, sin), flash(x, cos, sin, interleaved=True)[..., swap]
        ... )
        True

        Source:
            Dao-AILab/flash-attention, flash_attn/layers/rotary.py, apply_rotary_emb_torch.
        """
        first, second = x.chunk(2, dim=-1)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

    def time_features(self, sigma: Tensor, width: int) -> Float[Tensor, "batch width"]:
        """See `Arithmetic.time_features`. Frequencies divide by half the width; cosines first."""
        half = width // 2
        steps = torch.arange(half, device=sigma.device, dtype=sigma.dtype)
        angles = sigma[:, None] * torch.exp(-math.log(10_000.0) * steps / half)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)
