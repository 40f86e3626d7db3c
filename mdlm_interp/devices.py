"""Which device a model runs on: the name that a user gives, tried before anything is loaded."""

from __future__ import annotations

import torch

from mdlm_interp.errors import ConfigError


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name, on which a tensor has just been made.

    Raises:
        ConfigError: If torch knows no such device, finds none here, or keeps no numbers on it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device must be cpu, cuda, cuda:1, mps or the like, got {name!r}; use cpu"
        ) from None
    if device.type == "meta":
        raise ConfigError(
            "device 'meta' was asked for, which keeps shapes and no numbers; use cpu or an accelerator"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' was asked for, but torch finds no CUDA device; use cpu")
    try:
        torch.zeros(1).to(device)
    # What a backend that is not there raises is its own choice: an assertion, a missing module, a RuntimeError.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"device '{device}' was asked for, but torch cannot use it here ({reason}); use cpu"
        ) from None
    return device
