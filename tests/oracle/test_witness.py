"""The witness itself: its rounding against rationals, its forward against float64, and what it refuses.

Exact: the products, the integer functions, the rows of a batch. Bounded: the golden logits, which upstream
computed in float64 from the same weights.
"""

from __future__ import annotations

import ast
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import CheckpointError, DataError, HookError, MdlmError
from mdlm_interp.model import all_hook_names
from mdlm_interp.randomness import random_bits
from oracle import witness, witness_forward, witness_rounding, witness_sampling

DIRECTORY = Path(__file__).parents[1] / "golden"

BOUND = 5e-6
"""Of the logits against float64: twice what was measured, and below upstream's own float32 error, 7e-6."""


class Golden:
    """One golden file."""

    def __init__(self, name: str) -> None:
        stored = json.loads((DIRECTORY / f"{name}.json").read_text("utf-8"))
        self.config = MDLMConfig.from_mapping(stored["config"], source=name)
        self.tensors = load_file(DIRECTORY / f"{name}.safetensors")
        self.weights = {key: value for key, value in self.tensors.items() if key.startswith("backbone.")}
        self.ids, self.sigma = self.tensors["in.short_input_ids"], self.tensors["in.timesteps"]

    def forward(self, rows: slice = slice(None), edits: witness_forward.Edits | None = None):
        return witness_forward.forward(
            self.weights, self.config, self.ids[rows], self.sigma[rows], edits=edits
        )


@pytest.fixture(scope="module", params=["mdlm_tiny_a", "mdlm_tiny_b"])
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def timed() -> Golden:
    """The time-conditioned one."""
    return Golden("mdlm_tiny_b")


# The definition of a product


def nearest_by_distance(value: Fraction) -> np.float32:
    """The binary32 nearest to a rational, by trying the neighbours of a guess."""
    guess = np.float32(float(value))
    around = [guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))]
    best = min(around, key=lambda v: (abs(Fraction(float(v)) - value), int(v.view(np.int32)) & 1))
    return np.float32(0) if best == 0 else best


@pytest.mark.parametrize("exponents", [(-3, 3), (-149, -60), (-70, 60), (-120, 60)], ids=str)
@pytest.mark.parametrize("kind", ["any", "powers of two", "cancelling"])
def test_linear_is_the_nearest_float32_to_the_rational_sum(exponents, kind):
    low, high = exponents
    random = np.random.default_rng([-low, high + 200])
    for n in range(1, 9):

        def numbers(*shape):
            drawn = random.standard_normal(shape) * 2.0 ** random.integers(low, high, shape)
            if kind == "powers of two":  # sums of these are often ties
                drawn = np.sign(drawn) * 2.0 ** random.integers(low, high, shape)
            return drawn.astype(np.float32)

        x, weight, bias = numbers(3, n), numbers(4, n), numbers(4)
        if kind == "cancelling":
            x, weight = np.hstack([x, -x, x[:, :1]]), np.hstack([weight, weight, numbers(4, 1)])
        found = witness.linear(x, weight, bias)
        for i, j in np.ndindex(3, 4):
            terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x[i], weight[j], strict=True)]
            exact = sum(terms, Fraction(float(bias[j])))
            assert found[i, j].tobytes() == nearest_by_distance(exact).tobytes()


# Integer functions against a library of many digits


def test_integer_functions_agree_with_mpmath():
    mp = pytest.importorskip("mpmath")
    random = np.random.default_rng(0)
    with mp.workprec(1000):

        def nearest(value) -> float:
            low = witness_rounding.dyadic(float(value))
            rest = value - mp.mpf(float(value))
            scaled = (low[0] << 900) + int(mp.floor(mp.ldexp(rest, 900 - low[1])))
            return witness_rounding.nearest32((2 * scaled + 1, low[1] - 901))

        for _ in range(300):
            n = int(random.integers(1, 2**60)) * int(random.choice([-1, 1]))
            angle = (n, int(random.integers(-180, 60)))
            real = mp.ldexp(mp.mpf(n), angle[1])
            assert witness_rounding.cos_sin32(angle) == (nearest(mp.cos(real)), nearest(mp.sin(real)))
        for length in (3, 48):
            for masked in range(1, length + 1):
                real = -mp.log(1 - mp.mpf(999 * masked) / (1000 * length))
                assert witness_sampling.sigma_of(masked, length) == nearest(real)
        for half in (3, 128):
            expected = tuple(float(mp.power(10_000, -mp.mpf(k) / half)) for k in range(half))
            assert witness_rounding.time_frequencies(half) == expected
        for d_head in range(1, 200):
            assert witness_rounding.reciprocal_sqrt(d_head) == float(1 / mp.sqrt(d_head))


