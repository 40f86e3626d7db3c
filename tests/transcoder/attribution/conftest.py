"""The tiny model in float64, a masked state, transcoders of every kind, and a trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from capture import ActivationStore
from mdlm_interp import HookedMDLM
from mdlm_interp.decoding import Fixed, Sampler, Trajectory, sample
from transcoder import ReplacementModel
from transcoder.attribution import Graph, attribute
from transcoder.checkpoint import load_clt
from transcoder.config import TranscoderConfig
from transcoder.model import CrossLayerTranscoder
from transcoder.normalisation import Normalisation

N_LAYERS, D_MODEL, N_FEATURES = 3, 32, 24
LENGTH = 12


def transcoder(seed: int = 7, **changes: Any) -> CrossLayerTranscoder:
    """Random weights, biases and normalisation, in float64."""
    shape: dict[str, Any] = {"n_layers": N_LAYERS, "d_model": D_MODEL, "n_features": N_FEATURES, "k": 5}
    config = TranscoderConfig(**(shape | changes))
    generator = torch.Generator().manual_seed(seed)

    def norm() -> Normalisation:
        scale = 0.5 + torch.rand(N_LAYERS, generator=generator, dtype=torch.float64)
        return Normalisation(torch.randn(N_LAYERS, D_MODEL, generator=generator, dtype=torch.float64), scale)

    found = CrossLayerTranscoder(config, norm(), norm(), seed=seed).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if found.log_threshold is not None:
            found.log_threshold.sub_(2.0)
    return found.requires_grad_(False)


@pytest.fixture(scope="session")
def exact_model(model_directory: Path) -> HookedMDLM:
    return HookedMDLM.from_pretrained(model_directory, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="session")
def exact(exact_model: HookedMDLM, trained_directory: Path) -> ReplacementModel:
    """The tiny model and the transcoder trained on it."""
    return ReplacementModel(exact_model, load_clt(trained_directory).double().requires_grad_(False))


@pytest.fixture(scope="session")
def state(store: ActivationStore, exact_model: HookedMDLM) -> Tensor:
    """One sequence with three masks."""
    ids = store.tokens()[0][4:5, :LENGTH].clone()
    ids[0, [0, 5, 9]] = exact_model.config.mask_id
    return ids


@pytest.fixture(scope="session")
def noise() -> Tensor:
    return torch.tensor([0.4], dtype=torch.float64)


@pytest.fixture(scope="session")
def graph(exact: ReplacementModel, state: Tensor, noise: Tensor) -> Graph:
    """Of the likeliest tokens at all three masks."""
    return attribute(exact, state, noise)


@pytest.fixture(scope="session")
def trajectory(exact_model: HookedMDLM, state: Tensor) -> Trajectory:
    """Eight masks of the state filled, two a step; the first four tokens are given."""
    start = state.clone()
    start[0, 4:] = exact_model.config.mask_id
    start[0, 0] = 7
    return sample(exact_model, start, Sampler(schedule=Fixed(per_step=2)), seed=3)
