"""Correct rounding by Fraction, and inputs that make it hard. Shared by the tests of this directory."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def nearest_float32(value: Fraction) -> float:
    """The binary32 nearest to a rational number, ties to even, by bisection over bit patterns; zero is +0."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    low, high = 0, 0x7F7FFFFF
    while low < high:  # the largest pattern not above the magnitude
        middle = (low + high + 1) // 2
        low, high = (middle, high) if from_pattern(middle) <= magnitude else (low, middle - 1)
    below, above = from_pattern(low), from_pattern(low + 1) if low < 0x7F7FFFFF else Fraction(2) ** 128
    up = magnitude - below > above - magnitude or (magnitude - below == above - magnitude and low & 1)
    found = float(above if up else below)
    return (-found if value < 0 else found) + 0.0


def from_pattern(bits: int) -> Fraction:
    """The number that a float32's bits stand for."""
    return Fraction(struct.unpack("<f", struct.pack("<I", bits))[0])


def dot(a: Tensor, b: Tensor, bias: float = 0.0, factor: float = 1.0) -> float:
    """factor * (sum of a * b + bias), rounded once."""
    total = sum(
        (Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)), Fraction(bias)
    )
    return nearest_float32(Fraction(factor) * total)


def products(a: Tensor, b: Tensor, bias: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """a @ b.T + bias, every element rounded once."""
    biases = [0.0] * b.shape[0] if bias is None else bias.tolist()
    return torch.tensor(
        [[dot(row, column, c, factor) for column, c in zip(b, biases, strict=True)] for row in a]
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and all bits agree, the sign of zero included."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.int32), b.contiguous().view(torch.int32)
    )


def draw(seed: int, shape: tuple[int, ...], low: int = 0, high: int = 0) -> Tensor:
    """Normal draws times powers of two from 2^low to 2^high, as float32."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape) * 2.0 ** generator.integers(low, high + 1, shape)
    return torch.from_numpy(values.astype(np.float32))


def integers(seed: int, shape: tuple[int, ...], bits: int) -> Tensor:
    """Integers of up to so many bits."""
    return torch.from_numpy(
        np.random.default_rng(seed).integers(-(2**bits), 2**bits + 1, shape).astype(np.float32)
    )


def hard_rows(kind: str, seed: int, rows: int, cols: int, terms: int) -> tuple[Tensor, Tensor]:
    """Row vectors a [rows, terms] and b [cols, terms] whose dot products are hard to round."""
    a, b = draw(seed, (rows, terms)), draw(seed + 1, (cols, terms))
    if kind == "wide":
        return draw(seed, (rows, terms), -60, 60), draw(seed + 1, (cols, terms), -60, 60)
    if kind == "extreme":
        return draw(seed, (rows, terms), -120, 2), draw(seed + 1, (cols, terms), -20, 120)
    if kind == "outliers":
        a[:, ::7] *= 3000.0
    elif kind == "subnormal results":
        a, b = a * 2.0**-74, b * 2.0**-72
    elif kind == "subnormal inputs":
        a = integers(seed, (rows, terms), 20) * 2.0**-149
    elif kind == "ties":
        # Integers whose sums need 25 or 26 bits: most results are exact midpoints or close to one.
        a, b = integers(seed, (rows, terms), 12), integers(seed + 1, (cols, terms), 11)
        a[:, 0], b[:, 0] = 2.0**12, 2.0**12
    elif kind == "nearly ties":
        a, b = integers(seed, (rows, terms), 12), integers(seed + 1, (cols, terms), 11)
        a[:, 0], b[:, 0] = 2.0**12, 2.0**12
        a[:, 1], b[:, 1] = 2.0**-60, draw(seed + 2, (cols,), -60, -20)
    elif kind == "cancellation":
        half = terms // 2
        a[:, half : 2 * half] = -a[:, :half]
        b[:, half : 2 * half] = b[:, :half] * (1 + 2.0**-20)
        b[::2, half : 2 * half] = b[::2, :half]
    elif kind == "zeros":
        a[:, ::2], b[:, 1::2] = -0.0, 0.0
    else:
        assert kind == "normal", kind
    return a, b


KINDS = (
    "normal",
    "wide",
    "extreme",
    "outliers",
    "subnormal results",
    "subnormal inputs",
    "ties",
    "nearly ties",
    "cancellation",
    "zeros",
)
