"""Small models with awkward weights, and both implementations of every operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import jaxtyping
import pytest
import torch
from torch import Tensor

from mdlm_interp.model import HookedMDLM
from oracle import Oracle, golden, plain_path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are so small that waiting for a second thread costs ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["plain", "compiled"])
def path(request) -> Iterator[str]:
    """Runs the test with each implementation."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="the compiled loops need numba")
    with plain_path() if request.param == "plain" else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def synthetic() -> HookedMDLM:
    """Two blocks, heads of 32 (no power of four), time-conditioned, with outlier channels."""
    return golden.synthetic_model()


@pytest.fixture
def oracle(synthetic) -> Oracle:
    return Oracle(synthetic)


@pytest.fixture(scope="session")
def inputs() -> tuple[Tensor, Tensor]:
    """Token ids [2, 24] and noise levels [2] for it."""
    return golden.synthetic_inputs()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch the suite's run-time type checks off, to hand our own checks what the annotations exclude."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
