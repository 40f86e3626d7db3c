"""Random numbers that are a function of (seed, stream, index): pinned, pure and independent."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp.randomness import permutation, random_bits, uniforms

KNOWN = {
    (0, "mask", 0): [3006556730284613068, 11230311411598585400, 12930305192841015093],
    (0, "t", 0): [17330151978204686305, 17476959172374067715, 5834414098991013474],
    (0, "mask", 1): [5337513432978785346, 14203827200478581147, 1198780254598557213],
    (1, "mask", 0): [15154724771657923752, 8070940632936175488, 1433093493496814498],
    (2**64 - 1, "init:embedding", 2**63 - 1): [
        16598421877875061137,
        2587000487654510340,
        13687061042195322076,
    ],
}
"""The first three words of each (seed, stream, index)."""


def bits(drawn: tuple[int, str, int], count: int) -> list[int]:
    seed, stream, index = drawn
    return [int(word) for word in random_bits(seed, stream, index, count)]


@pytest.mark.parametrize("drawn", list(KNOWN))
def test_the_bits_are_the_ones_on_record(drawn):
    """Exact. If this fails, every stored seed means something else: masks, times, initial weights."""
    assert bits(drawn, 3) == KNOWN[drawn]


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """One block of Philox 4x64 with ten rounds, as Salmon et al. 2011 define it."""
    words = list(counter)
    for round_number in range(10):
        keys = [(part + round_number * weyl) % 2**64 for part, weyl in zip(key, WEYL, strict=True)]
        high, low = zip(
            *(divmod(words[i] * factor, 2**64) for i, factor in zip((0, 2), FACTORS, strict=True)),
            strict=True,
        )
        words = [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
    return words


WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)


@pytest.mark.parametrize("drawn", list(KNOWN))
def test_the_bits_are_philoxs_by_definition(drawn):
    """Exact, against the algorithm written out: so another implementation can draw the same masks."""
    seed, stream, index = drawn
    key = (seed, int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little"))
    blocks = [philox(key, [block, 0, index, 0]) for block in (1, 2)]  # numpy counts before it draws
    assert bits(drawn, 8) == blocks[0] + blocks[1]


def test_uniforms_are_the_upper_53_bits():
    """Exact."""
    assert uniforms(0, "mask", 0, 3).tolist() == [(word >> 11) / 2**53 for word in KNOWN[0, "mask", 0]]


SEEDS, INDICES = st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)


@given(SEEDS, st.text(max_size=8), INDICES, st.integers(0, 20), st.integers(0, 20))
def test_a_draw_does_not_depend_on_how_many_are_asked_for(seed, stream, index, few, more):
    """Exact: fewer are the first of more."""
    many = random_bits(seed, stream, index, few + more)
    assert np.array_equal(many[:few], random_bits(seed, stream, index, few))


@given(SEEDS, st.text(max_size=8), INDICES)
def test_uniforms_are_in_the_half_open_unit_interval(seed, stream, index):
    drawn = uniforms(seed, stream, index, 16)
    assert drawn.dtype == np.float64
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_the_global_generators_are_neither_read_nor_moved():
    np.random.seed(1)  # noqa: NPY002 (the global generator is what this is about)
    first = random_bits(0, "t", 0, 4)
    drawn_after = np.random.random(4)  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(first, random_bits(0, "t", 0, 4))
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(drawn_after, np.random.random(4))  # noqa: NPY002


def test_seeds_streams_and_indices_share_no_number():
    """Exact: 64-bit words of different keys or counters would meet once in 10**13 such tests."""
    keys = [
        (seed, stream, index)
        for seed in (0, 1, 2**64 - 1)
        for stream in ("t", "mask", "")
        for index in (0, 1, 2**63 - 1)
    ]
    words = np.concatenate([random_bits(seed, stream, index, 500) for seed, stream, index in keys])
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("other", [(1, "mask", 0), (0, "t", 0), (0, "mask", 1)])
def test_neighbouring_streams_are_uncorrelated(other):
    """Bounded: four standard deviations of the correlation of 10,000 independent pairs."""
    seed, stream, index = other
    first, second = uniforms(0, "mask", 0, 10_000), uniforms(seed, stream, index, 10_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(10_000)


def test_first_draws_over_the_index_are_uniform():
    """Bounded: each tenth of the unit interval within four standard deviations of 2,000 binomial draws."""
    drawn = np.array([uniforms(5, "mask", index, 1)[0] for index in range(2000)])
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert np.abs(counts - 200).max() <= 4 * np.sqrt(2000 * 0.1 * 0.9)


@pytest.mark.parametrize(
    ("seed", "index", "message"),
    [
        (-1, 0, r"seed must be in \[0, 2\*\*64\), got -1"),
        (2**64, 0, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        (0, -1, r"index must be in \[0, 2\*\*63\), got -1"),
        (0, 2**63, r"index must be in \[0, 2\*\*63\), got 9223372036854775808"),
    ],
)
def test_a_seed_or_index_out_of_range_is_an_error(seed, index, message):
    with pytest.raises(ValueError, match=message):
        uniforms(seed, "mask", index, 1)


@given(SEEDS, INDICES, st.integers(0, 40))
def test_a_permutation_is_one_and_pure(seed, index, size):
    order = permutation(seed, "shuffle", index, size)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, permutation(seed, "shuffle", index, size))


def test_permutations_of_three_are_equally_likely():
    """Bounded: each of the six within four standard deviations of 3,000 / 6."""
    counts: dict[tuple[int, ...], int] = {}
    for index in range(3000):
        order = tuple(permutation(0, "shuffle", index, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert max(abs(n - 500) for n in counts.values()) <= 4 * np.sqrt(3000 / 6 * 5 / 6)
