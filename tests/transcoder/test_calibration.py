"""A BatchTopK becomes the JumpReLU that keeps k features per row, exactly, on the rows it is calibrated on."""

from dataclasses import replace

import pytest
import torch

from mdlm_interp.errors import DataError
from transcoder import CrossLayerTranscoder
from transcoder.calibration import calibrated, layer_thresholds
from transcoder.checkpoint import load_clt
from transcoder.run import train
from transcoder.sources import StoreSource


@pytest.fixture
def batchtopk(clt):
    """The fixture's weights with BatchTopK."""
    found = CrossLayerTranscoder(replace(clt.config, activation="batchtopk"))
    found.load_state_dict(clt.state_dict())
    return found.requires_grad_(False)


@pytest.mark.parametrize("sizes", [(64,), (10, 54), (1, 1, 62)])
def test_l0_is_k_on_each_layer_whatever_the_batches(batchtopk, rows, sizes):
    batches = list(torch.split(rows[0], list(sizes), dim=1))
    found = calibrated(batchtopk, batches)
    assert (found.config.activation, found.config.k) == ("jumprelu", None)
    assert ((found.encode(rows[0]) > 0).sum((1, 2)) == 4 * 64).all()
    pre_acts = batchtopk.all_pre_acts(rows[0]).flatten(1)
    for layer, theta in enumerate(layer_thresholds(batchtopk, batches)):
        assert int((pre_acts[layer] > theta).sum()) == 4 * 64
    assert torch.equal(found.W_enc, batchtopk.W_enc)


def test_thresholds_are_found_where_the_large_values_are_in_one_batch(batchtopk, rows):
    """More of the first rows' values are kept than of a batch by itself."""
    x = rows[0].clone()
    x[:, :8] *= 10
    found = calibrated(batchtopk, [x[:, :8], x[:, 8:]])
    active = (found.encode(x) > 0).sum(-1)
    assert (active.sum(1) == 4 * 64).all()
    assert bool((active[:, :8].sum(1) > 4 * 8).all())


def test_a_row_by_itself_has_the_activations_it_has_among_others(batchtopk, rows):
    found = calibrated(batchtopk, [rows[0]])
    together = found.encode(rows[0])
    alone = torch.cat([found.encode(rows[0][:, row : row + 1]) for row in range(64)], 1)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_fewer_positive_values_than_the_budget_give_a_relu(batchtopk, rows):
    batchtopk.b_enc[1] -= 100
    batchtopk.b_enc[1, 3] += 200
    found = calibrated(batchtopk, [rows[0]])
    assert torch.equal(found.encode(rows[0])[1], found.all_pre_acts(rows[0])[1].relu())


def test_without_calibration_there_are_no_activations_of_a_row(batchtopk, rows):
    with pytest.raises(DataError, match=r"make it a jumprelu with transcoder\.calibration\.calibrated"):
        batchtopk.encode(rows[0])
    with pytest.raises(DataError, match="needs held-out rows, and there are none; raise held_out_fraction"):
        calibrated(batchtopk, [])


def test_another_activation_is_refused(clt, rows):
    with pytest.raises(
        DataError, match="only a batchtopk is calibrated, this transcoder has activation topk"
    ):
        calibrated(clt, [rows[0]])


def test_training_saves_the_calibrated_transcoder(run_config):
    settings = replace(run_config.train, calibration_rows=100, k_start=8)
    clt = train(replace(run_config, activation="batchtopk", k=3, train=settings))
    assert clt.config.activation == "jumprelu"
    loaded = load_clt(run_config.out)
    assert loaded.config == clt.config
    assert loaded.thresholds().std(1).max() < 1e-6  # one threshold a layer
    assert loaded.provenance["run"]["activation"] == "batchtopk"


def test_without_held_out_rows_to_calibrate_on_nothing_is_trained(run_config, monkeypatch):
    monkeypatch.setattr(StoreSource, "held_out", lambda self, shape: [])
    with pytest.raises(
        DataError, match=r"none of those selected \(all\); raise held_out_fraction, or set train"
    ):
        train(replace(run_config, activation="batchtopk", k=3))
    assert not (run_config.out / "metrics.jsonl").exists()
    # Other activations need none.
    assert train(run_config).config.activation == "topk"
