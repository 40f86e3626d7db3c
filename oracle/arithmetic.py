"""The network's operations (`mdlm_interp.arithmetic.Arithmetic`) with the meaning that SPEC.md gives them."""

# Axes: batch, pos, d (any width), head, d_head, query, key, half (d_head / 2)

from __future__ import annotations

from torch import Tensor

from mdlm_interp.shapes import Float32
from oracle import ops
from oracle.weights import DEFAULT_BUDGET_BYTES, WeightCache


class ExactArithmetic:
    """Every result is defined to the bit, whatever the machine, its threads or the batch.

    Float32 only and forward only: under torch.no_grad(), on CPU or CUDA.

    Args:
        cache_bytes: Budget for float64 copies of weights, which short inputs gain from; 0 keeps none.
    """

    def __init__(self, cache_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self.cache = WeightCache(cache_bytes)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Float32[Tensor, "*rows d_out"]:
        """See `ops.linear`."""
        return ops.linear(x, weight, bias, cache=self.cache)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See `ops.add`."""
        return ops.add(a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """See `ops.mul`."""
        return ops.mul(a, b)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """See `ops.modulate`."""
        return ops.modulate(x, shift, scale)

    def layer_norm(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None
    ) -> tuple[Float32[Tensor, "batch pos d"], Float32[Tensor, "batch pos 1"]]:
        """See `ops.layer_norm`."""
        return ops.layer_norm(x, weight, scale)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """See `ops.gelu_tanh`."""
        return ops.gelu_tanh(x)

    def silu(self, x: Tensor) -> Tensor:
        """See `ops.silu`."""
        return ops.silu(x)

    def attention_scores(self, q: Tensor, k: Tensor) -> Float32[Tensor, "batch head query key"]:
        """See `ops.attention_scores`."""
        return ops.attention_scores(q, k)

    def softmax(self, scores: Tensor) -> Tensor:
        """See `ops.softmax`."""
        return ops.softmax(scores)

    def mix(self, pattern: Tensor, v: Tensor) -> Float32[Tensor, "batch query head d_head"]:
        """See `ops.mix`."""
        return ops.mix(pattern, v)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Float32[Tensor, "batch query head d_head"]:
        """See `ops.attention`."""
        return ops.attention(q, k, v)

    def rotary_tables(
        self, inv_freq: Tensor, n_positions: int
    ) -> tuple[Float32[Tensor, "pos half"], Float32[Tensor, "pos half"]]:
        """See `ops.rotary_tables`."""
        return ops.rotary_tables(inv_freq, n_positions)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Float32[Tensor, "batch pos head d_head"]:
        """See `ops.rotate`."""
        return ops.rotate(x, cos, sin)

    def time_features(self, sigma: Tensor, width: int) -> Float32[Tensor, "batch width"]:
        """See `ops.time_features`."""
        return ops.time_features(sigma, width)
