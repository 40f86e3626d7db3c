"""A second implementation of oracle/SPEC.md, operation by operation, written from that page alone.

Its purpose is to disagree: it shares no code with the engine of this package and takes no short cut.

1. Matrix products are sums of Python integers, rounded once by their bits (`witness_rounding`).
2. Cosine, sine, logarithm and roots are integers too, with as many bits as the rounding needs.
3. The remaining operations are NumPy's `+ - * /` on binary64, one rounding each and one array pass each, so
   that nothing can be fused; `rint`, `ldexp`, `frexp` and the sums of integers are exact.

Arguments and axes are those of `mdlm_interp.arithmetic`, as NumPy arrays of float32. The forward pass made
of these operations, fingerprints and sampling are in `witness_forward`.

Source:
    oracle/SPEC.md, sections 1 to 3.
"""

# Axes: batch, pos, d (any width), head, d_head, query, key, half (d_head / 2), vocab

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError, MdlmError
from mdlm_interp.shapes import Float32, Float64
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

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]

MAX_ENTRIES = 1 << 20
"""Largest length of a row whose sum is taken in steps of a fixed size."""

LOG2E = float.fromhex("0x1.71547652b82fep+0")
EXP_COEFFICIENTS = tuple(
    float.fromhex(text)
    for text in (
        "0x1.0000000000000p+0",
        "0x1.62e42fefa37d1p-1",
        "0x1.ebfbdff81be06p-3",
        "0x1.c6b08d70c880dp-5",
        "0x1.3b2ab72412178p-7",
        "0x1.5d87fd938895cp-10",
        "0x1.430897f348181p-13",
        "0x1.ffce2fc0b9a32p-17",
        "0x1.63e6964c004b3p-20",
        "0x1.b3de31389fe36p-24",
    )
)
"""C0 to C9."""
EPS = float.fromhex("0x1.4f8b588e368f1p-17")
GELU_A = float.fromhex("-0x1.2444f2a4d8b4bp-4")
GELU_B = float.fromhex("-0x1.9884533d43651p+0")
RSQRT_MAGIC = 0x5FE6EB50C7B537A9

# In and out


def widen(x: F32) -> F64:
    """The same values in binary64.

    Raises:
        DataError: If a value is not finite, or the type is not float32.
        MdlmError: If this thread flushes subnormal numbers to zero.
    """
    if x.dtype != np.float32:
        raise DataError(f"the exact operations take float32, got {x.dtype}; convert it where you decide to")
    tiny = np.full(1, 2.0**-149).astype(np.float32)
    if tiny.view(np.int32)[0] != 1 or tiny.astype(np.float64)[0] != 2.0**-149:
        raise MdlmError("this thread flushes subnormal numbers to zero; was torch.set_flush_denormal called?")
    wide = x.astype(np.float64)
    if not np.isfinite(wide).all():
        raise DataError("the exact operations take finite numbers, got an infinity or NaN; look further up")
    return wide


def rounded(values: F64) -> F32:
    """SPEC's R of binary64 values."""
    with np.errstate(over="ignore", under="ignore"):
        result = values.astype(np.float32)
    if not np.isfinite(result).all():
        raise DataError(
            f"a result of magnitude {np.abs(values).max():.3e} is no float32; "
            f"are the weights or an edited activation out of range?"
        )
    return np.where(result == 0, np.float32(0), result)


# Building blocks (section 2)


def exp(x: Float64[F64, "*shape"]) -> Float64[F64, "*shape"]:
    """SPEC's EXP; at an infinity it is what it is at the largest number of that sign."""
    x = np.minimum(np.maximum(x, -708.0), 709.0)
    t = x * LOG2E
    k = np.rint(t)
    f = t - k
    p = np.full_like(f, EXP_COEFFICIENTS[9])
    for coefficient in reversed(EXP_COEFFICIENTS[:9]):
        p = p * f
        p = p + coefficient
    return np.asarray(np.ldexp(p, k.astype(np.int32)))


def mean(v: Float64[F64, "*rows n"]) -> Float64[F64, "*rows 1"]:
    """SPEC's MEAN of each row."""
    n = v.shape[-1]
    _check_entries(n)
    m = np.abs(v).max(-1, keepdims=True)
    exponent = np.frexp(m)[1]  # 2^(exponent-1) <= m < 2^exponent
    q = np.rint(np.ldexp(v, 40 - exponent)).astype(np.int64)
    total = q.sum(-1, keepdims=True).astype(np.float64)  # at most 2^60 as an integer, then rounded once
    scaled = total * (1.0 / n)
    return np.where(m == 0, 0.0, np.ldexp(scaled, exponent - 40))


def _check_entries(n: int) -> None:
    if not 1 <= n <= MAX_ENTRIES:
        raise DataError(f"a row must have 1 to {MAX_ENTRIES} entries, got {n}")


def rsqrt(v: Float64[F64, "*shape"]) -> Float64[F64, "*shape"]:
    """SPEC's RSQRT."""
    y = (RSQRT_MAGIC - (v.view(np.int64) >> 1)).view(np.float64)
    h = 0.5 * v
    for _ in range(5):
        square = y * y
        product = h * square
        y = y * (1.5 - product)
    return np.asarray(y)


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
    offsets = None if bias is None else [dyadic(value) for value in widen(bias).tolist()]
    rows = _products(x.reshape(-1, x.shape[-1]), weight, offsets=offsets)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def attention_scores(
    q: Float32[F32, "batch query head d_head"], k: Float32[F32, "batch key head d_head"]
) -> Float32[F32, "batch head query key"]:
    """The binary64 nearest to 1 / sqrt(d_head), times the exact q · k, rounded once."""
    batch, n_queries, n_heads, d_head = q.shape
    factor = dyadic(reciprocal_sqrt(d_head))
    out = np.empty((batch, n_heads, n_queries, k.shape[1]), dtype=np.float32)
    for b, h in np.ndindex(batch, n_heads):
        out[b, h] = _products(q[b, :, h], k[b, :, h], factor)
    return out


def mix(
    pattern: Float32[F32, "batch head query key"], v: Float32[F32, "batch key head d_head"]
) -> Float32[F32, "batch query head d_head"]:
    """Values weighted by an attention pattern: exact, then rounded once."""
    batch, n_heads, n_queries, _ = pattern.shape
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
    _check_entries(s.shape[-1])
    e = exp(s - s.max(-1, keepdims=True))
    q = np.rint(np.ldexp(e, 42)).astype(np.int64)
    total = q.sum(-1, keepdims=True).astype(np.float64)  # at most 2^62 as an integer, then rounded once
    r = 1.0 / np.ldexp(total, -42)
    return rounded(e * r)


def layer_norm(
    x: Float32[F32, "*rows d"], weight: Float32[F32, " d"], scale: Float32[F32, "*rows 1"] | None = None
) -> tuple[Float32[F32, "*rows d"], Float32[F32, "*rows 1"]]:
    """The normalised rows, and the scale used: the one given, or 1 / sqrt(variance + EPS) in binary32."""
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
