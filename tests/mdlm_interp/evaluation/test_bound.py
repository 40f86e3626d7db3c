"""The bound of a model that knows the law, in continuous time and in steps."""

from __future__ import annotations

import re

import pytest
import torch

from mdlm_interp.diffusion import LogLinearSchedule, corrupt, masked_cross_entropy
from mdlm_interp.errors import DataError
from mdlm_interp.evaluation import nelbo, pooled
from tests.mdlm_interp.decoding.chain import MarkovChain


@pytest.fixture
def chain() -> MarkovChain:
    chain = MarkovChain()
    chain.device = torch.device("cpu")  # type: ignore[attr-defined]
    return chain


@pytest.mark.parametrize("text", [(0, 1, 2, 0), (2, 2, 2, 2)])
def test_the_bound_of_an_exact_denoiser_is_the_likelihood(chain, unchecked, text):
    """Bounded by four standard errors, and the part of the integral below t = 0.001."""
    law = float(chain.law()[chain.sequences().index(text)].log())
    found = nelbo(chain, torch.tensor([text]).repeat(400, 1), times_per_sequence=8, batch_size=512)
    assert abs(found.nats_per_token + law / 4) < 4 * found.standard_error + 2e-3
    assert found.standard_error < 0.05


def test_given_tokens_make_it_the_likelihood_of_the_others(chain, unchecked):
    """Bounded as above, with the spread of two scored tokens instead of four: log p(text) - log p(given), which under
    the chain is far from the likelihood of the whole."""
    text, law = (0, 2, 1, 0), chain.law()
    given = torch.tensor([True, False, False, True])
    agree = torch.tensor([s[0] == text[0] and s[3] == text[3] for s in chain.sequences()])
    expected = -float((law[chain.sequences().index(text)] / law[agree].sum()).log()) / 2
    found = nelbo(
        chain,
        torch.tensor([text]).repeat(400, 1),
        given=given.expand(400, -1),
        times_per_sequence=8,
        batch_size=512,
    )
    assert abs(found.nats_per_token - expected) < 4 * found.standard_error + 2e-3
    assert found.standard_error < 0.1
    assert (found.n_tokens, found.n_given) == (800, 800)
    whole = -float(law[chain.sequences().index(text)].log()) / 4
    assert abs(whole - expected) > 5 * found.standard_error


def test_given_tokens_are_never_noised_and_each_scored_token_counts_the_same(make_model):
    """Exact: what the model reads. Bounded by float32 sums: the mean is over scored tokens of ragged sequences."""
    model, seen = make_model(), []
    texts = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    given = torch.arange(7) < torch.tensor([[0], [3], [6]])

    def predict(x_t, sigma):
        seen.append(x_t)
        return model(x_t, sigma)

    found = nelbo(model, texts, given=given, times_per_sequence=2, seed=5, predict=predict)
    repeated = given.repeat_interleave(2, 0)
    assert torch.equal(seen[0][repeated], texts.repeat_interleave(2, 0)[repeated])
    assert bool((seen[0][~repeated] == 40).any())
    alone = [
        nelbo(model, texts[n : n + 1], given=given[n : n + 1], times_per_sequence=2, seed=5, first=n)
        for n in range(3)
    ]
    mean = sum(bound.nats_per_token * bound.n_tokens for bound in alone) / 12
    assert found.n_tokens == 12
    assert found.nats_per_token == pytest.approx(mean, rel=1e-6)
    assert found.estimator.endswith("t in [0.001, 1], of the tokens that are not given")


def test_nothing_given_is_the_bound_without_the_argument(make_model):
    """Bounded by the order of float64 sums: the mean of means against the ratio of sums, and their errors."""
    model, texts = make_model(), torch.randint(0, 40, (5, 7), generator=torch.Generator().manual_seed(2))
    plain = nelbo(model, texts, seed=5)
    found = nelbo(model, texts, seed=5, given=torch.zeros_like(texts, dtype=torch.bool))
    assert found.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-12)
    assert found.standard_error == pytest.approx(plain.standard_error, rel=1e-9)
    assert (found.by_time, found.estimator) == (plain.by_time, plain.estimator)


