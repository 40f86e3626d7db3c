"""What samples look like, on samples whose figures are known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from mdlm_interp.errors import DataError
from mdlm_interp.evaluation import sample_statistics


def test_figures_of_a_text_counted_by_hand():
    # a b a b c: bigrams ab ba ab bc; trigrams aba bab abc.
    found = sample_statistics([[0, 1, 0, 1, 2]])
    shares = (0.4, 0.4, 0.2)
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert found.rep == pytest.approx({1: 2 / 5, 2: 1 / 4, 3: 0.0, 4: 0.0})
    assert found.distinct == pytest.approx({1: 3 / 5, 2: 3 / 4, 3: 1.0, 4: 1.0})
    assert math.isnan(found.entropy_error)


def test_rep_is_within_samples_and_distinct_over_all():
    found = sample_statistics([[1, 2, 3, 4]] * 3)
    assert found.rep[2] == 0.0
    assert found.distinct[2] == pytest.approx(1 / 3)
    assert found.entropy == pytest.approx(math.log(4))
    assert found.entropy_error == 0.0


def test_one_token_repeated_has_no_entropy():
    found = sample_statistics([[7] * 100])
    assert found.entropy == 0.0
    assert math.copysign(1, found.entropy) == 1
    assert found.rep[4] == pytest.approx(1 - 1 / 97)


def test_random_samples_agree_with_plain_counting():
    """Exact counts against a second way of counting; samples of different lengths, some shorter than n."""
    draw = np.random.default_rng(0)
    samples = [draw.integers(0, 6, draw.integers(2, 40)).tolist() for _ in range(30)]
    found = sample_statistics(samples, n_grams=(1, 2, 3, 5))
    for n in (1, 2, 3, 5):
        grams = [[tuple(s[i : i + n]) for i in range(len(s) - n + 1)] for s in samples]
        filled = [g for g in grams if g]
        assert found.rep[n] == pytest.approx(np.mean([1 - len(set(g)) / len(g) for g in filled]))
        together = [gram for g in grams for gram in g]
        assert found.distinct[n] == pytest.approx(len(set(together)) / len(together))
    entropies = [-sum(c / len(s) * math.log(c / len(s)) for c in Counter(s).values()) for s in samples]
    assert found.entropy == pytest.approx(np.mean(entropies))
    assert found.entropy_error == pytest.approx(np.std(entropies, ddof=1) / math.sqrt(30))
    assert found.n_tokens == sum(map(len, samples))


def test_what_has_no_figure_is_said():
    assert math.isnan(sample_statistics([[1, 2]], n_grams=(3,)).rep[3])
    with pytest.raises(DataError, match="at least one sample, and none may be empty; leave empty ones out"):
        sample_statistics([[1], []])
    with pytest.raises(DataError, match="n of at least 1, got 0"):
        sample_statistics([[1]], n_grams=(2, 0))
