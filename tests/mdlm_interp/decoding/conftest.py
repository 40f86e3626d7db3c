"""The exact denoiser, shared by the tests of samplers."""

from __future__ import annotations

import pytest

from tests.mdlm_interp.decoding.chain import MarkovChain


@pytest.fixture
def chain() -> MarkovChain:
    """Four tokens, each one of three."""
    return MarkovChain()
