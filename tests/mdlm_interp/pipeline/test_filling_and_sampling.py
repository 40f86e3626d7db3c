"""Filling masks and ancestral sampling, against brute force and exact laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdlm_interp.decoding import ancestral_sample, draw
from mdlm_interp.errors import DataError
from mdlm_interp.filling import fill_masks, predict


def test_filling_commits_the_most_confident_token_first(tiny_model, tokenizer):
    text = "the old [MASK] sees the [MASK]."
    ids = tokenizer.encode_with_masks(text)
    mask_id = tokenizer.mask_id
    x = torch.tensor([ids])
    while mask_id in x[0].tolist():
        logits = tiny_model(x)[0].detach().double()
        logits[:, mask_id] = -torch.inf
        probabilities = logits.softmax(-1)
        masked = [p for p, token in enumerate(x[0].tolist()) if token == mask_id]
        best = max(masked, key=lambda p: float(probabilities[p].max()))
        x[0, best] = probabilities[best].argmax()
    result = fill_masks(tiny_model, tokenizer, text, top_k=3)
    assert list(result.ids) == x[0].tolist()
    assert result.text == tokenizer.decode(x[0].tolist())
    assert [prediction.position for prediction in result.masks] == [
        i for i, t in enumerate(ids) if t == mask_id
    ]


def test_candidates_are_the_first_passes_probabilities_without_the_mask(tiny_model, tokenizer):
    result = fill_masks(tiny_model, tokenizer, "a red [MASK] sings", top_k=tokenizer.mask_id)
    (prediction,) = result.masks
    assert sum(probability for _, probability in prediction.top) == pytest.approx(1.0)
    assert all(word != "[MASK]" for word, _ in prediction.top)
    values = [probability for _, probability in prediction.top]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty; give a sentence with"),
        ("no gap here", r"the text has no \[MASK\]; write \[MASK\] where"),
        ("[MASK]" * 30, "the text has 30 tokens, the model's context is 24; shorten it"),
    ],
)
def test_text_that_cannot_be_filled_is_refused(tiny_model, tokenizer, text, message):
    with pytest.raises(DataError, match=message):
        fill_masks(tiny_model, tokenizer, text)


def test_a_count_of_candidates_outside_the_vocabulary_is_refused(tiny_model, tokenizer):
    with pytest.raises(DataError, match=r"top_k must be in \[1, 299\], got 300"):
        fill_masks(tiny_model, tokenizer, "a [MASK]", top_k=300)


def test_a_sample_keeps_its_prompt_and_leaves_no_mask(tiny_model):
    start = torch.full((2, 10), tiny_model.config.mask_id)
    start[:, 3] = 17
    sample = ancestral_sample(tiny_model, start, steps=4)
    assert sample[:, 3].tolist() == [17, 17]
    assert tiny_model.config.mask_id not in sample.flatten().tolist()
    assert start[0, 0] == tiny_model.config.mask_id


def test_a_sequences_draws_do_not_depend_on_its_batch(tiny_model):
    """Exact: the draws; logits of other batch shapes differ in the last bits, which moves no token."""
    start = torch.full((3, 8), tiny_model.config.mask_id)
    together = ancestral_sample(tiny_model, start, steps=5, seed=3)
    alone = ancestral_sample(tiny_model, start[:1], steps=5, seed=3, indices=[2])
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together[0], together[1])


def test_one_step_samples_the_models_own_distribution(tiny_model):
    """Behavioural: chi-square of 4,000 one-step samples at one position against the predicted law."""
    mask_id = tiny_model.config.mask_id
    start = torch.full((4000, 2), mask_id)
    drawn = ancestral_sample(tiny_model, start, steps=1, seed=1)[:, 0]
    law = predict(tiny_model, start[:1])[0, 0]
    counts = torch.bincount(drawn, minlength=mask_id + 1).double()
    common = law * 4000 >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([law[common], law[~common].sum()[None]]) * 4000
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_the_share_revealed_follows_the_grid(tiny_model, monkeypatch):
    """Behavioural: after half of the steps half of the positions are revealed."""
    seen: list[float] = []
    mask_id = tiny_model.config.mask_id

    def record(model, x_t):
        seen.append(float((x_t == mask_id).double().mean()))
        return predict(model, x_t)

    monkeypatch.setattr("mdlm_interp.decoding.ancestral.predict", record)
    ancestral_sample(tiny_model, torch.full((100, 20), mask_id), steps=4)
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=0.04)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    law = torch.tensor([[[0.0, 0.25, 0.0, 0.75, 0.0]]], dtype=torch.float64)
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999999, 3)):
        assert int(draw(law, torch.tensor([[uniform]], dtype=torch.float64))) == token


def test_temperature_sharpens_and_zero_takes_the_best():
    law = torch.tensor([[[0.2, 0.3, 0.5]]], dtype=torch.float64)
    uniform = torch.tensor([[0.3]], dtype=torch.float64)
    assert int(draw(law, uniform, 0.0)) == 2
    squared = torch.tensor([0.04, 0.09, 0.25], dtype=torch.float64)
    edges = (squared / squared.sum()).cumsum(0)
    for u, token in ((float(edges[0]) - 1e-9, 0), (float(edges[0]) + 1e-9, 1), (float(edges[1]) + 1e-9, 2)):
        assert int(draw(law, torch.tensor([[u]], dtype=torch.float64), 0.5)) == token


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2, "temperature": -1.0}, "temperature must be"),
        ({"steps": 2, "temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
    ],
)
def test_a_sampler_setting_that_cannot_be_is_refused(tiny_model, keywords, message):
    with pytest.raises(DataError, match=message):
        ancestral_sample(tiny_model, torch.zeros(1, 2, dtype=torch.long), **keywords)
