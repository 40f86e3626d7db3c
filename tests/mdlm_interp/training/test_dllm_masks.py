"""Masks in the answers: how many, where, what becomes of them, and what they are a function of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.training.dllm_masks import (
    IGNORED,
    RULES,
    MaskingConfig,
    accuracy_by_share,
    mask_answers,
    masked_loss_sum,
    pad,
)

MASK_ID = 4
RANDOM_IDS = np.arange(50, 60)
IDS = np.arange(100, 140)
IS_ANSWER = (IDS >= 110) & (IDS < 130)


def masked(example=0, *, epoch=0, seed=0, ids=IDS, is_answer=IS_ANSWER, **settings):
    return mask_answers(
        ids,
        is_answer,
        MaskingConfig(**settings),
        mask_id=MASK_ID,
        random_ids=RANDOM_IDS,
        seed=seed,
        epoch=epoch,
        example=example,
    )


def test_only_answer_tokens_are_masked_and_exactly_they_are_labelled():
    """Exact: over 200 examples."""
    for example in range(200):
        found = masked(example)
        changed = found.ids != IDS
        assert not changed[~IS_ANSWER].any()
        assert (found.ids[changed] == MASK_ID).all()
        assert np.array_equal(found.labels, np.where(changed, IDS, IGNORED))


def test_the_number_of_masks_is_that_of_the_published_formula_and_covers_its_range():
    """Behavioural: int(20 u) for u in [0.15, 0.99] is 3 to 19, of which each has its probability."""
    counts = np.bincount([int((masked(n).labels != IGNORED).sum()) for n in range(4000)], minlength=21)
    edges = np.clip(np.arange(22) / 20, 0.15, 0.99)
    expected = 4000 * np.diff(edges) / 0.84
    assert counts[expected == 0].sum() == 0
    present = expected > 0
    statistic = ((counts[present] - expected[present]) ** 2 / expected[present]).sum()
    freedom = present.sum() - 1
    assert abs(statistic - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_every_answer_position_is_masked_equally_often():
    """Behavioural: chi-square over positions; draws without replacement only narrow it."""
    hits = sum((masked(n, lowest=0.5, highest=0.5).labels != IGNORED).astype(int) for n in range(2000))[
        IS_ANSWER
    ]
    assert hits.sum() == 2000 * 10
    assert np.abs(hits - 1000).max() < 4.5 * np.sqrt(500)


def test_an_answer_of_one_token_is_always_masked():
    only = IDS == 117
    for example in range(50):
        assert masked(example, is_answer=only).ids[17] == MASK_ID


def test_masks_are_drawn_anew_in_each_epoch_unless_they_are_static():
    first, second = masked(3, epoch=0), masked(3, epoch=1)
    assert not np.array_equal(first.labels, second.labels)
    assert np.array_equal(masked(3, epoch=1).ids, second.ids)
    static = [masked(3, epoch=epoch, static=True).ids for epoch in (0, 1, 7)]
    assert np.array_equal(static[0], static[1])
    assert np.array_equal(static[0], static[2])
    assert not np.array_equal(masked(4, static=True).labels, masked(3, static=True).labels)
    assert not np.array_equal(masked(3, seed=1).labels, first.labels)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_its_published_shares(rule):
    """Behavioural: shares of 20,000 chosen tokens within 4.5 standard deviations; random tokens are of their list."""
    n, found = 0, np.zeros(3)
    for example in range(1000):
        one = masked(example, rule=rule, lowest=1.0, highest=1.0)
        seen = one.ids[IS_ANSWER]
        random = np.isin(seen, RANDOM_IDS)
        found += [(seen == MASK_ID).sum(), random.sum(), (seen == IDS[IS_ANSWER]).sum()]
        n += len(seen)
        assert (one.labels[IS_ANSWER] == IDS[IS_ANSWER]).all()
    assert found.sum() == n
    published = {
        "pure_mask": (1, 0, 0),
        "bert": (0.8, 0.1, 0.1),
        "llada": (0.9, 0.1, 0),
        "flowlm": (0.2, 0.7, 0.1),
        "pure_random": (0, 1, 0),
    }[rule]
    shares = np.array(published)
    assert (np.abs(found / n - shares) <= 4.5 * np.sqrt(shares * (1 - shares) / n)).all()


def test_random_tokens_are_drawn_equally_often():
    drawn = [masked(n, rule="pure_random", lowest=1.0, highest=1.0).ids[IS_ANSWER] for n in range(500)]
    counts = np.bincount(np.concatenate(drawn) - 50, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(900)


def test_an_example_without_an_answer_is_refused():
    with pytest.raises(DataError, match="example 5 has no answer token to mask"):
        masked(5, is_answer=np.zeros_like(IS_ANSWER))


@pytest.mark.parametrize("bounds", [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_shares_that_cannot_be_are_refused(bounds):
    with pytest.raises(ConfigError, match="lowest and highest must be shares"):
        MaskingConfig(lowest=bounds[0], highest=bounds[1])


def test_the_loss_is_the_cross_entropy_written_out():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator)
    labels = torch.tensor([[IGNORED, 2, IGNORED], [6, IGNORED, 0]])
    p = logits.double().softmax(-1)
    expected = -(p[0, 1, 2].log() + p[1, 0, 6].log() + p[1, 2, 0].log())
    assert float(masked_loss_sum(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_rows_are_padded_at_the_end():
    rows = [np.array([1, 2, 3]), np.array([4])]
    assert pad(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad(rows, 9, 4).tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]


def test_accuracy_is_told_apart_by_the_share_of_masks():
    labels = torch.full((3, 8), IGNORED)
    labels[0, :2] = 1  # 2 of 8
    labels[1, :6] = 1  # 6 of 8
    labels[2, :8] = 1
    predicted = torch.ones(3, 8, dtype=torch.int64)
    predicted[1, 0] = predicted[2, :4] = 2
    found = accuracy_by_share(predicted, labels, torch.ones(3, 8, dtype=torch.bool))
    assert [(one.at_most, one.n_tokens) for one in found] == [(0.25, 2), (0.5, 0), (0.75, 6), (1.0, 8)]
    assert np.isnan(found[1].accuracy)
    assert [found[n].accuracy for n in (0, 2, 3)] == pytest.approx([1.0, 5 / 6, 0.5])
