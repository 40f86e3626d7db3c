"""Count models of the same tokens, as yardsticks for a language model's bound.

The unigram adds one half to every count. The bigram interpolates with the unigram by a Dirichlet prior
whose strength is chosen among a few by the evaluated text itself, which favours the baseline. The first
token of a block has no predecessor and gets its unigram probability, as the diffusion model sees blocks too.
In a wrapped block the end-of-text at each end is given: it costs these models nothing, the first is the
predecessor of the first token, and the mean is still over all positions, as the diffusion model's is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRIOR_STRENGTHS = (5.0, 20.0, 50.0, 100.0, 200.0, 400.0, 800.0)


def unigram_probabilities(train: NDArray[np.uint16], vocab_size: int) -> NDArray[np.float64]:
    """P(token) [vocab]."""
    counts = np.bincount(train, minlength=vocab_size) + 0.5
    return np.asarray(counts / counts.sum(), np.float64)


def unigram_nats(
    train: NDArray[np.uint16], blocks: NDArray[np.int64], vocab_size: int, *, wrapped: bool = False
) -> float:
    """Mean of -log P(token) over the blocks [batch pos]."""
    text = blocks[:, 1:-1] if wrapped else blocks
    return float(-np.log(unigram_probabilities(train, vocab_size)[text]).sum() / blocks.size)


def bigram_nats(
    train: NDArray[np.uint16], blocks: NDArray[np.int64], vocab_size: int, *, wrapped: bool = False
) -> float:
    """Mean of -log P(token | predecessor in its block) over the blocks [batch pos]."""
    unigram = unigram_probabilities(train, vocab_size)
    keys = train[:-1].astype(np.int64) * vocab_size + train[1:]
    pairs, counts = np.unique(keys, return_counts=True)
    predecessors = np.bincount(train[:-1], minlength=vocab_size)
    before, after = (blocks[:, :-2], blocks[:, 1:-1]) if wrapped else (blocks[:, :-1], blocks[:, 1:])
    wanted = before * vocab_size + after
    slot = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[slot] == wanted, counts[slot], 0)
    first = 0.0 if wrapped else -np.log(unigram[blocks[:, 0]]).sum()
    totals = [
        -np.log((seen + prior * unigram[after]) / (predecessors[before] + prior)).sum()
        for prior in PRIOR_STRENGTHS
    ]
    return float((first + min(totals)) / blocks.size)
