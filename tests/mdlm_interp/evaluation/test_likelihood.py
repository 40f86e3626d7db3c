"""Likelihood under a decoding order: against a known law, against enumeration, and against the sampler itself."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.decoding import DrawArithmetic, Fixed, Sampler, sample, start_tokens
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.evaluation import order_likelihood
from oracle.decoding import exact_parts
from tests.mdlm_interp.decoding.chain import MarkovChain, excess

ORDERS = ["left_to_right", "confidence", "margin", "entropy", "random", (2, 0, 3, 1)]
TINY = MDLMConfig(
    vocab_size=4, model_length=8, hidden_dim=24, cond_dim=10, n_blocks=2, n_heads=3, time_conditioning=True
)
LENGTH = 4


def every_sequence(tokens: int = 3, length: int = LENGTH) -> Tensor:
    return torch.tensor(list(itertools.product(range(tokens), repeat=length)))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_with_an_exact_denoiser_every_order_gives_the_law(order):
    """Bounded by float64's rounding over four factors."""
    chain = MarkovChain()
    found = order_likelihood(chain, torch.tensor(chain.sequences()), order, seed=3)
    assert found.per_sequence == pytest.approx((-chain.law().log()).tolist(), abs=1e-12)


@pytest.fixture
def exact(make_model) -> tuple[HookedMDLM, DrawArithmetic]:
    """A small model in exact arithmetic: in float32 the last bits choose the first position, since all are alike."""
    sampler = Sampler(schedule=Fixed())
    return exact_parts(make_model(TINY), sampler)


@pytest.mark.parametrize("per_step", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS[:4], ids=str)
def test_the_likelihoods_of_all_texts_add_up_to_one(exact, order, per_step):
    """Bounded by the rounding of 81 sums of logarithms."""
    model, arithmetic = exact
    found = order_likelihood(model, every_sequence(), order, per_step=per_step, arithmetic=arithmetic)
    assert math.fsum(math.exp(-nats) for nats in found.per_sequence) == pytest.approx(1.0, abs=1e-13)
    assert min(found.per_sequence) < max(found.per_sequence) - 1


@pytest.mark.parametrize("order", ["left_to_right", (2, 0, 3, 1)], ids=str)
def test_in_native_arithmetic_so_they_do_where_the_model_does_not_choose(make_model, order):
    """Bounded: float32 logits, which differ between the rows of a batch."""
    found = order_likelihood(make_model(TINY), every_sequence(), order)
    assert math.fsum(math.exp(-nats) for nats in found.per_sequence) == pytest.approx(1.0, abs=1e-5)


def tree(model, x: tuple[int, ...], chance: float) -> dict[tuple[int, ...], float]:
    """Probability of each text below a state, the surest position first: an enumeration of the sampler's choices."""
    masked = [p for p in range(len(x)) if x[p] == TINY.mask_id]
    if not masked:
        return {x: chance}
    sigma = torch.tensor([-math.log1p(-0.999 * len(masked) / len(x))])
    with torch.no_grad():
        table = model(torch.tensor([x]), sigma)[0, :, : TINY.mask_id].double().softmax(-1)
    at = max(masked, key=lambda p: (round(float(table[p].max()), 9), -p))
    found: dict[tuple[int, ...], float] = {}
    for token in range(TINY.mask_id):
        found |= tree(model, (*x[:at], token, *x[at + 1 :]), chance * float(table[at, token]))
    return found


def test_each_likelihood_is_that_of_the_enumerated_choices(exact):
    """Bounded: counts of 2^-42 against a softmax."""
    model, arithmetic = exact
    expected = tree(model, (TINY.mask_id,) * LENGTH, 1.0)
    found = order_likelihood(model, every_sequence(), "confidence", arithmetic=arithmetic)
    chances = {
        tuple(x): math.exp(-nats)
        for x, nats in zip(every_sequence().tolist(), found.per_sequence, strict=True)
    }
    assert chances.keys() == expected.keys()
    assert all(chances[x] == pytest.approx(expected[x], rel=1e-6) for x in expected)
    other = order_likelihood(model, every_sequence()).per_sequence
    assert max(abs(a - b) for a, b in zip(other, found.per_sequence, strict=True)) > 0.1


