"""The perplexity bound and the count models beside it, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mdlm_interp.evaluation import nelbo
from mdlm_interp.training.baselines import bigram_nats, unigram_nats, unigram_probabilities


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(0, 250, (12, 24), generator=torch.Generator().manual_seed(3))


def test_a_uniform_guess_costs_log_of_the_vocabulary_without_the_mask(tiny_model, blocks):
    """Bounded: the estimator's own noise, from the number of masked positions."""
    vocab = tiny_model.config.vocab_size
    bound = nelbo(
        tiny_model, blocks, times_per_sequence=32, predict=lambda x_t, _sigma: torch.zeros(*x_t.shape, vocab)
    )
    # Each token costs log(V - 1), up to the part of the integral below t = 0.001 and the schedule's eps.
    assert bound.nats_per_token == pytest.approx(math.log(vocab - 1), rel=0.03)
    assert all(value == pytest.approx(math.log(vocab - 1), rel=1e-5) for value in bound.by_time)


def test_knowing_the_answer_costs_nothing(tiny_model, blocks):
    def oracle(x_t: torch.Tensor, _sigma: torch.Tensor) -> torch.Tensor:
        del _sigma
        rows = [
            torch.nn.functional.one_hot(clean, tiny_model.config.vocab_size) for clean in oracle_rows(x_t)
        ]
        return 100.0 * torch.stack(rows).float()

    def oracle_rows(x_t: torch.Tensor) -> list[torch.Tensor]:
        mask_id = tiny_model.config.mask_id
        return [
            next(row for row in blocks if bool((row[seen != mask_id] == seen[seen != mask_id]).all()))
            for seen in x_t
        ]

    assert nelbo(tiny_model, blocks[:1], predict=oracle).nats_per_token == pytest.approx(0.0, abs=1e-6)


def test_the_bound_does_not_depend_on_the_batch_size(tiny_model, blocks):
    values = [nelbo(tiny_model, blocks, batch_size=size).nats_per_token for size in (1, 5, 64)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_the_standard_error_is_that_of_the_mean_over_sequences(tiny_model, blocks):
    single = [nelbo(tiny_model, blocks[:1], seed=seed).nats_per_token for seed in range(200)]
    one = nelbo(tiny_model, blocks[:1].repeat(200, 1), seed=7)
    assert one.standard_error * math.sqrt(200) == pytest.approx(float(np.std(single)), rel=0.25)


def test_bits_per_byte_converts_units():
    from mdlm_interp.evaluation import Nelbo

    bound = Nelbo(nats_per_token=math.log(2), standard_error=0.0, n_sequences=1, n_tokens=10, by_time=())
    assert bound.bits_per_byte(n_bytes=5) == pytest.approx(2.0)
    assert bound.perplexity == pytest.approx(2.0)


def test_the_unigram_is_smoothed_counts():
    train = np.array([0, 0, 1], np.uint16)
    assert unigram_probabilities(train, 3).tolist() == pytest.approx([2.5 / 4.5, 1.5 / 4.5, 0.5 / 4.5])
    blocks = np.array([[0, 2]])
    expected = -(math.log(2.5 / 4.5) + math.log(0.5 / 4.5)) / 2
    assert unigram_nats(train, blocks, 3) == pytest.approx(expected)


def test_the_end_of_texts_around_a_wrapped_block_cost_the_unigram_nothing():
    train = np.array([0, 0, 1], np.uint16)
    expected = -math.log(1.5 / 4.5) / 3
    assert unigram_nats(train, np.array([[0, 1, 0]]), 3, wrapped=True) == pytest.approx(expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_bigram_equals_a_table_written_out(wrapped):
    generator = np.random.default_rng(0)
    train = generator.integers(0, 6, 500).astype(np.uint16)
    blocks = generator.integers(0, 7, (3, 9))
    unigram = unigram_probabilities(train, 7)
    table = np.zeros((7, 7))
    for before, after in pairwise(train):
        table[before, after] += 1
    best = math.inf
    for prior in (5.0, 20.0, 50.0, 100.0, 200.0, 400.0, 800.0):
        total = 0.0
        for row in blocks:
            total -= 0.0 if wrapped else math.log(unigram[row[0]])
            for before, after in pairwise(row[:-1] if wrapped else row):
                total -= math.log(
                    (table[before, after] + prior * unigram[after]) / (table[before].sum() + prior)
                )
        best = min(best, total)
    assert bigram_nats(train, blocks, 7, wrapped=wrapped) == pytest.approx(best / blocks.size)
