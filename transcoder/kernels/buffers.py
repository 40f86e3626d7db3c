"""Memory for the gradients of large parameters, kept from step to step.

A fresh gradient costs page faults, zeroing, and another pass to add it up; at a billion bytes a step that is as long
as the optimiser. Kernels that are handed a `GradientBuffers` write `parameter.grad` themselves instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Gradient(NamedTuple):
    """Where a kernel puts a gradient."""

    tensor: Tensor
    is_fresh: bool
    """Whether what the tensor holds counts as zero; otherwise the kernel adds to it."""

    def write(self, found: Tensor, part: int | slice = slice(None)) -> None:
        """Put a gradient there, or into a part of it."""
        if self.is_fresh:
            self.tensor[part] = found
        else:
            self.tensor[part] += found


class GradientBuffers:
    """One gradient for each parameter, for kernels called with `grads=`.

    Autograd then returns nothing for these parameters; what other operations add to their gradient still counts.
    `torch.autograd.grad` of them, and their hooks, need kernels without it.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._kept: dict[Tensor, Tensor | None] = dict.fromkeys(parameters)

    def take(self, parameter: Tensor) -> Gradient | None:
        """Where to write a parameter's gradient; None if it is not one of these."""
        if parameter not in self._kept:
            return None
        if parameter.grad is not None:
            return Gradient(parameter.grad, is_fresh=False)
        kept = self._kept[parameter]
        if kept is None:
            kept = self._kept[parameter] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        parameter.grad = kept
        return Gradient(kept.detach(), is_fresh=True)

    def release(self) -> None:
        """Count all gradients as zero; use it in the place of `optimiser.zero_grad()`."""
        for parameter in self._kept:
            parameter.grad = None
