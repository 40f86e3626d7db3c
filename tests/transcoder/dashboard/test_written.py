"""What features write, against the model itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import DataError
from tests.transcoder.conftest import N_FEATURES, N_LAYERS
from transcoder.dashboard import read_decoders
from transcoder.dashboard.written import TIME, UNGATED
from transcoder.model import CrossLayerTranscoder

SIGMA = LogLinearSchedule().sigma(torch.tensor([TIME], dtype=torch.float64)).float()


def effects_in_the_model(model: HookedMDLM, direction: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Change of the centred logits, norm frozen, for one unit written to the end of the residual stream.

    Times the residual's standard deviation: what is left is the same at every position.
    """
    _, cache = model.run_with_cache(ids, ["ln_final.hook_scale"], timesteps=SIGMA)
    scale = cache["ln_final.hook_scale"]
    freeze = {"ln_final.hook_scale": lambda tensor, hook: scale}
    plain = model(ids, SIGMA)
    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    with model.hooks({last: lambda tensor, hook: tensor + direction, **freeze}):
        moved = model(ids, SIGMA)
    change = ((moved - plain) / scale)[0, -1]
    centred: torch.Tensor = change - change[: model.config.mask_id].mean()
    return centred


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
def test_promoted_and_suppressed_tokens_are_those_that_the_model_moves_most(model, clt, ids, gated):
    if not gated:
        clt.config = dataclasses.replace(clt.config, output_hook=UNGATED)
    found = read_decoders(clt, model, n_tokens=6)
    gates = model.run_with_cache(ids[:1], "blocks.*.adaln.hook_gate_mlp", timesteps=SIGMA)[1]
    for layer, feature in ((0, 0), (0, 17), (1, 5), (2, 23)):
        rows = clt.decoder_rows(layer, feature)
        if not gated:
            rows = rows * torch.stack(
                [gates[f"blocks.{target}.adaln.hook_gate_mlp"][0, 0] for target in range(layer, N_LAYERS)]
            )
        expected = effects_in_the_model(model, rows.sum(0), ids[:1])
        tokens = expected[: model.config.mask_id]
        high, low = tokens.topk(6), tokens.topk(6, largest=False)
        # Bounded: the logits are differences of float32 numbers of about 10.
        assert torch.allclose(torch.from_numpy(found.promoted_by[layer, feature]), high.values, atol=2e-4)
        assert torch.allclose(torch.from_numpy(found.suppressed_by[layer, feature]), low.values, atol=2e-4)
        assert found.promoted[layer, feature, 0] == high.indices[0]
        assert found.suppressed[layer, feature, 0] == low.indices[0]
    assert not np.isin(model.config.mask_id, found.promoted)
    assert not np.isin(model.config.mask_id, found.suppressed)


@torch.no_grad()
def test_norms_are_those_of_the_rows_that_are_added(model, clt):
    found = read_decoders(clt, model)
    for layer in range(N_LAYERS):
        assert found.norms[layer].shape == (N_FEATURES, N_LAYERS - layer)
        expected = clt.decoder_rows(layer, 3).norm(dim=1)
        assert torch.allclose(torch.from_numpy(found.norms[layer][3]), expected)


def padded(clt: CrossLayerTranscoder) -> torch.Tensor:
    """Decoders [feature, target d_model] of all layers, zero where they do not write."""
    rows = []
    for source, weight in enumerate(clt.W_dec):
        whole = torch.zeros(clt.config.n_features, clt.config.n_layers, clt.config.d_model)
        targets = clt.config.targets(source)
        whole[:, targets.start : targets.stop] = weight
        rows.append(whole.flatten(1))
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("size", [2**24, 200])
@pytest.mark.parametrize("connectivity", [{}, {"connectivity": "plt"}, {"connectivity": "band", "band": 2}])
def test_nearest_features_are_those_of_the_largest_cosine(model, clt, monkeypatch, size, connectivity):
    monkeypatch.setattr("transcoder.dashboard.written.BLOCK_VALUES", size)
    clt = CrossLayerTranscoder(dataclasses.replace(clt.config, **connectivity), seed=2)
    found = read_decoders(clt, model, n_nearest=5)
    rows = torch.nn.functional.normalize(padded(clt), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    best = cosines.topk(5).values.reshape(N_LAYERS, N_FEATURES, 5)
    assert torch.allclose(torch.from_numpy(found.cosines), best, atol=1e-6)
    numbers = torch.from_numpy(found.nearest)
    named = (numbers[..., 0] * N_FEATURES + numbers[..., 1]).reshape(-1, 5)
    assert torch.allclose(cosines.gather(1, named), best.reshape(-1, 5), atol=1e-6)


def test_the_search_for_nearest_can_be_left_out(model, clt):
    assert read_decoders(clt, model, n_nearest=0).nearest.shape == (N_LAYERS, N_FEATURES, 0, 2)


def test_what_cannot_be_answered_is_told(model, clt):
    with pytest.raises(DataError, match="n_nearest must be at least 0, got -1"):
        read_decoders(clt, model, n_nearest=-1)
    with pytest.raises(DataError, match=r"n_tokens must be in \[1, \d+\), got 0"):
        read_decoders(clt, model, n_tokens=0)
    clt.config = dataclasses.replace(clt.config, output_hook="blocks.{layer}.hook_resid_post")
    with pytest.raises(DataError, match="this transcoder's write to"):
        read_decoders(clt, model)
