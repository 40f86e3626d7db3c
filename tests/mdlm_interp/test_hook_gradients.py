"""Gradients flow through every hook point, compared with central differences in float64.

Bounded: a central difference of step 1e-5 is off by 1e-10 of the third derivative and by 1e-11 of rounding
(1e-16 / 1e-5), both far below the relative 1e-5 asked for.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdlm_interp.model import all_hook_names

STEP = 1e-5
NAMES = [name for name in all_hook_names(2) if not name.startswith("blocks.1.")]


@pytest.fixture
def model64(model):
    return model.double()


def direction_like(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(11), dtype=tensor.dtype)


def loss_of(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1).mean() + logits[:, 0, 0].mean()


def central_difference(model, ids, sigma, name: str) -> float:
    """How the loss changes when the activation moves along `direction_like` it."""
    with torch.no_grad():
        losses = []
        for step in (STEP, -STEP):
            with model.hooks({name: lambda tensor, hook, step=step: tensor + step * direction_like(tensor)}):
                losses.append(float(loss_of(model(ids, sigma))))
    return (losses[0] - losses[1]) / (2 * STEP)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_at_every_point_is_the_central_difference(model64, ids, sigma, name):
    kept: list[Tensor] = []

    def keep(tensor, hook):
        kept.append(tensor)
        return tensor

    with model64.hooks({name: keep}):
        loss = loss_of(model64(ids, sigma))
    (gradient,) = torch.autograd.grad(loss, kept)
    assert float((gradient * direction_like(gradient)).sum()) == pytest.approx(
        central_difference(model64, ids, sigma, name), rel=1e-5, abs=1e-9
    )


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not ("ln" in name and name.endswith("hook_scale"))]
)
def test_the_logits_have_a_gradient_in_an_activation_cached_without_clone(model64, ids, sigma, name):
    """All but a LayerNorm's scale, which the fused kernel gives beside its output, not before it."""
    logits, cache = model64.run_with_cache(ids, name, timesteps=sigma, clone=False)
    (gradient,) = torch.autograd.grad(loss_of(logits), cache[name])
    assert float((gradient * direction_like(gradient)).sum()) == pytest.approx(
        central_difference(model64, ids, sigma, name), rel=1e-5, abs=1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_cached_activation_has_the_gradient_of_the_embedding(model64, ids, sigma, name):
    """A loss on any cached copy reaches the weights, LayerNorm's scale included."""
    table = model64.backbone.vocab_embed.embedding
    weight = model64.backbone.sigma_map.mlp.second.weight if "cond" in name or "adaln" in name else table
    direction = direction_like(weight)

    def loss():
        return model64.run_with_cache(ids, name, timesteps=sigma)[1][name].sin().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        values = []
        for step in (STEP, -2 * STEP):
            weight += step * direction
            values.append(float(loss()))
    expected = (values[0] - values[1]) / (2 * STEP)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "name", ["blocks.0.hook_mlp_out", "blocks.0.ln1.hook_scale", "blocks.0.attn.hook_pattern"]
)
def test_an_editing_hook_has_the_gradient_of_its_own_parameter_and_of_what_lies_before(
    model64, ids, sigma, name
):
    factor = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    table = model64.backbone.vocab_embed.embedding
    direction = direction_like(table)

    def loss() -> Tensor:
        with model64.hooks({name: lambda tensor, hook: factor * tensor}):
            return loss_of(model64(ids, sigma))

    by_factor, by_table = torch.autograd.grad(loss(), [factor, table])
    with torch.no_grad():
        values = []
        for step in (STEP, -2 * STEP):
            factor += step
            values.append(float(loss()))
        factor += STEP
        for step in (STEP, -2 * STEP):
            table += step * direction
            values.append(float(loss()))
    expected = [(high - low) / (2 * STEP) for high, low in (values[:2], values[2:])]
    assert [float(by_factor), float((by_table * direction).sum())] == pytest.approx(
        expected, rel=1e-5, abs=1e-9
    )


def test_a_detached_scale_freezes_the_norm(model64, ids, sigma):
    """Behavioural: the trick that makes attribution linear changes the gradient and hardly a logit."""
    table = model64.backbone.vocab_embed.embedding
    plain = model64(ids, sigma)
    with model64.hooks({"*ln*.hook_scale": lambda tensor, hook: tensor.detach()}):
        frozen = model64(ids, sigma)
    torch.testing.assert_close(frozen, plain)
    gradients = [torch.autograd.grad(loss_of(logits), table)[0] for logits in (plain, frozen)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_asking_for_the_scales_gradient_changes_no_bit_of_it(model, ids, sigma):
    """Exact: the gradient is added to the fused kernel's value, not the value recomputed."""
    name = "blocks.1.ln2.hook_scale"
    _, cache = model.run_with_cache(ids, name, timesteps=sigma)
    with torch.no_grad():
        _, without = model.run_with_cache(ids, name, timesteps=sigma)
    assert cache[name].requires_grad
    assert torch.equal(cache[name], without[name])
