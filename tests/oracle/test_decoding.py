"""Exact decoding: any sampler gives the same bits in any batch and by any threads, and those of the witness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mdlm_interp.decoding import (
    Ancestral,
    Draw,
    DrawArithmetic,
    Even,
    FirstHitting,
    Fixed,
    ReMDM,
    Rewrite,
    Sampler,
    Threshold,
    Trajectory,
)
from mdlm_interp.errors import ConfigError
from oracle import ExactDraws, ExactError, exact_sample, exact_trajectory, golden, witness_sampling
from oracle.decoding import natural_log
from oracle.witness_forward import forward

MASK = golden.SYNTHETIC_CONFIG.mask_id
LENGTH = 7

SAMPLERS = {
    "ancestral": Sampler(schedule=Ancestral(steps=4)),
    "first hitting": Sampler(schedule=FirstHitting()),
    "top-k, top-p": Sampler(schedule=Fixed(per_step=2), draw=Draw(temperature=0.6, top_k=9, top_p=0.8)),
    "entropy": Sampler(schedule=Even(steps=3), order="entropy"),
    "margin in blocks": Sampler(schedule=Even(steps=2), order="margin", block_length=4),
    "threshold": Sampler(schedule=Threshold(probability=0.2)),
    "analytic": Sampler(schedule=Ancestral(steps=4, end=1e-5, joint=True)),
    "remdm conf": Sampler(schedule=ReMDM(grid=Ancestral(steps=4), strategy="conf", eta=1.0)),
    "rewriting": Sampler(schedule=Rewrite(steps=3, per_step=2)),
    "guidance": Sampler(schedule=Even(steps=3), guidance=0.5),
}


@pytest.fixture
def start() -> Tensor:
    start = torch.full((2, LENGTH), MASK)
    start[1, 3:5] = torch.tensor([5, 6])
    return start


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(trajectory: Trajectory, row: int, steps: int) -> list[bytes]:
    """What is exact of one sequence, as bytes."""
    tensors = (
        trajectory.states[: steps + 1, row],
        trajectory.revealed_at[row],
        trajectory.confidence[:steps, row],
        trajectory.entropy[:steps, row],
    )
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


def test_exact_draws_are_a_draw_arithmetic():
    assert isinstance(ExactDraws(), DrawArithmetic)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ancestral_decoding_is_spec_s_reverse_process(oracle, start, temperature):
    expected = exact_sample(oracle, start, steps=4, seed=3, temperature=temperature, indices=[4, 7])
    sampler = Sampler(schedule=Ancestral(steps=4), draw=Draw(temperature=temperature))
    found = exact_trajectory(oracle, start, sampler, seed=3, indices=[4, 7])
    assert torch.equal(found.final, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_the_same_bits_for_any_batch_and_threads(oracle, start, threads, name):
    """Exact, confidence and entropy included: float32's last bits would differ."""
    together = exact_trajectory(oracle, start, SAMPLERS[name], seed=2)
    for number in (1, 2):
        torch.set_num_threads(number)
        for row in range(2):
            alone = exact_trajectory(oracle, start[row : row + 1], SAMPLERS[name], seed=2, indices=[row])
            assert bits(alone, 0, alone.n_steps) == bits(together, row, alone.n_steps)
            assert torch.equal(together.final[row], alone.final[0])
    other = exact_trajectory(oracle, start, SAMPLERS[name], seed=4)
    assert not torch.equal(other.final, together.final)


def exact_log(x: float) -> float:
    """LN as the docstring of `natural_log` has it, in Python's own floats."""
    mantissa, exponent = math.frexp(x)
    mantissa, exponent = mantissa * 2, exponent - 1
    if mantissa > float.fromhex("0x1.6a09e667f3bcdp+0"):
        mantissa, exponent = mantissa / 2, exponent + 1
    s = (mantissa - 1) / (mantissa + 1)
    z, p = s * s, 2.0 / 25
    for k in range(11, -1, -1):
        p = p * z + 2.0 / (2 * k + 1)
    return exponent * float.fromhex("0x1.62e42fefa39efp-1") + s * p


def exact_entropy(weights: Sequence[int]) -> float:
    total = sum(weights)
    units = [
        round(float(w) / float(total) * (exact_log(float(total)) - exact_log(float(w))) * 2.0**50)
        for w in weights
        if w
    ]
    return float(sum(units)) * 2.0**-50


