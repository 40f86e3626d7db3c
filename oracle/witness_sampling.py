"""Sampling of oracle/SPEC.md by the witness: its own random words, integer weights, and the reverse process.

Source:
    oracle/SPEC.md, section 6; for the generator Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
"""

# Axes: pos, vocab

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float32, Int64
from oracle.witness_blocks import F32, exp, widen
from oracle.witness_forward import I64, forward
from oracle.witness_rounding import log32

PHILOX_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
PHILOX_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
"""What the two words of the key grow by between rounds."""
PHILOX_ROUNDS = 10
MASK = 2**64 - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x64-10: four 64-bit words for a counter of four and a key of two.

    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))][:2]  # the authors' known answer
    ['0x16554d9eca36314c', '0xdb20fe9d672d0fdc']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        a, b = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & MASK, (a >> 64) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK, (k1 + PHILOX_WEYL[1]) & MASK
    return c0, c1, c2, c3


def words_of(seed: int, stream: str, sequence: int, count: int) -> list[int]:
    """The first `count` words of SPEC's generator."""
    key = seed, int.from_bytes(hashlib.sha256(stream.encode("ascii")).digest()[:8], "little")
    blocks = [philox((1 + i, 0, sequence, 0), key) for i in range(-(-count // 4))]
    return [word for block in blocks for word in block][:count]


def draw_weights(logits: Float32[F32, " vocab"], excluded: int, temperature: float) -> list[int]:
    """The integer weight of every token at a temperature above zero; the excluded token's is 0."""
    if not 0.0 < temperature < np.inf:
        raise DataError(f"a temperature must be positive and finite, got {temperature}; 0 has no weights")
    wide = widen(logits)
    allowed = np.arange(wide.size) != excluded
    m = wide[allowed].max()
    with np.errstate(over="ignore"):  # a quotient beyond binary64 has weight 0, as EXP gives it
        e = exp((np.where(allowed, wide, m) - m) / temperature)
    return [int(w) if keep else 0 for w, keep in zip(np.rint(np.ldexp(e, 42)), allowed, strict=True)]


def draw(logits: Float32[F32, " vocab"], excluded: int, temperature: float, word: int) -> int:
    """The token that a 64-bit word picks from a row of logits."""
    if temperature == 0.0:
        values: list[float] = widen(logits).tolist()
        best = max(value for token, value in enumerate(values) if token != excluded)
        return next(token for token, value in enumerate(values) if token != excluded and value == best)
    weights = draw_weights(logits, excluded, temperature)
    target = word * sum(weights) >> 64
    cumulative = 0
    for token, weight in enumerate(weights):
        cumulative += weight
        if cumulative > target:
            return token
    raise AssertionError("the target is below the sum of all weights")


def sigma_of(masked: int, length: int) -> float:
    """The noise level that a time-conditioned model reads when `masked` of `length` tokens are masked."""
    if not 0 <= masked <= length or length < 1:
        raise DataError(f"masked must be in [0, length], got {masked} of {length}")
    return log32(1000 * length, 1000 * length - 999 * masked)


def reverse_process(
    weights: Mapping[str, F32],
    config: MDLMConfig,
    ids: Int64[I64, " pos"],
    *,
    n_steps: int,
    seed: int,
    sequence: int = 0,
    temperature: float = 1.0,
) -> Int64[I64, " pos"]:
    """One sequence with its masked tokens drawn in n_steps steps.

    Args:
        sequence: The sequence's number, on which its random words depend.
        temperature: 0 takes the likeliest token.
    """
    length, ids = len(ids), ids.copy()
    for step in range(n_steps):
        masked = [p for p in range(length) if ids[p] == config.mask_id]
        if not masked:
            break
        sigma = np.array([sigma_of(len(masked), length)], dtype=np.float32)
        logits, _ = forward(weights, config, ids[None], sigma)
        reveal = words_of(seed, f"reveal:{step}", sequence, length)
        words = words_of(seed, f"token:{step}", sequence, length)
        for p in masked:
            if reveal[p] * (n_steps - step) < 1 << 64:
                ids[p] = draw(logits[0, p], config.mask_id, temperature, words[p])
    return ids