@pytest.mark.parametrize("exponent", [-149, -75, -14, -13, -12])
def test_the_sine_of_an_angle_between_two_floats_falls_below_it(exponent):
    tie = (2**25 + 1, exponent - 24)  # a sine is nearer to the lower neighbour, if only in the 300th bit
    below = witness_rounding.nearest32((2**25, exponent - 24))
    assert witness_rounding.cos_sin32(tie)[1] <= below
    if exponent in (-149, -75):
        assert witness_rounding.cos_sin32(tie)[1] == below


# The forward pass


def test_golden_logits_lie_within_the_bound_of_float64(golden):
    logits, activations = golden.forward()
    assert list(activations) == all_hook_names(golden.config.n_blocks)
    assert np.abs(logits - golden.tensors["out.short_logits_fp64"]).max() < BOUND
    assert all(value.dtype == np.float32 for value in activations.values())


@pytest.mark.slow
def test_golden_logits_at_full_length_lie_within_the_bound(golden):
    logits, _ = witness_forward.forward(
        golden.weights, golden.config, golden.tensors["in.input_ids"], golden.sigma
    )
    assert np.abs(logits - golden.tensors["out.logits_fp64"]).max() < BOUND


def test_a_row_alone_has_the_bits_it_has_in_a_batch(timed):
    _, together = timed.forward()
    _, alone = timed.forward(slice(1, 2))
    assert [name for name in alone if alone[name].tobytes() != together[name][1:2].tobytes()] == []


def test_edits_reach_all_that_follows_and_nothing_before(timed):
    one = slice(0, 1)
    logits, before = timed.forward(one)
    at = "blocks.1.ln1.hook_scale"
    same, after = timed.forward(one, {at: lambda scale: scale})
    assert witness_forward.fingerprint(after, same) == witness_forward.fingerprint(before, logits)
    _, after = timed.forward(one, {at: lambda scale: scale * np.float32(2)})
    changed = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert changed[:2] == [at, "blocks.1.ln1.hook_normalized"]
    assert changed[-1] == "hook_logits"


def test_a_copied_minus_zero_stays_and_a_computed_one_does_not(timed):
    def minus_zero(value):
        return np.full_like(value, -0.0)

    _, activations = timed.forward(slice(0, 1), {"hook_embed": minus_zero})
    assert np.signbit(activations["blocks.0.hook_resid_pre"]).all()
    zero = np.full(1, -0.0, np.float32)
    for result in (witness.add(zero, zero), witness.mul(zero, -zero), witness.silu(zero)):
        assert not np.signbit(result).any()


def test_a_fingerprint_covers_names_shapes_and_bits():
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    logits = np.zeros((1, 1), np.float32)
    original = witness_forward.fingerprint({"a": x}, logits)
    others = [{"b": x}, {"a": x.reshape(1, 3, 2)}, {"a": np.where(x == 0, np.float32(-0.0), x)}]
    assert all(witness_forward.fingerprint(other, logits) != original for other in others)
    assert witness_forward.fingerprint({"a": np.asfortranarray(x)}, logits) == original


# Sampling


def test_the_reverse_process_reveals_everything_and_keeps_what_was_given(timed):
    mask = timed.config.mask_id
    ids = np.array([mask, 3, mask, 5, mask, mask])
    for temperature in (1.0, 0.0):
        drawn = witness_sampling.reverse_process(
            timed.weights, timed.config, ids, n_steps=3, seed=7, temperature=temperature
        )
        assert list(drawn[[1, 3]]) == [3, 5]
        assert mask not in drawn


def test_a_draw_never_takes_the_excluded_token():
    logits = np.array([1.0, 5.0, 5.0, 9.0], np.float32)
    assert witness_sampling.draw(logits, 3, 0.0, 0) == 1
    assert witness_sampling.draw(logits, 1, 0.0, 0) == 3
    assert witness_sampling.draw(logits, 3, 1e-300, 2**64 - 1) == 2  # an overflowing quotient is weight 0
    assert witness_sampling.draw_weights(logits, 3, 1.0)[3] == 0


# Refusals


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("operation", [witness.softmax, witness.silu, witness.gelu_tanh])
def test_what_is_not_finite_is_refused(operation, bad):
    with pytest.raises(DataError, match="finite numbers, got an infinity or NaN"):
        operation(np.array([0.0, bad], np.float32))


def test_a_result_beyond_float32_is_refused_and_the_largest_is_not():
    largest = np.array([np.finfo(np.float32).max], np.float32)
    half_a_step, less = (np.array([2.0**e], np.float32) for e in (103, 102))
    assert witness.add(largest, less) == largest
    assert witness.linear(largest, np.ones((1, 1), np.float32), less) == largest
    with pytest.raises(DataError, match="is no float32"):
        witness.add(largest, half_a_step)
    with pytest.raises(DataError, match="is no float32"):
        witness.linear(largest, np.ones((1, 1), np.float32), half_a_step)


