"""Changing the model while it decodes: hook functions in chosen steps, layers and positions.

    zero = lambda tensor, hook: 0 * tensor
    Intervention("blocks.2.hook_mlp_out", zero, steps=range(4), positions=(5, 6))

The draws of other steps and positions stay what they were, since each has random numbers of its own: a difference
between two trajectories is the intervention's doing.
"""

# Axes: batch, pos

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.errors import DataError, HookError
from mdlm_interp.hooks import HookFunction, HookPoint, check_function

Positions = tuple[int, ...] | Callable[[Tensor], Tensor]
"""Positions, or a function from the tokens [batch pos] to booleans of that shape, such as `lambda x: x == mask_id`."""


@dataclass(frozen=True)
class Intervention:
    """A hook function for some of the steps and positions of a trajectory."""

    hook: str
    """Hook name or glob: the layers."""
    function: HookFunction
    """As in `HookedMDLM.hooks`: takes the tensor and the hook point; returns the new tensor, or writes in place."""
    steps: Collection[int] | None = None
    """Steps, counted from 0, in which it acts; all if none."""
    positions: Positions | None = None
    """Where its result counts; elsewhere the activation stays. Everywhere if none."""

    def acts(self, step: int) -> bool:
        """Whether it acts in a step."""
        return self.steps is None or step in self.steps

    def check(self, names: Sequence[str]) -> None:
        """Raise HookError for something that is no hook function, or for positions where a hook has none."""
        check_function(self.function, self.hook)
        for name in names:
            if self.positions is not None and position_axis(name) is None:
                raise HookError(f"{name} is the same at every position; leave positions out to change it")

    def bound(self, x: Tensor) -> HookFunction:
        """The function for one pass on tokens x, limited to its positions."""
        if self.positions is None:
            return self.function
        where = self._where(x)

        def limited(tensor: Tensor, hook: HookPoint) -> Tensor:
            before = tensor.clone()
            result = self.function(tensor, hook)
            after = tensor if result is None else result
            axis = position_axis(hook.name)
            shape = [x.shape[0], *(1,) * (tensor.dim() - 1)]
            shape[1 if axis is None else axis] = x.shape[1]
            # torch.where would broadcast a result of another shape: the hook point is to see and refuse it.
            if after.shape != before.shape:
                return after
            return torch.where(where.to(tensor.device).reshape(shape), after, before)

        return limited

    def _where(self, x: Tensor) -> Tensor:
        if callable(self.positions):
            found = self.positions(x)
            if found.shape != x.shape or found.dtype != torch.bool:
                raise DataError(
                    f"positions must give a boolean for each token {list(x.shape)}, "
                    f"got {str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
                )
            return found
        chosen = self.positions or ()
        if not all(0 <= position < x.shape[1] for position in chosen):
            raise DataError(f"positions must be in [0, {x.shape[1]}), got {list(chosen)}")
        where = torch.zeros(x.shape, dtype=torch.bool)
        where[:, list(chosen)] = True
        return where


def position_axis(name: str) -> int | None:
    """Which axis of a hook point counts positions (of queries in attention), or None if it has no such axis."""
    if ".adaln." in name or name.startswith("adaln_final.") or name == "hook_cond":
        return None
    return 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1
