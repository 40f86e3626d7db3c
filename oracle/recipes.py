"""The constants of SPEC.md, as it prints them."""

from __future__ import annotations

SPEC_VERSION = 1

RINT = 1.5 * 2.0**52
"""Adding and subtracting this rounds a float64 below 2^51 to an integer, ties to even."""

LOG2E = float.fromhex("0x1.71547652b82fep+0")
EXP_MIN, EXP_MAX = -708.0, 709.0
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
"""Minimax fit of 2^f for -1/2 <= f <= 1/2 with constant term 1, lowest degree first."""

GELU_CUBE = float.fromhex("-0x1.2444f2a4d8b4bp-4")
"""-2 sqrt(2 / pi) 0.044715."""
GELU_LINE = float.fromhex("-0x1.9884533d43651p+0")
"""-2 sqrt(2 / pi)."""

SOFTMAX_BITS = 42
"""A softmax's numerators are counted in units of 2^-42 when they are summed."""

MEAN_BITS = 40
"""A mean's terms are counted in units of 2^-40 of the power of two above the largest."""

EPS = float.fromhex("0x1.4f8b588e368f1p-17")
"""LayerNorm's 1e-5."""

RSQRT_SEED = 0x5FE6EB50C7B537A9
NEWTON_STEPS = 5

MAX_SUM_TERMS = 1 << 20
"""Terms of a mean or entries of a softmax row: their exact sums then stay below 2^63."""
