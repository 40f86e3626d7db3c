"""SUBS-aware weights: the zero is right, shown by moving what it is about in the model; and it takes effect."""

from dataclasses import replace

import pytest
import torch

from mdlm_interp.diffusion import nelbo_per_token
from transcoder.losses import layer_nmse
from transcoder.row_weights import MEAN_NELBO_WEIGHT, row_weights
from transcoder.run import train


@pytest.fixture
def loss(model, store, ids, sigma):
    """The bound of two noised sequences with one block's MLP output moved at some positions."""
    x_0, t = store.tokens()[0][4:6], store.times()[4:6].float()
    is_masked = ids == model.config.mask_id

    def of(block, where):
        def move(tensor, hook):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
            return tensor + 3.0 * noise * where[..., None]

        with torch.no_grad(), model.hooks({f"blocks.{block}.hook_mlp_out": move}):
            logits = model(ids, sigma)
        return nelbo_per_token(logits, x_0, ids, t, model.config.mask_id), logits

    assert bool(is_masked.any(1).all())
    assert bool((~is_masked).any(1).all())
    return of, is_masked


def test_the_last_mlps_output_at_unmasked_positions_cannot_move_the_bound(loss):
    of, is_masked = loss
    nothing = torch.zeros_like(is_masked)
    (still, logits), (moved, other) = of(2, nothing), of(2, ~is_masked)
    assert not torch.equal(logits, other)  # it does move the logits there
    assert torch.equal(still, moved)


def test_everything_else_can(loss):
    """The neighbour that fails: the last MLP at masked positions, and earlier ones at unmasked positions."""
    of, is_masked = loss
    still = of(2, torch.zeros_like(is_masked))[0]
    assert float((of(2, is_masked)[0] - still).abs().max()) > 0.01
    for block in (0, 1):
        assert float((of(block, ~is_masked)[0] - still).abs().max()) > 0.01


def test_subs_weights_are_zero_there_and_nowhere_else():
    is_masked = torch.tensor([True, False, True, False])
    t = torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.float64)
    weights, nelbo = (row_weights(kind, is_masked, t, 3) for kind in ("subs", "nelbo"))
    assert weights is not None
    assert nelbo is not None
    assert weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]]
    torch.testing.assert_close(nelbo, (weights / t / MEAN_NELBO_WEIGHT).float())
    assert row_weights("equal", is_masked, t, 3) is None


def test_nelbo_weights_are_one_on_average_and_finite_on_clean_text():
    t = torch.linspace(1e-3, 1, 1_000_001, dtype=torch.float64)
    weights = row_weights("nelbo", torch.ones(len(t), dtype=torch.bool), t, 1)
    assert weights is not None
    assert float(weights.double().mean()) == pytest.approx(1.0, rel=1e-3)
    clean = row_weights("nelbo", torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.float64), 2)
    assert clean is not None
    assert bool(clean.isfinite().all())


def test_a_weight_of_zero_takes_a_row_out_of_the_loss_and_its_gradient(clt, rows):
    weights = torch.ones(3, 64)
    weights[2, 10:] = 0.0
    y = clt.normalise_output(rows[1])
    y_hat = clt.decode_normalised(clt.encode(rows[0])).detach().requires_grad_()
    fvu = layer_nmse(y_hat, y, weights)
    torch.autograd.backward(fvu.sum())
    assert y_hat.grad is not None
    assert not y_hat.grad[2, 10:].any()
    assert bool(y_hat.grad[2, :10].any(1).all())
    expected = (y_hat.detach() - y)[2, :10].square().mean() * 10 / 64
    assert float(fvu[2].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_training_with_them_is_another_run(run_config, tmp_path):
    runs = [
        train(replace(run_config, out=tmp_path / kind, train=replace(run_config.train, row_weights=kind)))
        for kind in ("equal", "subs", "nelbo")
    ]
    assert not torch.equal(runs[0].W_enc, runs[1].W_enc)
    assert not torch.equal(runs[1].W_enc, runs[2].W_enc)
