"""A text recorded at several times: all of its sequences are one observation, and a limit keeps every time and text."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mdlm_interp.diffusion import LogLinearSchedule, corrupt
from mdlm_interp.errors import DataError
from transcoder import evaluate
from transcoder.eval_scores import ORIGINAL, REPLACED, Scores, SequenceSums
from transcoder.evaluation import NoisedSequences
from transcoder.report import markdown
from transcoder.sequence_choice import text_numbers, well_mixed

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.fixture(scope="module")
def repeated(store, model):
    """Twelve texts, each at five times."""
    x_0 = store.tokens()[0][:12].repeat_interleave(5, dim=0)
    t = torch.tensor(TIMES, dtype=torch.float64).repeat(12)
    move_chance = LogLinearSchedule().move_chance(t)
    x_t = corrupt(x_0, move_chance, model.config.mask_id, seed=0, indices=range(60))
    return NoisedSequences(x_0, x_t, t)


@pytest.mark.parametrize("limit", [5, 7, 12, 25, 36, 59])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_limit_keeps_times_and_texts_as_they_were_mixed(limit, seed):
    t, text = np.tile(TIMES, 12), np.repeat(np.arange(12), 5)
    chosen = well_mixed(t, text, limit, seed)
    assert len(chosen) == limit
    assert (np.diff(chosen) > 0).all()
    assert np.ptp([(t[chosen] == time).sum() for time in TIMES]) <= 1
    assert np.ptp(np.bincount(text[chosen], minlength=12)) <= 1


def test_a_time_that_is_rare_keeps_a_sequence_and_others_their_share():
    t, text = np.array([0.9] + [0.1] * 30 + [0.2] * 60), np.arange(91)
    chosen = well_mixed(t, text, 9, 0)
    assert [(t[chosen] == time).sum() for time in (0.9, 0.1, 0.2)] == [1, 3, 5]


def test_times_that_all_differ_are_covered_evenly():
    t = np.random.default_rng(0).permutation(200) / 200
    chosen = well_mixed(t, np.arange(200), 20, 0)
    assert sorted((t[chosen] * 20 + 1e-9).astype(int)) == list(range(20))


def test_texts_that_come_back_in_one_stretch_of_time_are_taken_once_before_twice():
    chosen = well_mixed(np.full(30, 0.5), np.arange(30) % 3, 4, 0)
    assert sorted(np.bincount(chosen % 3)) == [1, 1, 2]


def test_the_choice_is_a_function_of_the_seed():
    t, text = np.tile(TIMES, 12), np.repeat(np.arange(12), 5)
    first, again, other = (well_mixed(t, text, 25, seed).tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert well_mixed(t, text, 60, 3).tolist() == list(range(60))


def test_an_evaluation_with_a_limit_sees_every_time_and_text(model, trained, repeated):
    one, again, other = (
        evaluate(model, trained, repeated, max_sequences=25, oracle_sequences=None, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [int((one.scores.t == time).sum()) for time in TIMES] == [5] * 5
    assert one.n_texts == 12
    assert np.array_equal(one.scores.sums[REPLACED].nelbo, again.scores.sums[REPLACED].nelbo)
    assert not np.array_equal(one.scores.sums[REPLACED].nelbo, other.scores.sums[REPLACED].nelbo)


@pytest.mark.parametrize("limit", [0, -3])
@pytest.mark.parametrize("name", ["max_sequences", "oracle_sequences"])
def test_a_limit_below_one_is_one_line(model, trained, repeated, name, limit):
    limits: dict[str, Any] = {name: limit}
    with pytest.raises(
        DataError, match=rf"{name} must be at least 1, got {limit}; None (uses all|skips them)"
    ):
        evaluate(model, trained, repeated, **limits)


def test_texts_are_told_apart_as_the_stores_blocks_are(capture):
    store = capture(times="fixed", time=TIMES, max_sequences=25)
    blocks = store.sequence_column("block").numpy()
    assert len(np.unique(blocks)) == 5
    assert np.array_equal(text_numbers(store.tokens()[0]), blocks)
    shorter = torch.tensor([[1, 2, 3], [1, 2, -1], [1, 2, 3]])
    assert text_numbers(shorter).tolist() == [0, 1, 0]


def test_what_is_seen_twice_is_no_more_certain(model, trained, store):
    once = NoisedSequences.from_store(store, range(8))
    twice = NoisedSequences.from_store(store, [*range(8), *range(8)])
    a, b = (evaluate(model, trained, data, oracle_sequences=None) for data in (once, twice))
    assert (a.n_sequences, a.n_texts, b.n_sequences, b.n_texts) == (8, 8, 16, 8)
    for figure in ("nelbo", "delta_nelbo", "kl", "raw_kl", "top1_agreement"):
        for condition in a.scores.sums:
            x, y = getattr(a.scores, figure)(condition), getattr(b.scores, figure)(condition)
            # Only the order of float64 sums differs, and native forwards in batches of other sequences.
            assert y.value == pytest.approx(x.value, rel=1e-4, abs=1e-6)
            assert y.se == pytest.approx(x.se, rel=1e-3, abs=1e-6)
    assert "- 16 sequences of 8 texts, " in "\n".join(markdown(b, {}))


def test_the_standard_error_is_the_spread_over_other_samples_of_texts():
    n_texts, n_times, n_samples = 30, 5, 2000
    rng = np.random.default_rng(1)
    shape = (n_samples, n_texts, n_times)
    nelbo = 2.0 + rng.standard_normal(shape[:2])[..., None] + 0.3 * rng.standard_normal(shape)
    text = np.repeat(np.arange(n_texts), n_times)
    t = np.tile(TIMES, n_texts)
    size = np.ones(n_texts * n_times)
    zero = SequenceSums(*(np.zeros(len(size)) for _ in range(4)))
    found = []
    for sample in nelbo.reshape(n_samples, -1):
        sums = {ORIGINAL: zero, REPLACED: SequenceSums(sample, sample, sample, sample)}
        found.append(Scores(t, text, size, size, sums, 10).delta_nelbo(REPLACED))
    spread = np.std([estimate.value for estimate in found])
    # 2,000 samples give their spread to 1.6 %. Sequences as units would give less than half of it.
    assert np.mean([estimate.se for estimate in found]) == pytest.approx(spread, rel=0.06)


def test_one_text_at_several_times_has_no_standard_error(model, trained, repeated):
    one = evaluate(model, trained, repeated.part(torch.arange(5)), oracle_sequences=None)
    found = one.delta_nelbo(REPLACED)
    assert math.isfinite(found.value)
    assert math.isnan(found.se)
    assert found.undefined == "one text has no standard error"
    text = "\n".join(markdown(one, {}))
    assert "- 5 sequences of 1 text, " in text
    assert "(one text)" in text
