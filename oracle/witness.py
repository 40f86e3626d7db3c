"""A second implementation of oracle/SPEC.md, operation by operation, written from that page alone.

Its purpose is to disagree: it shares no code with the engine of this package and takes no short cut.

1. Matrix products are sums of Python integers, rounded once by their bits (`witness_rounding`).
2. Cosine, sine, logarithm and roots are integers too, with as many bits as the rounding needs.
3. The remaining operations are NumPy's `+ - * /` on binary64, one at a time (`witness_blocks`).

Arguments and axes are those of `mdlm_interp.arithmetic`, as NumPy arrays of float32. The forward pass made
of these operations and its fingerprint are in `witness_forward`, sampling is in `witness_sampling`.

Source:
    oracle/SPEC.md, sections 1 to 3.
"""

# Axes: batch, pos, d (any width), head, d_head, query, key, half (d_head / 2), vocab

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float32
from oracle.witness_blocks import EPS, F32, check_entries, exp, mean, require_same, rounded, rsqrt, widen
from oracle.witness_rounding import (
    Dyadic,
    cos_sin32,
    dyadic,
    nearest32,
    plus,
    reciprocal_sqrt,
    time_frequencies,
    times,
)

GELU_A = float.fromhex("-0x1.2444f2a4d8b4bp-4")
GELU_B = float.fromhex("-0x1.9884533d43651p+0")

# Matrix products (section 3)


def _integers(rows: Float32[F32, "n d"]) -> tuple[NDArray[np.object_], list[int]]:
    """Each row as Python integers times one power of two, with that power's exponent."""
    wide = widen(rows)
    # A binary32 below 2^top is a multiple of 2^(top - 24); the scaled values reach 2^302 at most, exactly.
    tops = np.where(wide == 0, 200, np.frexp(wide)[1])
    exponents = tops.min(-1) - 24
    scaled = np.ldexp(wide, -exponents[:, None])
    whole = np.empty(rows.shape, dtype=object)
    whole[...] = [[int(value) for value in row] for row in scaled.tolist()]
    return whole, [int(exponent) for exponent in exponents]


def _products(
    a: Float32[F32, "n d"],
    b: Float32[F32, "m d"],
    factor: Dyadic = (1, 0),
    offsets: list[Dyadic] | None = None,
) -> Float32[F32, "n m"]:
    """R(factor · Σ_k a_ik·b_jk + offset_j)."""
    a_whole, a_exponents = _integers(a)
    b_whole, b_exponents = _integers(b)
    sums = a_whole @ b_whole.T
    out = np.empty(sums.shape, dtype=np.float32)
    for i, j in np.ndindex(*sums.shape):
        exact = times(factor, (sums[i, j], a_exponents[i] + b_exponents[j]))
        if offsets is not None:
            exact = plus(exact, offsets[j])
        out[i, j] = nearest32(exact)
    return out


def linear(
    x: Float32[F32, "*rows d_in"], weight: Float32[F32, "d_out d_in"], bias: F32 | None = None
) -> Float32[F32, "*rows d_out"]:
    """x times weight transposed, plus bias: exact, then rounded once."""
    require_same("linear", x=x.shape[-1:], weight=weight.shape[1:])
    require_same("linear", weight=weight.shape[:1], bias=weight.shape[:1] if bias is None else bias.shape)
    offsets = None if bias is None else [dyadic(value) for value in widen(bias).tolist()]
    rows = _products(x.reshape(-1, x.shape[-1]), weight, offsets=offsets)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def attention_scores(
    q: Float32[F32, "batch query head d_head"], k: Float32[F32, "batch key head d_head"]
) -> Float32[F32, "batch head query key"]:
    """The binary64 nearest to 1 / sqrt(d_head), times the exact q · k, rounded once."""
    batch, n_queries, n_heads, d_head = q.shape
    require_same("attention_scores", q=(batch, n_heads, d_head), k=(k.shape[0], *k.shape[2:]))
    factor = dyadic(reciprocal_sqrt(d_head))
    out = np.empty((batch, n_heads, n_queries, k.shape[1]), dtype=np.float32)
    for b, h in np.ndindex(batch, n_heads):
        out[b, h] = _products(q[b, :, h], k[b, :, h], factor)
    return out


def mix(
    pattern: Float32[F32, "batch head query key"], v: Float32[F32, "batch key head d_head"]
) -> Float32[F32, "batch query head d_head"]:
    """Values weighted by an attention pattern: exact, then rounded once."""
    batch, n_heads, n_queries, n_keys = pattern.shape
    require_same("mix", pattern=(batch, n_keys, n_heads), v=v.shape[:3])
    out = np.empty((batch, n_queries, n_heads, v.shape[-1]), dtype=np.float32)
    for b, h in np.ndindex(batch, n_heads):
        out[b, :, h] = _products(pattern[b, h], v[b, :, h].T)
    return out


