"""A trajectory on disk in the bundled tokenizer's words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdlm_interp import load_tokenizer
from mdlm_interp.decoding import Trajectory


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """Five tokens in four steps, two sequences."""
    tokenizer = load_tokenizer("bundled")
    final = torch.tensor(
        [tokenizer.encode("One day a girl ran")[:5], tokenizer.encode("The dog was very big")[:5]]
    )
    states = [final.masked_fill(torch.arange(5) > shown, tokenizer.mask_id) for shown in range(5)]
    is_open = torch.stack(states[:-1]) == tokenizer.mask_id
    figures = torch.where(is_open, 0.5, torch.nan).double()
    trajectory = Trajectory(
        states=torch.stack(states),
        revealed_at=torch.arange(-1, 4).expand(2, 5).clone(),
        confidence=figures,
        entropy=2 * figures,
        t=torch.tensor([[0.8], [0.6], [0.4], [0.2]], dtype=torch.float64).expand(4, 2).clone(),
        top_tokens=torch.empty(4, 2, 5, 0, dtype=torch.int64),
        top_probabilities=torch.empty(4, 2, 5, 0, dtype=torch.float64),
        seed=0,
        indices=(0, 1),
        mask_id=tokenizer.mask_id,
        n_forwards=4,
        sampler={"schedule": {"kind": "Fixed", "per_step": 1}},
    )
    directory: Path = tmp_path_factory.mktemp("trajectory") / "run"
    trajectory.save(directory)
    return directory
