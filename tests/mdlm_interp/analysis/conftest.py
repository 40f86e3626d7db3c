"""A tiny time-conditioned model in float64 and trajectories of it: plain, timed, and with tokens taken back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdlm_interp.decoding import Ancestral, FirstHitting, ReMDM, Sampler, Trajectory, sample
from mdlm_interp.model import HookedMDLM


@pytest.fixture
def exact(make_model: Callable[..., HookedMDLM]) -> HookedMDLM:
    """Two blocks, three heads, 41 tokens, float64."""
    return make_model().double()


@pytest.fixture
def start(exact: HookedMDLM) -> Tensor:
    """Two sequences of nine positions, of which two and three are given."""
    x = torch.full((2, 9), exact.config.mask_id)
    x[0, 2], x[0, 7] = 5, 11
    x[1, :3] = torch.tensor([3, 30, 8])
    return x


@pytest.fixture
def trajectory(exact: HookedMDLM, start: Tensor) -> Trajectory:
    return sample(exact, start, Sampler(schedule=FirstHitting()), seed=4)


@pytest.fixture
def timed(exact: HookedMDLM, start: Tensor) -> Trajectory:
    """The model is told the schedule's time and not the share of masks."""
    return sample(exact, start, Sampler(schedule=Ancestral(steps=5), sigma="time"), seed=4)


@pytest.fixture
def revised(exact: HookedMDLM, start: Tensor) -> Trajectory:
    """Tokens are taken back, so that some are not the final ones."""
    return sample(exact, start, Sampler(schedule=ReMDM(grid=Ancestral(steps=10), eta=0.9)), seed=2)
