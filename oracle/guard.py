"""What every exact operation asks before it computes: types, gradients, a trusted machine, no compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from oracle.errors import ExactError
from oracle.selftest import require_trusted

P = ParamSpec("P")
R = TypeVar("R")


def exact_operation(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function of float32 tensors an exact operation: checked, without gradients, autocast or compiler.

    A compiler would fuse the recipes' multiplications and additions into single roundings, so torch.compile is
    kept out of the function and all it calls.
    """
    name = function.__name__

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not tensors:
            kinds = ", ".join(type(value).__name__ for value in given) or "nothing"
            raise ExactError(f"{name}: takes float32 tensors, got {kinds}; make them with torch.tensor")
        for tensor in tensors:
            if tensor.dtype != torch.float32:
                raise ExactError(
                    f"{name}: exact arithmetic is defined for float32, got {str(tensor.dtype).removeprefix('torch.')}; "
                    f"load the model with dtype=torch.float32"
                )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise ExactError(
                f"{name}: exact arithmetic is forward only and has no gradients; wrap the call in torch.no_grad() "
                f"(Oracle does so), or use NativeArithmetic where gradients are needed"
            )
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ExactError(f"{name}: all tensors must be on one device, got {', '.join(map(str, devices))}")
        device = devices.pop()
        require_trusted(device, max(tensor.numel() for tensor in tensors))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    hidden: list[Callable[P, R]] = []

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        # torch._dynamo takes a second to import: only who compiles has it, and only then it must be kept out.
        if "torch._dynamo" not in sys.modules:
            return run(*args, **kwargs)
        if not hidden:
            hidden.append(torch.compiler.disable(run))  # type: ignore[no-untyped-call]
        return hidden[0](*args, **kwargs)

    return guarded


def require_finite(x: Tensor, what: str) -> None:
    """Raise ExactError unless every value is finite."""
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    place = (~torch.isfinite(x)).nonzero()[0].tolist()
    raise ExactError(
        f"{what} is not finite at {place} ({float(x[tuple(place)])}); exact arithmetic is defined for finite float32 "
        f"values only: look for the first hook point where it appears"
    )
