"""The losses against float64 formulas written out."""

import pytest
import torch

from transcoder.config import TrainConfig
from transcoder.losses import layer_nmse, reconstruction_loss
from transcoder.objective import objective


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
    assert layer_nmse(normalised, y).tolist() == pytest.approx([float(value) for value in expected], rel=1e-4)
    loss = float(reconstruction_loss(normalised, y))
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@pytest.fixture
def case(clt, rows):
    pre_acts = clt.all_pre_acts(rows[0])
    residual = clt.normalise_output(rows[1]) - clt.decode_normalised(clt.encode(rows[0]))
    is_dead = torch.zeros(3, 24, dtype=torch.bool)
    is_dead[0, [2, 5, 11, 17]] = is_dead[2, [0, 23]] = True
    return residual, pre_acts, is_dead, list(clt.W_dec)


def auxk(clt, rows, is_dead, k):
    """AuxK alone, as training computes it."""
    return objective(clt, rows[0], rows[1], TrainConfig(auxk=k), step=0, is_dead=is_dead).auxk


def test_auxk_equals_its_formula(case, clt, rows):
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
    assert float(auxk(clt, rows, is_dead, 3)) == pytest.approx(float(expected), rel=1e-5)


def test_auxk_is_zero_when_nothing_is_dead_or_it_is_off(case, clt, rows):
    is_dead = case[2]
    assert float(auxk(clt, rows, torch.zeros_like(is_dead), 3)) == 0.0
    assert float(auxk(clt, rows, is_dead, None)) == 0.0


def test_auxk_moves_only_dead_features(case, clt, rows):
    is_dead, parameters = case[2], [clt.W_enc, *clt.W_dec, clt.b_dec]
    changes = []
    for alpha in (0.0, 1.0):
        outcome = objective(
            clt, rows[0], rows[1], TrainConfig(auxk=3, auxk_alpha=alpha), step=0, is_dead=is_dead
        )
        changes.append(torch.autograd.grad(outcome.loss, parameters))
    moved = [ours.ne(theirs) for ours, theirs in zip(*changes, strict=True)]
    assert torch.equal(moved[0].any(-1), is_dead)
    for source in range(3):
        assert torch.equal(moved[1 + source].any(-1).any(-1), is_dead[source])
    assert not moved[4].any()