def test_given_that_leaves_nothing_or_does_not_fit_is_refused_and_is_not_pooled(make_model, unchecked):
    model, texts = make_model(), torch.zeros(2, 7, dtype=torch.int64)
    for given in (torch.ones(2, 7, dtype=torch.bool), torch.zeros(1, 7, dtype=torch.bool)):
        with pytest.raises(DataError, match=r"given must mark some positions of \[2, 7\] and leave some"):
            nelbo(model, texts, given=given)
    partly = nelbo(model, texts, given=(torch.arange(7) < 3).expand(2, -1))
    with pytest.raises(DataError, match="with given tokens cannot be pooled"):
        pooled([partly, partly])


def test_fewer_steps_give_a_higher_bound(chain, unchecked):
    """Bounded: one step draws all tokens independently, a closed form, of which 0.1 % are not masked. Behavioural: more
    steps cost less on the same texts and draws; the gaps are about 0.028 nats."""
    draws = torch.multinomial(chain.law(), 500, replacement=True, generator=torch.Generator().manual_seed(0))
    texts = torch.tensor(chain.sequences())[draws]
    one, four, many = (
        nelbo(chain, texts, times_per_sequence=8, n_steps=n, batch_size=512) for n in (1, 4, 100_000)
    )
    continuous = nelbo(chain, texts, times_per_sequence=8, batch_size=512)
    marginals = chain(chain.masks(1), torch.zeros(1))[0, :, :3]
    independent = -marginals[torch.arange(4), texts].mean()
    assert one.nats_per_token == pytest.approx(float(independent), rel=0.01)
    assert one.nats_per_token > four.nats_per_token + 0.01
    assert four.nats_per_token > many.nats_per_token + 0.01
    assert many.nats_per_token == pytest.approx(continuous.nats_per_token, abs=2e-3)


def test_one_step_is_the_cross_entropy_of_all_masks(make_model):
    """Exact up to float32: t is 1 for every draw."""
    model = make_model()
    texts = torch.randint(0, 40, (5, 7), generator=torch.Generator().manual_seed(2))
    found = nelbo(model, texts, times_per_sequence=2, n_steps=1, seed=3)
    schedule, ones = LogLinearSchedule(), torch.ones(10, dtype=torch.float64)
    clean = texts.repeat_interleave(2, 0)
    noised = corrupt(clean, schedule.move_chance(ones), 40, seed=3, indices=range(10))
    with torch.inference_mode():
        logits = model(noised, schedule.sigma(ones).float())
    expected = masked_cross_entropy(logits, clean, noised == 40, 40).mean()
    assert found.nats_per_token == pytest.approx(float(expected), rel=1e-5)
    assert [count > 0 for count in found.masked_by_time] == [False] * 9 + [True]


def test_each_estimate_names_its_estimator_and_pools_with_its_like_only(make_model):
    model, texts = make_model(), torch.zeros(2, 7, dtype=torch.int64)
    continuous, steps = nelbo(model, texts), nelbo(model, texts, n_steps=10, first=2)
    assert continuous.estimator == "continuous-time bound, 4 stratified times a sequence, t in [0.001, 1]"
    assert steps.estimator.startswith("discrete-time bound in 10 steps, 4 stratified times")
    assert pooled([steps, steps]).estimator == steps.estimator
    with pytest.raises(
        DataError, match=re.escape("estimates of one estimator can be pooled, got continuous-time")
    ):
        pooled([continuous, steps])
    with pytest.raises(DataError, match="n_steps must be at least 1, or none for continuous time; got 0"):
        nelbo(model, texts, n_steps=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_0": torch.zeros(0, 7, dtype=torch.int64)}, "x_0 must be [batch pos] and not empty, got [0, 7]"),
        ({"x_0": torch.zeros(7, dtype=torch.int64)}, "not empty, got [7]; add an axis for one text"),
        ({"times_per_sequence": 0}, "times_per_sequence must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_has_no_bound_is_refused(make_model, unchecked, arguments, message):
    with pytest.raises(DataError, match=re.escape(message)):
        nelbo(make_model(), **{"x_0": torch.zeros(2, 7, dtype=torch.int64), **arguments})


def test_text_with_masks_has_no_bound(make_model):
    """A mask has probability 0 as a clean token: the bound would be infinite."""
    model = make_model()
    text = torch.tensor([[0, model.config.mask_id, 1]])
    with pytest.raises(DataError, match=f"token {model.config.mask_id} is the mask, which has no likelihood"):
        nelbo(model, text)
