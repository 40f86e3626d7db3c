"""Error terms give the target to the bit, and the model with them; a rounded difference does not."""

import math
from dataclasses import replace

import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.arithmetic import NativeArithmetic
from oracle import Oracle
from transcoder import CrossLayerTranscoder, ReplacementModel
from transcoder.data import store_normalisation
from transcoder.error_terms import ErrorTerm, two_sum
from transcoder.eval_error_terms import NATIVE_BOUND, check_error_terms


def any_floats(count, seed, dtype):
    """Finite numbers of every exponent that leaves room for a sum, subnormals too; bits drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).int()
        values = bits.view(torch.float32)
        return torch.where(values.isfinite(), values, 1.0)
    mantissa = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    return mantissa * 2.0 ** torch.randint(-900, 900, (count,), generator=generator).double()


def close_floats(count, seed, dtype):
    """Pairs whose sizes are alike up to a few dozen binades, where the rounding is."""
    generator = torch.Generator().manual_seed(seed)
    y, y_hat = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = 2.0 ** torch.randint(-70, 70, (count,), generator=generator).double()
    return (y * scale).to(dtype), y_hat.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_target_comes_back_to_the_bit(dtype):
    count = 200_000
    pairs = [
        (any_floats(count, 1, dtype), any_floats(count, 2, dtype)),
        close_floats(count, 3, dtype),
        (any_floats(count, 4, dtype), torch.zeros(count, dtype=dtype)),
        (torch.zeros(count, dtype=dtype), any_floats(count, 5, dtype)),
    ]
    for y, y_hat in pairs:
        restored = ErrorTerm.between(y, y_hat).added_to(y_hat)
        assert restored.dtype == dtype
        assert torch.equal(restored, y)


def test_a_rounded_difference_does_not_give_it_back():
    for dtype in (torch.float32, torch.float64):
        y, y_hat = close_floats(10_000, 3, dtype)
        assert not torch.equal(y_hat + (y - y_hat), y)
    y, y_hat = torch.tensor([1e-12]), torch.tensor([1.5])
    # One float64 is not enough either, when the sizes are far apart.
    assert (y_hat.double() + (y.double() - y_hat.double())).float() != y
    assert ErrorTerm.between(y, y_hat).low is not None


def test_two_sum_loses_nothing():
    a, b = any_floats(50_000, 6, torch.float64), any_floats(50_000, 7, torch.float64)
    total, rest = two_sum(a, b)
    assert torch.equal(total, a + b)
    for number in range(200):
        exact = math.fsum([float(a[number]), float(b[number]), -float(total[number])])
        assert exact == float(rest[number])


@pytest.fixture(params=["trained", "untrained", "relu"])
def transcoder(request, store, trained):
    """The trained one, one of random weights, and one that changes continuously with its input."""
    if request.param == "trained":
        return trained.requires_grad_(False)
    shape = trained.config
    if request.param == "relu":
        shape = replace(shape, activation="relu", k=None, skip=True)
    norms = [store_normalisation(store, hooks) for hooks in (shape.input_hooks, shape.output_hooks)]
    made = CrossLayerTranscoder(shape, *norms, seed=8).requires_grad_(False)
    if made.W_skip is not None:
        made.W_skip.add_(0.1 * torch.randn(made.W_skip.shape, generator=torch.Generator().manual_seed(9)))
    return made


def test_with_error_terms_the_model_comes_back_natively_and_under_the_oracle(model, transcoder, ids, sigma):
    check = check_error_terms(ReplacementModel(model, transcoder, check=False), ids, sigma)
    assert check.n_logits == 2 * 24 * model.config.vocab_size
    assert check.oracle_differing == 0
    assert check.native_difference <= NATIVE_BOUND
    assert check.holds
    assert check.undefined is None
    assert check.without_difference > 0.01


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [0], [1, 2]])
def test_under_the_oracle_the_logits_are_bit_for_bit_the_models(model, transcoder, ids, sigma, layers):
    oracle = Oracle(model)
    replacement = ReplacementModel(oracle.model, transcoder, check=False)
    restored = replacement(ids, sigma, layers=layers, error_terms=True)
    assert torch.equal(restored.view(torch.int32), oracle.logits(ids, sigma).view(torch.int32))
    assert not torch.equal(replacement(ids, sigma, layers=layers), oracle.logits(ids, sigma))


def test_error_terms_of_another_input_are_told(model, trained, ids, sigma, monkeypatch):
    replacement = ReplacementModel(model, trained.requires_grad_(False))
    original = ReplacementModel.error_terms
    monkeypatch.setattr(
        ReplacementModel, "error_terms", lambda self, ids, sigma: original(self, ids.flip(1), sigma)
    )
    check = check_error_terms(replacement, ids, sigma)
    assert check.oracle_differing
    assert check.native_difference > NATIVE_BOUND
    assert not check.within_bound
    assert not check.holds


@torch.no_grad()
@pytest.mark.parametrize("transcoder", ["relu"], indirect=True)
def test_rounding_elsewhere_stays_within_the_stated_bound(model_directory, model, transcoder, ids, sigma):
    plain = HookedMDLM.from_pretrained(model_directory, arithmetic=NativeArithmetic(fused_attention=False))
    expected = model(ids, sigma)
    terms = ReplacementModel(model, transcoder, check=False).error_terms(ids, sigma)
    other = ReplacementModel(plain, transcoder, check=False)
    with other.spliced(errors=terms):
        found = plain(ids, sigma)
    assert not torch.equal(found, expected)  # it does round elsewhere
    share = float((found - expected).abs().max() / expected.square().mean().sqrt())
    # Each rounding of float32 is 6e-8; three blocks carry it on.
    assert share <= NATIVE_BOUND


def test_the_oracle_is_not_asked_about_a_float64_model(model_directory, trained, ids, sigma):
    exact = HookedMDLM.from_pretrained(model_directory, dtype=torch.float64)
    replacement = ReplacementModel(exact, trained.double().requires_grad_(False))
    check = check_error_terms(replacement, ids, sigma.double())
    assert check.oracle_differing is None
    assert check.undefined == "exact arithmetic is defined for float32, the model is torch.float64"
    assert check.native_differing == 0
