"""Random numbers as a pure function of (seed, stream, index).

A counter-based generator (Philox 4x64) is keyed by the seed and the stream's name and counts from the
index, so what is drawn for sequence 17 does not depend on batch size, order, rank or interruptions.
Only raw 64-bit output is used: its bits are the algorithm's and the same on every machine and version.

Source:
    Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox); numpy.random.Philox.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError


def random_bits(seed: int, stream: str, index: int, count: int) -> NDArray[np.uint64]:
    """`count` independent 64-bit words for (seed, stream, index).

    Args:
        seed: Any integer from 0 to 2**64 - 1.
        stream: What the numbers are for; different names give independent numbers.
        index: Which item of the stream, such as the sequence's number in the data; 0 to 2**63 - 1.
    """
    if not 0 <= seed < 2**64:
        raise DataError(f"seed must be in [0, 2**64), got {seed}")
    if not 0 <= index < 2**63:
        raise DataError(f"index must be in [0, 2**63), got {index}")
    stream_key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    # The index sits in the counter's third word: the 2**128 blocks below it are this item's own.
    generator = np.random.Philox(key=np.array([seed, stream_key], np.uint64), counter=[0, 0, index, 0])
    return generator.random_raw(count)


def uniforms(seed: int, stream: str, index: int, count: int) -> NDArray[np.float64]:
    """`count` multiples of 2**-53 in [0, 1), uniform and independent; see `random_bits`."""
    words = random_bits(seed, stream, index, count) >> np.uint64(11)
    return words.astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: str, index: int, size: int) -> NDArray[np.int64]:
    """A uniformly random order of range(size), for (seed, stream, index)."""
    return np.argsort(random_bits(seed, stream, index, size), kind="stable")
