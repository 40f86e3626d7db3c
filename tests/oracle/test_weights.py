"""Kept float64 copies of weights: within the budget, and never stale. Every claim is exact."""

from __future__ import annotations

import gc

import pytest
import torch

from oracle import ops
from oracle.weights import WeightCache, checksum
from tests.oracle.exact_reference import draw, same_bits


def test_a_kept_copy_is_used_and_changes_nothing(monkeypatch, path):
    cache, x, weight = WeightCache(), draw(1, (5, 40)), draw(2, (30, 40))
    first = ops.linear(x, weight, cache=cache)
    assert cache.used_bytes == 8 * weight.numel()
    monkeypatch.setattr("oracle.weights.as_rows", None)
    assert same_bits(ops.linear(x, weight, cache=cache), first)
    monkeypatch.undo()
    assert same_bits(ops.linear(x, weight), first)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.add_(1),
        lambda w: w.numpy().__setitem__((3, 4), 9.0),
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: w.data.copy_(torch.cat((w[2:4], w[:2], w[4:]))),
        lambda w: w.data[-1, -1].neg_(),
    ],
)
def test_any_change_is_noticed_however_it_was_made(change, path):
    cache, x, weight = WeightCache(), draw(1, (3, 41)), draw(2, (31, 41))
    ops.linear(x, weight, cache=cache)
    change(weight)
    assert same_bits(ops.linear(x, weight, cache=cache), ops.linear(x, weight.clone()))


def test_the_checksum_sees_blocks_that_change_places():
    weight = draw(3, (1 << 18,))
    swapped = torch.cat((weight[1 << 16 : 1 << 17], weight[: 1 << 16], weight[1 << 17 :]))
    assert checksum(weight) != checksum(swapped)
    assert checksum(weight) == checksum(weight.clone())


def test_the_budget_holds_and_what_is_gone_is_forgotten():
    x = draw(1, (3, 16))
    weights = [draw(seed, (10, 16)) for seed in range(2, 6)]
    cache = WeightCache(2 * 8 * 160 + 5)
    results = [ops.linear(x, weight, cache=cache) for weight in weights]
    assert cache.used_bytes == 2 * 8 * 160
    for weight, result in zip(weights, results, strict=True):
        assert same_bits(ops.linear(x, weight, cache=cache), result)
    del weight, weights
    gc.collect()
    assert cache.used_bytes == 0
    nothing = WeightCache(0)
    ops.linear(x, draw(9, (10, 16)), cache=nothing)
    assert nothing.used_bytes == 0


def test_a_transposed_weight_is_computed_without_being_kept(path):
    cache, x, weight = WeightCache(), draw(1, (3, 16)), draw(2, (16, 10))
    assert same_bits(ops.linear(x, weight.T, cache=cache), ops.linear(x, weight.T.contiguous()))
    assert cache.used_bytes == 0
