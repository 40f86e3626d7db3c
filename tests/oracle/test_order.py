"""Nothing that should not matter does: order of terms, layout, batch, neighbours, length. Every claim is exact."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mdlm_interp.model import HookedMDLM
from oracle import Oracle, attention, golden, ops
from tests.oracle import exact_reference as reference
from tests.oracle.exact_reference import same_bits

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33)


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = reference.draw(1, (33, 300), -4, 4)
    x[:, ::41] *= 900.0
    return x, reference.draw(2, (50, 300), -6, 0), reference.draw(3, (50,))


def test_the_order_of_the_terms_does_not_matter(path):
    x, weight, bias = matrices()
    whole = ops.linear(x, weight, bias)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert same_bits(ops.linear(x[:, order], weight[:, order], bias), whole)
    assert same_bits(ops.linear(x.flip(1), weight.flip(1), bias), whole)
    # The control: the native product sees the order.
    assert not same_bits(
        functional.linear(x[:, order], weight[:, order], bias), functional.linear(x, weight, bias)
    )


def test_padding_and_splitting_of_terms_do_not_matter(path):
    x, weight, bias = matrices()
    whole = ops.linear(x, weight, bias)
    padded = functional.pad(x, (5, 700)), functional.pad(weight, (5, 700))
    assert same_bits(ops.linear(*padded, bias), whole)
    # Every term cut into two that add up to it exactly: the exact sum is the same.
    high = (x.view(torch.int32) & -4096).view(torch.float32)
    split = torch.cat((high, x - high), 1)
    assert torch.equal(high.double() + (x - high).double(), x.double())
    assert same_bits(ops.linear(split, torch.cat((weight, weight), 1), bias), whole)


def test_layout_in_memory_does_not_matter(path):
    x, weight, bias = matrices()
    whole = ops.linear(x, weight, bias)
    for y in (x.T.contiguous().T, functional.pad(x, (3, 4))[:, 3:-4], torch.stack((-x, x), -1)[..., 1]):
        for w in (weight, weight.T.contiguous().T, torch.stack((weight, -weight), -1)[..., 0]):
            assert same_bits(ops.linear(y, w, bias), whole)
    assert same_bits(ops.matmul(x, weight.T), ops.linear(x, weight))
    assert same_bits(ops.matmul(weight, x.T).T, ops.linear(x, weight))


@pytest.mark.parametrize("rows", BATCHES)
def test_a_row_has_the_same_bits_in_any_batch(rows, path):
    x, weight, bias = matrices()
    whole = ops.linear(x, weight, bias)
    chosen = torch.randperm(33, generator=torch.Generator().manual_seed(rows))[:rows]
    assert same_bits(ops.linear(x[chosen], weight, bias), whole[chosen])


def test_attention_does_not_depend_on_how_it_is_cut(path, monkeypatch):
    q, k, v = (reference.draw(seed, (3, 21, 2, 8), -3, 2) for seed in (1, 2, 3))
    whole = ops.attention(q, k, v)
    assert same_bits(ops.mix(ops.softmax(ops.attention_scores(q, k)), v), whole)
    for limit in (1, 50, 500, 10**6):
        monkeypatch.setitem(attention.ATTENTION_TILE, "cpu", limit)
        assert same_bits(ops.attention(q, k, v), whole)
    assert same_bits(ops.attention(q[1:2, 4:5], k[1:2], v[1:2]), whole[1:2, 4:5])
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    assert same_bits(ops.attention(q, k[:, order], v[:, order]), whole)
    assert same_bits(ops.attention(q[:, :, [1, 0]], k[:, :, [1, 0]], v[:, :, [1, 0]]), whole[:, :, [1, 0]])


@pytest.fixture(scope="module")
def many(synthetic) -> tuple[Oracle, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle, 33 sequences of 12 tokens, noise levels, and their logits in one batch."""
    ids = torch.randint(0, 61, (33, 12), generator=torch.Generator().manual_seed(4))
    sigma = torch.linspace(0.01, 6.0, 33)
    oracle = Oracle(synthetic)
    return oracle, ids, sigma, oracle.logits(ids, sigma)


@pytest.mark.parametrize("rows", BATCHES)
def test_a_sequence_has_the_same_bits_in_any_batch(rows, many, path):
    oracle, ids, sigma, whole = many
    chosen = torch.randperm(33, generator=torch.Generator().manual_seed(100 + rows))[:rows]
    assert same_bits(oracle.logits(ids[chosen], sigma[chosen]), whole[chosen])


def test_the_native_forward_fails_the_same_test(many, synthetic):
    """The control of this file."""
    _, ids, sigma, _ = many
    with torch.no_grad():
        whole = synthetic(ids, sigma)
        assert any(
            not same_bits(synthetic(ids[i : i + 1], sigma[i : i + 1]), whole[i : i + 1]) for i in range(8)
        )


def test_other_sequences_in_the_batch_do_not_matter(many):
    oracle, ids, sigma, whole = many
    others = ids[:3].clone()
    others[1:] = 60 - others[1:]
    found = oracle.logits(others, torch.stack((sigma[0], sigma[5], sigma[9])))
    assert same_bits(found[:1], whole[:1])


@pytest.mark.parametrize("length", [1, 2, 7, 16, 31])
def test_hooked_and_unhooked_passes_agree_at_any_length(length, synthetic, path):
    """With a listener the attention is computed in steps, without in one go."""
    oracle = Oracle(synthetic)
    ids = torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(length))
    sigma = torch.tensor([0.5, 1.5])
    logits, cache = oracle.run_with_cache(ids, timesteps=sigma)
    assert tuple(cache) == oracle.hook_names
    assert same_bits(logits, oracle.logits(ids, sigma))
    assert same_bits(logits, cache["hook_logits"])


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads_do_not_matter(threads, monkeypatch, path):
    from oracle import threads as sharing

    monkeypatch.setattr(sharing, "WORTH_A_THREAD", 8)
    oracle, (ids, sigma) = Oracle(golden.synthetic_model()), golden.synthetic_inputs()
    alone = oracle.fingerprint(ids, timesteps=sigma)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert oracle.fingerprint(ids, timesteps=sigma) == alone
    finally:
        torch.set_num_threads(before)


def test_freezing_a_scale_at_its_own_value_changes_nothing(oracle, inputs):
    ids, sigma = inputs
    name = "blocks.1.ln2.hook_scale"
    logits, cache = oracle.run_with_cache(ids, name, timesteps=sigma)
    kept = cache[name].clone()
    changed = kept.clone()
    changed[0, 0] *= 2

    with oracle.hooks({name: lambda scale, hook: changed}):
        edited = oracle.logits(ids, sigma)
    assert same_bits(edited[1], logits[1])
    assert not same_bits(edited[0], logits[0])
    with oracle.hooks({name: lambda scale, hook: kept}):
        assert same_bits(oracle.logits(ids, sigma), logits)


def test_a_model_built_on_native_arithmetic_is_left_alone(synthetic, inputs):
    ids, sigma = inputs
    with torch.no_grad():
        before = synthetic(ids, sigma)
    Oracle(synthetic).logits(ids, sigma)
    with torch.no_grad():
        assert isinstance(synthetic, HookedMDLM)
        assert same_bits(synthetic(ids, sigma), before)
