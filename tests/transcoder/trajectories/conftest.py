"""A trajectory of the tiny model, and its trained transcoder put beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdlm_interp.decoding import Fixed, Sampler, Trajectory, sample
from mdlm_interp.model import HookedMDLM
from transcoder import ReplacementModel
from transcoder.checkpoint import load_clt


@pytest.fixture(scope="session")
def replacement(model: HookedMDLM, trained_directory: Path) -> ReplacementModel:
    return ReplacementModel(model, load_clt(trained_directory).requires_grad_(False))


@pytest.fixture(scope="session")
def trajectory(model: HookedMDLM) -> Trajectory:
    """Two sequences of ten positions, of which three are given, two filled in each step in a random order."""
    start = torch.full((2, 10), model.config.mask_id)
    start[:, :3] = torch.tensor([[7, 30, 11], [12, 260, 40]])
    return sample(model, start, Sampler(schedule=Fixed(per_step=2), order="random"), seed=3)
