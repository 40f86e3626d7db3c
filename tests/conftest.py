"""What every test shares: fixed seeds, and property tests that draw the same examples each time."""

import os
import random

import numpy as np
import pytest
from hypothesis import settings

from mdlm_interp.__main__ import wait_politely

wait_politely()
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; each with as many threads as there are cores would be slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  (after the setting that its threads read when they start)

settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed the global generators; our own code is handed its seeds."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for libraries that still draw from it)
    torch.manual_seed(0)
