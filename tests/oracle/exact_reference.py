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


def deep_cancellation(
    seed: int, cols: int, terms: int, stages: int, reach: int = 50
) -> tuple[Tensor, Tensor, list[Fraction]]:
    """A row x [1, n], weights [cols, n], and the exact products, whose leading digits cancel again and again.

    Each stage appends the negative of the float32 nearest to the sum so far, so that what is left is some 24 bits
    further down; sometimes the last one misses by its own last bit. The terms are in random order.
    """
    x, weight = draw(seed, (1, terms), -reach, reach), draw(seed + 1, (cols, terms), -reach, reach)
    generator = np.random.default_rng(seed + 2)
    tails, sums = [], []
    for row in weight:
        total, tail = sum(map(exact_product, x[0].tolist(), row.tolist()), Fraction(0)), []
        for stage in range(stages):
            nearest = nearest_float32(total)
            if stage == stages - 1 and generator.integers(2):
                nearest = float(np.nextafter(np.float32(nearest), np.float32(0)))
            tail.append(-nearest)
            total -= Fraction(nearest)
        tails.append(tail)
        sums.append(total)
    order = torch.from_numpy(generator.permutation(terms + stages))
    x = torch.cat((x, torch.ones(1, stages)), 1)[:, order]
    return x, torch.cat((weight, torch.tensor(tails)), 1)[:, order], sums


def exact_product(a: float, b: float) -> Fraction:
    return Fraction(a) * Fraction(b)


def hidden_ties(seed: int, rows: int, pairs: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Rows of float32, and their exact sums rounded: a midpoint and one term far below it that decides, among
    pairs of all sizes from 2^low to 2^high that cancel exactly. Any partial sum that rounds may lose the term."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, pairs)) * 2.0 ** generator.integers(low, high, (rows, pairs))
    below = 1 + generator.integers(0, 2**23, rows) * 2.0**-23
    last = generator.choice([-1, 1], rows) * 2.0 ** generator.integers(-140, -105, rows)
    columns = [values, -values, below[:, None], np.full((rows, 1), 2.0**-24), last[:, None]]
    terms = generator.permuted(np.concatenate(columns, 1).astype(np.float32), axis=1)
    expected = below.astype(np.float32)
    above = np.nextafter(expected, np.float32(4))
    return torch.from_numpy(terms), torch.from_numpy(np.where(last > 0, above, expected))


def scaled_midpoints(seed: int, rows: int, factor: float, pairs: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of float32 whose sums, times the factor, lie within 2^-144 of midpoints of float32; and the products.

    The sum is the midpoint over the factor, cut to 168 bits: seven float32 hold it exactly. Pairs of terms of many
    sizes that cancel may stand among them.
    """
    generator = np.random.default_rng(seed)
    found, expected = [], []
    for _ in range(rows):
        midpoint = Fraction(2 * int(generator.integers(2**23, 2**24)) + 1, 2**25)
        exponent = int(generator.integers(-20, 20))
        rest, parts = midpoint / Fraction(factor) * Fraction(2) ** exponent, []
        for _ in range(7):
            # Cut, not rounded, so that the sum is below the midpoint; the last one may pass it.
            part = Fraction(float(np.float32(float(rest))))
            while part > rest:
                part = Fraction(float(np.nextafter(np.float32(float(part)), np.float32(-np.inf))))
            parts.append(part)
            rest -= part
        if generator.integers(2):
            parts[-1] = Fraction(float(np.nextafter(np.float32(float(parts[-1])), np.float32(np.inf))))
        values = generator.standard_normal(pairs) * 2.0 ** generator.integers(-110, 60, pairs)
        terms = np.concatenate([np.array([float(part) for part in parts]), values, -values])
        found.append(generator.permutation(terms.astype(np.float32)))
        expected.append(nearest_float32(Fraction(factor) * sum(parts, Fraction(0))))
    return torch.from_numpy(np.stack(found)), torch.tensor(expected)


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
