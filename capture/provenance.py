"""What a store's rows came from, so that someone else can make them again or see what differs."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capture.config import CaptureConfig
from capture.native import native_bits
from capture.sources import Sources
from mdlm_interp import __version__
from mdlm_interp.checkpoints import weights_sha256
from mdlm_interp.diffusion import MIN_TIME, LogLinearSchedule
from mdlm_interp.documents import PACKING
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer


def provenance(
    *,
    model_directory: Path,
    model: HookedMDLM,
    tokenizer: Tokenizer,
    config: CaptureConfig,
    sources: Sources | None = None,
    schedule: LogLinearSchedule,
    threads: int,
) -> dict[str, Any]:
    """The record, as JSON holds it.

    Args:
        config: With its files expanded.
        sources: Those files, if they are hashed already.
        threads: Of one forward pass.
    """
    return {
        **model_record(model_directory, model, tokenizer),
        "sources": (sources or Sources(config.files)).record(),
        "packing": PACKING if config.sampler is None else None,
        "seed": config.seed,
        "schedule": {"name": "log-linear", "eps": schedule.eps, "min_time": MIN_TIME},
        # What native rounding depends on is this and the stack.
        "arithmetic": config.arithmetic,
        "batch_shape": [config.batch_size if config.pack == "blocks" else 1, config.length],
        **stack_record(model, config, threads),
    }


def model_record(directory: Path, model: HookedMDLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Which model, and which tokenizer."""
    return {
        "weights_sha256": weights_sha256(directory),
        "model": model.config.to_mapping(),
        "tokenizer_sha256": tokenizer.sha256,
    }


def stack_record(model: HookedMDLM, config: CaptureConfig, threads: int) -> dict[str, Any]:
    """What a forward pass of a resolved config on that many threads runs on."""
    assert config.length is not None
    native = config.arithmetic == "native"
    return {
        "device": device_name(next(model.parameters()).device),
        "threads": threads,
        "cpu": {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()},
        "versions": {
            "mdlm_interp": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "zarr": version("zarr"),
            "tokenizers": version("tokenizers"),
        },
        "native_bits": native_bits(model, config.length, threads) if native else None,
    }


def device_name(device: torch.device) -> str:
    """What the forward pass runs on, without the number that a machine gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