def attention(
    q: Float32[F32, "batch query head d_head"],
    k: Float32[F32, "batch key head d_head"],
    v: Float32[F32, "batch key head d_head"],
) -> Float32[F32, "batch query head d_head"]:
    """mix(softmax(attention_scores(q, k)), v)."""
    return mix(softmax(attention_scores(q, k)), v)


# Rows and single elements (section 3)


def softmax(scores: Float32[F32, "*rows n"]) -> Float32[F32, "*rows n"]:
    """Over the last axis."""
    s = widen(scores)
    check_entries(s.shape[-1])
    e = exp(s - s.max(-1, keepdims=True))
    q = np.rint(np.ldexp(e, 42)).astype(np.int64)
    total = q.sum(-1, keepdims=True).astype(np.float64)  # at most 2^62 as an integer, then rounded once
    r = 1.0 / np.ldexp(total, -42)
    return rounded(e * r)


def layer_norm(
    x: Float32[F32, "*rows d"], weight: Float32[F32, " d"], scale: Float32[F32, "*rows 1"] | None = None
) -> tuple[Float32[F32, "*rows d"], Float32[F32, "*rows 1"]]:
    """The normalised rows, and the scale used: the one given, or 1 / sqrt(variance + EPS) in binary32."""
    require_same("layer_norm", x=x.shape[-1:], weight=weight.shape)
    if scale is not None:
        require_same("layer_norm", x=(*x.shape[:-1], 1), scale=scale.shape)
    wide = widen(x)
    deviation = wide - mean(wide)
    if scale is None:
        variance = mean(deviation * deviation)
        scale = rounded(rsqrt(variance + EPS))
    scaled = deviation * widen(scale)
    return rounded(scaled * widen(weight)), scale


def gelu_tanh(x: Float32[F32, "*shape"]) -> Float32[F32, "*shape"]:
    """GELU in its tanh form."""
    wide = widen(x)
    square = wide * wide
    inner = square * GELU_A
    inner = inner + GELU_B
    a = wide * inner
    return rounded(wide / (1.0 + exp(a)))


def silu(x: Float32[F32, "*shape"]) -> Float32[F32, "*shape"]:
    """x times the logistic function of x."""
    wide = widen(x)
    return rounded(wide / (1.0 + exp(-wide)))


def add(a: F32, b: F32) -> F32:
    """Element-wise sum, broadcasting.

    Rounding to binary64 first is harmless for one sum or product of two binary32: 53 >= 2 · 24 + 2 bits, a
    subnormal sum is exact, and a product is exact in binary64.
    """
    return rounded(widen(a) + widen(b))


def mul(a: F32, b: F32) -> F32:
    """Element-wise product, broadcasting."""
    return rounded(widen(a) * widen(b))


def modulate(x: F32, shift: F32, scale: F32) -> F32:
    """x times (1 + scale), plus shift, rounded after each step."""
    product = widen(x) * (1.0 + widen(scale))
    return rounded(product + widen(shift))


def rotary_tables(
    inv_freq: Float32[F32, " half"], n_positions: int
) -> tuple[Float32[F32, "pos half"], Float32[F32, "pos half"]]:
    """Correctly rounded cosine and sine of position times inverse frequency."""
    frequencies = [dyadic(value) for value in widen(inv_freq).tolist()]
    pairs = [[cos_sin32(times((p, 0), f)) for f in frequencies] for p in range(n_positions)]
    table = np.array(pairs, dtype=np.float32).reshape(n_positions, len(frequencies), 2)
    return table[..., 0], table[..., 1]


def rotate(
    x: Float32[F32, "*batch pos head d_head"], cos: Float32[F32, "pos half"], sin: Float32[F32, "pos half"]
) -> Float32[F32, "*batch pos head d_head"]:
    """Rotary embedding in the split-half convention."""
    half = x.shape[-1] // 2
    require_same("rotate", x=(x.shape[-3], x.shape[-1]), cos=(cos.shape[0], 2 * cos.shape[1]))
    require_same("rotate", cos=cos.shape, sin=sin.shape)
    a, b = widen(x[..., :half]), widen(x[..., half:])
    c, s = widen(cos)[:, None], widen(sin)[:, None]
    return np.concatenate([rounded(a * c - b * s), rounded(a * s + b * c)], axis=-1)


def time_features(sigma: Float32[F32, " batch"], width: int) -> Float32[F32, "batch width"]:
    """Correctly rounded cosines, then sines, of sigma times the frequencies."""
    if width < 2 or width % 2:
        raise DataError(f"the time features' width must be even and at least 2, got {width}")
    frequencies = [dyadic(value) for value in time_frequencies(width // 2)]
    pairs = [[cos_sin32(times(dyadic(s), f)) for f in frequencies] for s in widen(sigma).tolist()]
    table = np.array(pairs, dtype=np.float32).reshape(len(pairs), len(frequencies), 2)
    return np.concatenate([table[..., 0], table[..., 1]], axis=-1)
