"""What a store's rows came from, so that someone else can make them again or see what differs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdlm_interp import __version__
from mdlm_interp.checkpoints import sha256_of, weights_sha256
from mdlm_interp.config import MDLMConfig
from mdlm_interp.diffusion import MIN_TIME, LogLinearSchedule
from mdlm_interp.tokenizers import Tokenizer


def provenance(
    *,
    model_directory: Path,
    model: MDLMConfig,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    batch_shape: tuple[int, int],
    seed: int,
    schedule: LogLinearSchedule,
) -> dict[str, Any]:
    """The record, as JSON holds it."""
    return {
        "weights_sha256": weights_sha256(model_directory),
        "model": model.to_mapping(),
        "tokenizer_sha256": tokenizer.sha256,
        "sources": [
            {"file": str(file), "sha256": sha256_of(file), "bytes": file.stat().st_size} for file in files
        ],
        "seed": seed,
        "schedule": {"name": "log-linear", "eps": schedule.eps, "min_time": MIN_TIME},
        # Rounding differs between batch shapes, thread counts and instruction sets; nothing else does.
        "arithmetic": "native",
        "batch_shape": list(batch_shape),
        "threads": torch.get_num_threads(),
        "cpu": {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()},
        "versions": {
            "mdlm_interp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "zarr": version("zarr"),
            "tokenizers": version("tokenizers"),
        },
    }