def test_flushing_subnormals_is_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(MdlmError, match="flushes subnormal numbers to zero"):
            witness.silu(np.ones(1, np.float32))
    finally:
        torch.set_flush_denormal(False)


def test_mistakes_of_the_caller_are_named(timed):
    with pytest.raises(HookError, match=r"no hook point is named 'hook_logit'; did you mean 'hook_logits'"):
        timed.forward(slice(0, 1), {"hook_logit": lambda value: value})
    with pytest.raises(HookError, match=r"the edit of hook_embed returned float64 .* expected float32"):
        timed.forward(slice(0, 1), {"hook_embed": lambda value: value.astype(np.float64)})
    with pytest.raises(DataError, match="this model is time-conditioned: pass 3 sigmas"):
        witness_forward.forward(timed.weights, timed.config, timed.ids)
    with pytest.raises(DataError, match=r"token ids must be in \[0, 61\)"):
        witness_forward.forward(timed.weights, timed.config, timed.ids + 61, timed.sigma)
    less = {name: value for name, value in timed.weights.items() if not name.endswith("inv_freq")}
    with pytest.raises(CheckpointError, match=r"the weights lack 'backbone.rotary_emb.inv_freq'"):
        witness_forward.forward(less, timed.config, timed.ids, timed.sigma)


def test_operands_that_do_not_fit_are_refused_and_not_cut(unchecked):
    ones = np.ones
    for call in (
        lambda: witness.linear(ones((2, 3), "f4"), ones((4, 3), "f4"), ones(5, "f4")),
        lambda: witness.linear(ones((2, 3), "f4"), ones((4, 2), "f4")),
        lambda: witness.attention_scores(ones((1, 3, 2, 4), "f4"), ones((2, 3, 2, 4), "f4")),
        lambda: witness.attention_scores(ones((1, 3, 2, 4), "f4"), ones((1, 3, 4, 4), "f4")),
        lambda: witness.mix(ones((1, 2, 3, 4), "f4"), ones((2, 4, 2, 4), "f4")),
        lambda: witness.mix(ones((1, 2, 3, 4), "f4"), ones((1, 5, 2, 4), "f4")),
        lambda: witness.layer_norm(ones((2, 3), "f4"), ones(1, "f4")),
        lambda: witness.layer_norm(ones((2, 3), "f4"), ones(3, "f4"), ones((1, 1), "f4")),
        lambda: witness.rotate(ones((1, 4, 1, 4), "f4"), ones((1, 2), "f4"), ones((1, 2), "f4")),
        lambda: witness.rotate(ones((1, 4, 1, 5), "f4"), ones((4, 2), "f4"), ones((4, 2), "f4")),
        lambda: witness.rotate(ones((1, 4, 1, 4), "f4"), ones((4, 2), "f4"), ones((4, 1), "f4")),
    ):
        with pytest.raises(
            DataError, match=r"axes that belong together must have one size, got .*; slice or"
        ):
            call()


# Independence


WITNESSES = sorted(Path(witness.__file__).parent.glob("witness*.py"))
SHARED = {
    "mdlm_interp.config": "the fields of a configuration",
    "mdlm_interp.errors": "classes of errors, and the nearest of some names",
    "mdlm_interp.shapes": "annotations",
}
"""What a witness may have in common with the engine: nothing that computes a number."""


def imported(path: Path) -> set[str]:
    """The modules that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found |= (
                {f"oracle.{alias.name}" for alias in node.names} if node.module == "oracle" else {node.module}
            )
    return found


@pytest.mark.parametrize("path", WITNESSES, ids=lambda path: path.stem)
def test_the_witness_shares_no_code_with_the_engine(path):
    own = {f"oracle.{other.stem}" for other in WITNESSES}
    ours = {name for name in imported(path) if name.partition(".")[0] in ("oracle", "mdlm_interp", "torch")}
    assert ours <= own | set(SHARED)


def test_the_engine_and_the_network_do_not_use_the_witness():
    """Only the verification of golden files does, where it is asked for."""
    directory = Path(witness.__file__).parent
    users = {
        path.stem
        for path in set(directory.glob("*.py")) - set(WITNESSES)
        if any(name.startswith("oracle.witness") for name in imported(path))
    }
    assert users == {"golden"}


def test_the_words_are_numpy_s_generator_s():
    """Exact: the witness's own Philox against the one that the engine draws from, at both ends of the ranges."""
    for seed, sequence in ((0, 0), (7, 3), (2**64 - 1, 2**63 - 1), (2**63, 1)):
        for count in (0, 1, 4, 5, 33):
            found = witness_sampling.words_of(seed, "reveal:0", sequence, count)
            assert found == random_bits(seed, "reveal:0", sequence, count).tolist()
    assert witness_sampling.words_of(7, "reveal:0", 3, 5) == [  # as SPEC prints them
        9019011590072474441,
        10821194509470595814,
        16883392119412148541,
        10693802229062600221,
        3461126097362305359,
    ]
