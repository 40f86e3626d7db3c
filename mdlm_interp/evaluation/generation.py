"""What samples look like, whoever wrote them: entropy, repetition, variety.

| figure | of | is |
|---|---|---|
| unigram entropy | each sample, then the mean | entropy in nats of its tokens' shares, as MDLM and ReMDM report |
| rep-n | each sample, then the mean | share of its n-grams that it has had before: 1 - different / all |
| distinct-n | all samples together | different n-grams / all |

A perplexity under another model falls when text repeats itself: read it beside these, never alone.

Source:
    Entropy: Sahoo et al. 2024, arXiv:2406.07524, and Wang et al. 2025, arXiv:2503.00307 (ReMDM); rep-n: Su et al. 2022,
    arXiv:2202.06417; distinct-n: Li et al. 2016, arXiv:1510.03055.
"""

# Axes: sample, pos

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError

N_GRAMS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class SampleStatistics:
    """Figures of some samples."""

    n_samples: int
    n_tokens: int
    entropy: float
    """Mean unigram entropy of a sample, in nats."""
    entropy_error: float
    """Standard error of that mean; nan for one sample."""
    rep: dict[int, float]
    """Mean rep-n by n, in [0, 1); nan where no sample has n tokens."""
    distinct: dict[int, float]
    """distinct-n by n, in (0, 1]; nan where no sample has n tokens."""


def sample_statistics(
    samples: Sequence[Sequence[int]], *, n_grams: Sequence[int] = N_GRAMS
) -> SampleStatistics:
    """Entropy, rep-n and distinct-n of token sequences, which may differ in length.

    Every token counts, end-of-texts and prompts too: cut them off before if they are not to.

    Raises:
        DataError: If there is no sample, one is empty, or an n is below 1.
    """
    if not samples or any(len(sample) == 0 for sample in samples):
        raise DataError("there must be at least one sample, and none may be empty; leave empty ones out")
    if any(n < 1 for n in n_grams):
        raise DataError(f"n-grams have n of at least 1, got {min(n_grams)}")
    arrays = [np.asarray(sample, np.int64) for sample in samples]
    entropies = [unigram_entropy(sample) for sample in arrays]
    return SampleStatistics(
        n_samples=len(arrays),
        n_tokens=sum(len(sample) for sample in arrays),
        entropy=float(np.mean(entropies)),
        entropy_error=float(np.std(entropies, ddof=1)) / math.sqrt(len(arrays))
        if len(arrays) > 1
        else math.nan,
        rep={n: _rep(arrays, n) for n in n_grams},
        distinct={n: _distinct(arrays, n) for n in n_grams},
    )


def unigram_entropy(sample: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution of a sample's own tokens; at most the log of its length."""
    _, counts = np.unique(sample, return_counts=True)
    shares = counts / len(sample)
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no negative zero


def _windows(sample: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """All n-grams of a sample [gram n]."""
    if len(sample) < n:
        return np.empty((0, n), np.int64)
    return np.lib.stride_tricks.sliding_window_view(sample, n)


def _rep(samples: Sequence[NDArray[np.int64]], n: int) -> float:
    windows = [grams for sample in samples if len(grams := _windows(sample, n))]
    if not windows:
        return math.nan
    return float(np.mean([1 - len(np.unique(grams, axis=0)) / len(grams) for grams in windows]))


def _distinct(samples: Sequence[NDArray[np.int64]], n: int) -> float:
    grams = np.concatenate([_windows(sample, n) for sample in samples])
    return len(np.unique(grams, axis=0)) / len(grams) if len(grams) else math.nan