@pytest.mark.parametrize("per_step", [1, 2])
def test_the_sampler_writes_texts_as_often_as_the_likelihood_says(exact, per_step):
    """Behavioural: chi-square over 81 texts and 1,500 samples; of another order it fails."""
    model, arithmetic = exact
    sampler = Sampler(schedule=Fixed(per_step=per_step), order="entropy")
    start = start_tokens(model, LENGTH, n=1500)
    samples = sample(model, start, sampler, seed=1, arithmetic=arithmetic).final
    laws = [
        order_likelihood(
            model, every_sequence(), order, per_step=per_step, arithmetic=arithmetic
        ).per_sequence
        for order in ("entropy", (3, 2, 1, 0))
    ]
    right, wrong = (excess(samples, torch.tensor(nats, dtype=torch.float64).neg().exp(), 3) for nats in laws)
    assert right < 4.5 < wrong


def test_the_random_order_is_the_one_that_the_sampler_takes(make_model):
    """Bounded by float32: the reveal order of each sample, given as positions, has the same likelihood."""
    model = make_model(TINY)
    trajectory = sample(
        model, start_tokens(model, LENGTH, n=5), Sampler(schedule=Fixed(), order="random"), seed=9
    )
    found = order_likelihood(model, trajectory.final, "random", seed=9)
    for row, nats in enumerate(found.per_sequence):
        positions = tuple(trajectory.revealed_at[row].argsort().tolist())
        alone = order_likelihood(model, trajectory.final[row : row + 1], positions)
        assert nats == pytest.approx(alone.per_sequence[0], abs=1e-5)
        again = order_likelihood(model, trajectory.final[row : row + 1], "random", seed=9, first=row)
        assert again.per_sequence[0] == pytest.approx(nats, abs=1e-5)
    assert len({tuple(row) for row in trajectory.revealed_at.tolist()}) > 1


def test_given_positions_are_conditions_and_not_scored(make_model):
    model = make_model(TINY)
    texts = every_sequence()
    texts = texts[(texts[:, 1] == 2)]
    given = torch.zeros_like(texts, dtype=torch.bool)
    given[:, 1] = True
    found = order_likelihood(model, texts, "margin", given=given)
    assert math.fsum(math.exp(-nats) for nats in found.per_sequence) == pytest.approx(1.0, abs=1e-6)
    assert found.n_tokens == 3 * len(texts)
    assert found.nats_per_token == pytest.approx(sum(found.per_sequence) / found.n_tokens)


def test_batches_change_rounding_only_and_the_error_is_that_of_the_mean(make_model):
    model, texts = make_model(TINY), every_sequence()[::7]
    whole, parts = (order_likelihood(model, texts, batch_size=size) for size in (64, 5))
    assert whole.per_sequence == pytest.approx(parts.per_sequence, abs=1e-5)
    spread = torch.tensor(whole.per_sequence).div(LENGTH).std() / math.sqrt(len(texts))
    assert whole.standard_error == pytest.approx(float(spread), rel=1e-5)
    assert math.isnan(order_likelihood(model, texts[:1]).standard_error)
    assert whole.estimator == "exact likelihood by left_to_right, 1 token a step"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "drawn_confidence"}, "order 'drawn_confidence' looks at the tokens that are drawn"),
        ({"order": (0, 1)}, "the order leaves out position 2, which is masked; name every masked one"),
        ({"per_step": 0}, "per_step and batch_size must be at least 1, got 0 and 32"),
        ({"x_0": torch.tensor([[0, 3, 1, 1]])}, "token 3 is the mask; score text without masks"),
        ({"given": torch.ones(1, 4, dtype=torch.bool)}, "leave some to score, got [1, 4]"),
    ],
)
def test_what_has_no_likelihood_is_refused(make_model, unchecked, arguments, message):
    with pytest.raises(DataError, match=re.escape(message)):
        order_likelihood(make_model(TINY), **{"x_0": torch.tensor([[0, 2, 1, 1]]), **arguments})
    with pytest.raises(ConfigError, match="order: 'lr' is not a choice; known: 'confidence'"):
        order_likelihood(make_model(TINY), torch.tensor([[0, 2, 1, 1]]), "lr")  # type: ignore[arg-type]
