"""Penalties against their formulas in float64; all are per token, whatever the batch size."""

import pytest
import torch

from transcoder.activations import topk
from transcoder.config import TrainConfig
from transcoder.losses import auxk_loss, reconstruction_loss
from transcoder.objective import objective
from transcoder.penalties import l1_penalty, tanh_penalty, threshold_penalty, zero_penalty
from transcoder.selection import below
from transcoder.sparse import from_dense


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(1)
    pre_acts = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    norms, thresholds = torch.rand(2, 2, 5, generator=generator, dtype=torch.float64).unbind()
    chosen = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    return pre_acts, norms, thresholds, chosen


def entries(acts):
    return [from_dense(of_layer) for of_layer in acts]


def by_loops(pre_acts, term):
    """Mean over layers and tokens of the sum over features of a term."""
    n_layers, n_rows, n_features = pre_acts.shape
    total = 0.0
    for layer in range(n_layers):
        for row in range(n_rows):
            for feature in range(n_features):
                total += term(layer, feature, pre_acts[layer, row, feature])
    return float(total) / (n_layers * n_rows)


def test_each_penalty_equals_its_formula(case):
    h, norms, thresholds, chosen = case
    acts = h.relu()
    found = tanh_penalty(entries(acts), norms, 4.0)
    expected = by_loops(acts, lambda layer, i, a: torch.tanh(4.0 * norms[layer, i] * a))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    found = l1_penalty(entries(acts), norms)
    assert float(found) == pytest.approx(by_loops(acts, lambda layer, i, a: norms[layer, i] * a), rel=1e-12)
    for which in (None, chosen):
        on = torch.ones_like(chosen) if which is None else which
        found = threshold_penalty(below(h, thresholds, which), thresholds, norms)
        expected = by_loops(
            h, lambda layer, i, v, on=on: on[layer, i] * norms[layer, i] * max(0.0, thresholds[layer, i] - v)
        )
        assert float(found) == pytest.approx(expected, rel=1e-12)
        expected = by_loops(h, lambda layer, i, v, on=on: on[layer, i] * max(0.0, -v))
        assert float(zero_penalty(below(h, torch.zeros_like(norms), which))) == pytest.approx(
            expected, rel=1e-12
        )


def test_penalties_have_the_gradient_of_finite_differences(case):
    h, norms, thresholds, chosen = (tensor.clone() for tensor in case)
    inputs = (h.abs().requires_grad_(), norms.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, n: tanh_penalty(entries(a), n, 4.0), inputs)
    assert torch.autograd.gradcheck(lambda a, n: l1_penalty(entries(a), n), inputs)
    three = (h.requires_grad_(), thresholds.requires_grad_(), norms)
    assert torch.autograd.gradcheck(lambda h, t, n: threshold_penalty(below(h, t, chosen), t, n), three)
    assert torch.autograd.gradcheck(lambda h: zero_penalty(below(h, torch.zeros_like(norms), chosen)), (h,))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sparsity": "tanh"}, ["sparsity"]),
        ({"sparsity": "l1"}, ["sparsity"]),
        ({"pre_act": "threshold", "pre_act_on": "all"}, ["pre_act"]),
        ({"pre_act": "zero", "pre_act_on": "dead"}, ["pre_act"]),
        ({"auxk": 3}, ["auxk"]),
        ({"row_weights": "subs"}, []),
    ],
)
def test_the_whole_loss_of_a_batch_twice_over_is_the_loss_of_the_batch(clt, rows, changes, parts):
    config = TrainConfig(
        sparsity_coefficient=0.1, sparsity_warmup=0.0, pre_act_coefficient=0.1, **{"auxk": None, **changes}
    )
    is_dead = torch.zeros(3, 24, dtype=torch.bool)
    is_dead[:, ::3] = True
    weights = torch.rand(3, 64) if changes.get("row_weights") else None
    once = objective(clt, rows[0], rows[1], config, step=0, is_dead=is_dead, row_weights=weights)
    twice = objective(
        clt,
        rows[0].repeat(1, 2, 1),
        rows[1].repeat(1, 2, 1),
        config,
        step=0,
        is_dead=is_dead,
        row_weights=None if weights is None else weights.repeat(1, 2),
    )
    # Float32 sums over other numbers of rows.
    torch.testing.assert_close(once.loss, twice.loss, rtol=1e-5, atol=0)
    for part in parts:
        assert float(getattr(once, part)) > 0
        torch.testing.assert_close(getattr(once, part), getattr(twice, part), rtol=1e-5, atol=0)
    gradients = [
        torch.autograd.grad(outcome.loss, [clt.W_enc, *clt.W_dec], allow_unused=True)
        for outcome in (once, twice)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_sum_over_tokens_would_be_noticed(case):
    """The neighbour that fails: the same penalty summed over tokens doubles with the batch."""
    h, norms, *_ = case
    summed = [
        float(tanh_penalty(entries(part.relu()), norms, 4.0)) * part.shape[1]
        for part in (h, h.repeat(1, 2, 1))
    ]
    assert summed[1] == pytest.approx(2 * summed[0])


def test_the_loss_is_the_weighted_sum_of_its_parts(clt, rows):
    config = TrainConfig(
        steps=10,
        sparsity="tanh",
        sparsity_coefficient=0.4,
        pre_act="zero",
        pre_act_coefficient=0.3,
        pre_act_on="all",
        auxk=3,
        auxk_alpha=0.2,
    )
    is_dead = torch.zeros(3, 24, dtype=torch.bool)
    is_dead[1, ::2] = True
    clt.requires_grad_(False)
    found = objective(clt, rows[0], rows[1], config, step=5, is_dead=is_dead)
    acts, pre_acts = clt.encode(rows[0]), clt.all_pre_acts(rows[0])
    y, y_hat = clt.normalise_output(rows[1]), clt.decode_normalised(acts)
    norms = torch.stack([weight.flatten(1).square().sum(1).sqrt() for weight in clt.W_dec])
    dead_acts = topk(pre_acts[1].masked_fill(~is_dead[1], -1.0), 3)
    revived = clt.decode_normalised(
        torch.stack([torch.zeros_like(dead_acts), dead_acts, torch.zeros_like(dead_acts)])
    )
    expected = reconstruction_loss(y_hat, y) + 0.2 * auxk_loss(y - y_hat, revived - clt.b_dec[:, None])
    tanh = (4.0 * norms[:, None] * acts).tanh().sum(-1).mean()
    expected = expected + 0.5 * 0.4 * tanh + 0.3 * (-pre_acts).relu().sum(-1).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(found.active_counts, (acts > 0).sum(1))
