"""The losses against float64 formulas written out."""

import pytest
import torch

from transcoder.losses import auxk_loss, layer_fvu, reconstruction_loss


def test_reconstruction_is_the_mean_over_layers_of_the_squared_error_over_the_stores_variance(
    clt, store, rows
):
    clt.requires_grad_(False)
    y_hat = clt(rows[0]).double()
    expected = []
    for layer, name in enumerate(clt.config.output_hooks):
        everything = store.read(slice(None), [name])[name].double()
        variance = (everything - everything.mean(0)).square().sum(-1).mean()
        expected.append((y_hat[layer] - rows[1][layer].double()).square().sum(-1).mean() / variance)
    normalised = clt.decode_normalised(clt.encode(rows[0]))
    y = clt.normalise_output(rows[1])
    # float32 means over 64 x 32 values
    assert layer_fvu(normalised, y).tolist() == pytest.approx([float(value) for value in expected], rel=1e-4)
    loss = float(reconstruction_loss(normalised, y))
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.fixture
def case(clt, rows):
    pre_acts = clt.all_pre_acts(rows[0])
    residual = clt.normalise_output(rows[1]) - clt.decode_normalised(clt.encode(rows[0]))
    is_dead = torch.zeros(3, 24, dtype=torch.bool)
    is_dead[0, [2, 5, 11, 17]] = is_dead[2, [0, 23]] = True
    return residual, pre_acts, is_dead, list(clt.W_dec)


def test_auxk_equals_its_formula(case):
    residual, pre_acts, is_dead, w_dec = case
    written = torch.zeros_like(residual).double()
    for source in range(3):
        h = pre_acts[source].detach().double().masked_fill(~is_dead[source], -torch.inf)
        for row in range(h.shape[0]):
            for feature in h[row].argsort(descending=True)[:3].tolist():
                if h[row, feature] > 0:
                    written[source:, row] += h[row, feature] * w_dec[source][feature].detach().double()
    error, left = residual.detach().double(), residual.detach().double() - written
    expected = left.square().sum() / error.square().sum()
    assert float(auxk_loss(residual, pre_acts, is_dead, w_dec, 3).detach()) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_auxk_is_zero_when_nothing_is_dead_or_it_is_off(case):
    residual, pre_acts, is_dead, w_dec = case
    assert float(auxk_loss(residual, pre_acts, torch.zeros_like(is_dead), w_dec, 3)) == 0.0
    assert float(auxk_loss(residual, pre_acts, is_dead, w_dec, 0)) == 0.0


def test_auxk_moves_only_dead_features(case, clt):
    residual, pre_acts, is_dead, w_dec = case
    loss = auxk_loss(residual, pre_acts, is_dead, w_dec, 3)
    gradients = torch.autograd.grad(loss, [clt.W_enc, *w_dec, clt.b_dec], allow_unused=True)
    assert torch.equal(gradients[0].ne(0).any(-1), is_dead)
    assert torch.equal(gradients[1].ne(0).any(-1).any(-1), is_dead[0])
    assert gradients[2] is None  # layer 1 has no dead feature
    assert torch.equal(gradients[3].ne(0).any(-1).any(-1), is_dead[2])
    assert gradients[4] is None
