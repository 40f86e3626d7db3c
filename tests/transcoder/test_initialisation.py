"""Initial weights within their documented bounds, and firing rates that are exact quantiles."""

import math
from dataclasses import replace

import pytest
import torch

from mdlm_interp.errors import ConfigError
from transcoder import CrossLayerTranscoder, TranscoderConfig
from transcoder.config import InitConfig
from transcoder.initialisation import set_firing_rates

SHAPE = TranscoderConfig(n_layers=3, d_model=32, n_features=24, k=4)
JUMP = replace(SHAPE, activation="jumprelu", k=None)


@pytest.mark.parametrize(
    ("init", "encoder_bound"), [(InitConfig(), 32**-0.5), (InitConfig(encoder="n_features"), 24**-0.5)]
)
def test_encoders_are_uniform_within_their_bound(init, encoder_bound):
    W_enc = CrossLayerTranscoder(SHAPE, init=init).W_enc.detach()
    assert 0.98 * encoder_bound < float(W_enc.abs().max()) <= encoder_bound
    # The variance of a uniform distribution; 2,304 draws have it to a few percent.
    assert float(W_enc.var()) == pytest.approx(encoder_bound**2 / 3, rel=0.06)


@pytest.mark.parametrize(
    ("changes", "writing"), [({}, 3), ({"connectivity": "plt"}, 1), ({"connectivity": "band", "band": 2}, 2)]
)
def test_decoders_are_bounded_by_the_layers_that_write_to_one(changes, writing):
    clt = CrossLayerTranscoder(replace(SHAPE, **changes))
    for weight in clt.W_dec:
        bound = (writing * 32) ** -0.5
        assert 0.98 * bound < float(weight.detach().abs().max()) <= bound


def test_decoders_may_start_at_their_own_layer_or_at_zero():
    plain = CrossLayerTranscoder(SHAPE, seed=3)
    own = CrossLayerTranscoder(SHAPE, seed=3, init=InitConfig(decoder="own_layer"))
    zeros = CrossLayerTranscoder(SHAPE, seed=3, init=InitConfig(decoder="zeros"))
    for source in range(3):
        assert torch.equal(own.W_dec[source][:, 0], plain.W_dec[source][:, 0])
        assert not own.W_dec[source][:, 1:].any()
        assert not zeros.W_dec[source].any()
    assert torch.equal(own.W_enc, plain.W_enc)


def test_biases_and_the_skip_start_at_zero_and_thresholds_where_asked():
    clt = CrossLayerTranscoder(replace(JUMP, skip=True), init=InitConfig(threshold=0.2))
    assert not clt.b_enc.any()
    assert not clt.b_dec.any()
    assert clt.W_skip is not None
    assert not clt.W_skip.any()
    torch.testing.assert_close(clt.thresholds(), torch.full((3, 24), 0.2))


@pytest.mark.parametrize("shape", [SHAPE, JUMP], ids=["topk", "jumprelu"])
@pytest.mark.parametrize("active", [0.1, 1.5, 6.0, 24.0])
def test_every_feature_fires_in_exactly_the_same_number_of_rows(clt, rows, shape, active):
    x = rows[0]
    fresh = CrossLayerTranscoder(shape, seed=4)
    for name in ("in_mean", "in_scale"):
        getattr(fresh, name).copy_(getattr(clt, name))
    set_firing_rates(fresh, x, active)
    fires = (fresh.all_pre_acts(x) > fresh.thresholds()[:, None]).sum(1)
    expected = max(1, min(63, math.floor(active * 64 / 24)))
    assert fires.unique().tolist() == [expected]


def test_the_same_without_rates_does_not_hold(clt, rows):
    """The neighbour that fails: zero biases let features fire unequally."""
    fires = (clt.all_pre_acts(rows[0]) > 0).sum(1)
    assert len(fires.unique()) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.0}, "threshold must be above 0 and finite, got 0.0; leave it out for 0.03"),
        (
            {"active_features": 0.0},
            "active_features must be above 0 and finite, or none, which keeps b_enc at 0, got 0.0",
        ),
        ({"active_features": math.nan}, "active_features must be above 0 and finite, or none"),
        ({"rows": 0}, "rows must be at least 2, got 0; leave it out for 4096"),
    ],
)
def test_impossible_initial_weights_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        InitConfig(**changes)
