"""The training objective, which goes by active entries, against the same formula written densely, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from transcoder import CrossLayerTranscoder, TranscoderConfig
from transcoder.activations import batch_topk_mask, jumprelu, topk
from transcoder.config import TrainConfig
from transcoder.kernels import GradientBuffers
from transcoder.objective import objective

SHAPE = TranscoderConfig(n_layers=3, d_model=32, n_features=24, k=4)
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "relu": {"activation": "relu", "k": None},
    "gdm": {"activation": "jumprelu", "k": None, "ste_width": 0.3},
    "anthropic": {"activation": "jumprelu", "k": None, "ste": "anthropic", "ste_width": 0.3},
    "crosslayer-coding": {"activation": "jumprelu", "k": None, "ste": "crosslayer-coding", "ste_width": 0.3},
    "wide": {"activation": "jumprelu", "k": None, "ste": "anthropic", "ste_width": 4.0},
    "plt": {"connectivity": "plt"},
    "skip": {"skip": True, "connectivity": "band", "band": 2},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "tanh": {"sparsity": "tanh"},
    "l1-threshold": {"sparsity": "l1", "pre_act": "threshold", "pre_act_on": "all"},
    "tanh-dead": {"sparsity": "tanh", "pre_act": "threshold", "pre_act_on": "dead"},
    "zero": {"sparsity": "l1", "pre_act": "zero", "pre_act_on": "dead"},
}


@pytest.fixture
def make(clt):
    """A float64 transcoder of one kind, parameters drawn, with the store's normalisation."""

    def build(kind):
        found = CrossLayerTranscoder(replace(SHAPE, **KINDS[kind]), seed=4).double()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name in ("in_mean", "in_scale", "out_mean", "out_scale"):
                getattr(found, name).copy_(getattr(clt, name))
            for name, parameter in found.named_parameters():
                if name[:1] == "b" or name == "W_skip":
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                elif name == "log_threshold":
                    parameter.copy_(-1 + 0.5 * torch.randn(parameter.shape, generator=generator))
        return found

    return build


def dense_loss(clt, x, y, config, is_dead, row_weights):
    """The objective from dense tensors and torch's own autograd, term by term."""
    shape, norms = clt.config, torch.stack([weight.flatten(1).norm(dim=1) for weight in clt.W_dec])
    normalised, target = clt.normalise_input(x), clt.normalise_output(y)
    h = torch.einsum("lfd,lrd->lrf", clt.W_enc, normalised) + clt.b_enc[:, None]
    theta = torch.zeros_like(clt.b_enc) if clt.log_threshold is None else clt.log_threshold.exp()
    acts = {
        "topk": lambda: topk(h, 4),
        "batchtopk": lambda: torch.where(batch_topk_mask(h.detach(), 4), h.relu(), 0.0),
        "relu": h.relu,
        "jumprelu": lambda: jumprelu(h, clt.log_threshold[:, None], shape.ste, shape.ste_width),
    }[shape.activation]()
    y_hat = clt.decode_normalised(acts, normalised)
    fvu = ((y_hat - target).square() * row_weights[..., None]).mean((1, 2)).mean()
    weighed = norms[:, None] * acts
    sparsity = {"tanh": (4.0 * weighed).tanh(), "l1": weighed}[config.sparsity].sum(-1).mean()
    missing = {
        "none": torch.zeros_like(h),
        "threshold": (theta[:, None] - h).relu() * norms[:, None],
        "zero": (-h).relu(),
    }[config.pre_act]
    chosen = is_dead if config.pre_act_on == "dead" else torch.ones_like(is_dead)
    loss = fvu + 0.05 * sparsity + 0.02 * (missing * chosen[:, None]).sum(-1).mean()
    if not shape.selects:
        return loss
    dead_acts = topk(h.masked_fill(~is_dead[:, None], -1.0), 3)
    skipped = None if clt.W_skip is None else torch.zeros_like(normalised)
    goal = (target - y_hat).detach()
    left = goal - (clt.decode_normalised(dead_acts, skipped) - clt.b_dec[:, None])
    sizes = [(part.square() * row_weights[..., None]).sum() for part in (left, goal)]
    return loss + 0.03 * sizes[0] / sizes[1]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_the_dense_float64_reference(make, rows, kind, penalty):
    clt = make(kind)
    config = TrainConfig(
        sparsity_coefficient=0.05,
        sparsity_warmup=0.0,
        pre_act_coefficient=0.02,
        auxk=3,
        auxk_alpha=0.03,
        **PENALTIES[penalty],
    )
    generator = torch.Generator().manual_seed(9)
    is_dead = torch.rand(3, 24, generator=generator) < 0.4
    is_dead[1] = False
    weights = torch.rand(3, 64, generator=generator, dtype=torch.float64)
    x, y = (part.double() for part in rows)
    expected = dense_loss(clt, x, y, config, is_dead, weights)
    torch.autograd.backward(expected)
    reference = {name: parameter.grad.clone() for name, parameter in clt.named_parameters()}
    buffers = GradientBuffers([clt.W_enc, *clt.W_dec])
    for grads in (None, buffers, buffers):  # the last time in memory that was used before
        clt.zero_grad(set_to_none=True)
        buffers.release()
        found = objective(clt, x, y, config, step=0, is_dead=is_dead, row_weights=weights, grads=grads)
        torch.autograd.backward(found.loss)
        torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
        for name, parameter in clt.named_parameters():
            # Float64 sums in other orders; gradients are of size 1e-3 and up.
            torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-9, atol=1e-14, msg=name)
            assert bool(reference[name].any())
        if clt.config.activation != "batchtopk":
            assert torch.equal(found.active_counts, (clt.encode(x) > 0).sum(1))
