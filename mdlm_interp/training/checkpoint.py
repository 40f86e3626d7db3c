"""Saving a training run so that continuing it gives the bits of never having stopped.

A checkpoint is one safetensors file (weights, averaged weights, both AdamW moments) whose metadata holds
the step and the config. It is complete and on disk before it replaces the last one. Batches, times and
masks are pure functions of (seed, step), so nothing else needs saving.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import CheckpointError
from mdlm_interp.training.config import TrainLMConfig

STATE = "state.safetensors"
RESUMABLE_CHANGES = (
    "steps",
    "validate_every",
    "checkpoint_every",
    "log_every",
    "validation_sequences",
    "out",
)
"""Settings that may differ between the run that was stopped and the one that continues it."""


def save_state(directory: Path, step: int, config: TrainLMConfig, tensors: dict[str, Tensor]) -> None:
    """Replace the checkpoint in one step; an interruption leaves the old one."""
    partial = directory / (STATE + ".partial")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        partial,
        metadata={"step": str(step), "config": json.dumps(to_mapping(config))},
    )
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, directory / STATE)


def load_state(directory: Path, config: TrainLMConfig) -> tuple[int, dict[str, Tensor]] | None:
    """The step to continue with and the saved tensors, or None if there is no checkpoint.

    Raises:
        CheckpointError: If the checkpoint is damaged or belongs to a run with other settings.
    """
    path = directory / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it to start the run anew") from None
    saved, wanted = json.loads(metadata["config"]), json.loads(json.dumps(to_mapping(config)))
    for name in wanted:
        if name not in RESUMABLE_CHANGES and saved.get(name) != wanted[name]:
            raise CheckpointError(
                f"{path} was trained with {name} = {saved.get(name)!r}, the run asks for {wanted[name]!r}; "
                f"restore the setting or choose another out directory"
            )
    return int(metadata["step"]), tensors


def optimiser_tensors(optimiser: torch.optim.AdamW, names: list[str]) -> dict[str, Tensor]:
    """AdamW's moments under their parameters' names."""
    flat: dict[str, Tensor] = {}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimiser.state[parameter].items():
            flat[f"optimiser.{key}.{name}"] = value
    return flat


def restore_optimiser(optimiser: torch.optim.AdamW, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put saved moments back."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            optimiser.state[parameter][key] = tensors[f"optimiser.{key}.{name}"].clone()
