"""What the witness's operations are made of: the way in and out, and SPEC's building blocks on binary64.

Every operation is one of NumPy's `+ - * /`, one rounding and one array pass each, so that nothing can be fused;
`rint`, `ldexp`, `frexp` and the sums of integers are exact.

Source:
    oracle/SPEC.md, sections 1 and 2, and nothing else.
"""

# Axes: row, n (any length)

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError, MdlmError
from mdlm_interp.shapes import Float64

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


def require_same(operation: str, **sizes: tuple[int, ...]) -> None:
    """Raise DataError unless all are the same sizes: NumPy would stretch or cut what does not fit."""
    if len(set(sizes.values())) > 1:
        given = ", ".join(f"{name} {list(size)}" for name, size in sizes.items())
        raise DataError(
            f"{operation}: axes that belong together must have one size, got {given}; slice or expand"
        )


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
    check_entries(n)
    m = np.abs(v).max(-1, keepdims=True)
    exponent = np.frexp(m)[1]  # 2^(exponent-1) <= m < 2^exponent
    q = np.rint(np.ldexp(v, 40 - exponent)).astype(np.int64)
    total = q.sum(-1, keepdims=True).astype(np.float64)  # at most 2^60 as an integer, then rounded once
    scaled = total * (1.0 / n)
    return np.where(m == 0, 0.0, np.ldexp(scaled, exponent - 40))


def check_entries(n: int) -> None:
    """Raise DataError unless a row of so many values has an exact sum."""
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