def greedy_witness(
    weights: dict[str, np.ndarray], start: Sequence[int], *, seed: int, sequence: int, by: str
) -> list[list[int]]:
    """Every state of one token a step in an order by confidence or entropy, from the witness's forward pass."""
    x, states = list(start), [list(start)]
    for step in range(len(start)):
        masked = [p for p in range(len(x)) if x[p] == MASK]
        if not masked:
            break
        sigma = np.array([witness_sampling.sigma_of(len(masked), len(x))], dtype=np.float32)
        logits = forward(weights, golden.SYNTHETIC_CONFIG, np.array([x]), sigma)[0][0]
        words = witness_sampling.words_of(seed, f"token:{step}", sequence, len(x))
        rows = {p: witness_sampling.draw_weights(logits[p], MASK, 1.0) for p in masked}
        score = {
            p: max(row) / sum(row) if by == "confidence" else -exact_entropy(row) for p, row in rows.items()
        }
        first = min(masked, key=lambda p: (-score[p], p))
        x[first] = witness_sampling.draw(logits[first], MASK, 1.0, words[first])
        states.append(list(x))
    return states


@pytest.mark.parametrize("by", ["confidence", "entropy"])
def test_an_order_by_what_the_model_says_is_the_witness_s(synthetic, oracle, by):
    """Exact: state by state, against the independent implementation of SPEC and a sampler written out."""
    start = torch.tensor([[MASK, 5, MASK, MASK]])
    found = exact_trajectory(oracle, start, Sampler(schedule=Fixed(), order=by), seed=5, indices=[3])
    weights = {name: tensor.numpy() for name, tensor in synthetic.state_dict().items()}
    expected = greedy_witness(weights, start[0].tolist(), seed=5, sequence=3, by=by)
    assert found.states[:, 0].tolist() == expected
    assert found.revealed_at[0].tolist() != [0, -1, 1, 2]  # from left to right, the order would not matter


def test_the_entropy_is_its_recipe_and_close_to_the_true_one():
    """Exact against Python's floats; bounded by what its docstring allows."""
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * 6
    weights = ExactDraws().weights(logits, 1.0)
    weights[:, 7] = 0
    found = ExactDraws().entropy(weights).tolist()
    assert found == [exact_entropy(row) for row in weights.tolist()]
    for row, value in zip(weights.tolist(), found, strict=True):
        total = sum(row)
        true = -math.fsum(w / total * math.log(w / total) for w in row if w)
        assert abs(value - true) < 2.0**-45 + 60 * 2.0**-51
    assert ExactDraws().entropy(torch.tensor([[0, 5, 0], [3, 3, 0]])).tolist() == [
        0.0,
        pytest.approx(math.log(2)),
    ]


def test_the_logarithm_is_its_recipe_and_close_to_the_true_one():
    x = torch.cat([torch.arange(1, 3000), 2 ** torch.arange(62), 3 * 2 ** torch.arange(60)]).double()
    found = natural_log(x).tolist()
    assert found == [exact_log(value) for value in x.tolist()]
    assert max(abs(a - math.log(b)) for a, b in zip(found, x.tolist(), strict=True)) < 2.0**-46


def test_a_draw_between_two_counts_is_decided_by_integers():
    """Exact: the first word that belongs to the second of two equal tokens is half of all words."""
    weights = ExactDraws().weights(torch.zeros(2, 2), 1.0)
    words = np.array([2**63 - 1, 2**63], np.uint64)
    assert ExactDraws().pick(weights, words).tolist() == [0, 1]


def test_a_noise_level_that_is_no_defined_number_is_refused(oracle, start):
    with pytest.raises(ConfigError, match=r"sampler\.sigma must be 'share' for an exact draw .* got 'time'"):
        exact_trajectory(oracle, start, Sampler(sigma="time"))


def test_logits_that_a_hook_spoils_are_not_drawn_from(oracle, start):
    with (
        oracle.hooks({"hook_logits": lambda logits, hook: logits * float("nan")}),
        pytest.raises(ExactError, match=r"counts: logits is not finite at \[0, 0\]"),
    ):
        exact_trajectory(oracle, start)
