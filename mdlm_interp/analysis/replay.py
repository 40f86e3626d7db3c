"""Runs the model again on the states of a trajectory, as the sampler ran it: the same tokens at the same sigma.

What is read is the model's own prediction. Guidance, temperature and interventions of the sampling run are no part of
it (interventions can be installed again around any analysis, with `model.hooks`).
"""

# Axes: step, batch, pos, vocab

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.diffusion import LogLinearSchedule
from mdlm_interp.errors import DataError
from mdlm_interp.hooks import NameSelection
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool, Float, Int64


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One state and what the model makes of it."""

    step: int
    """The step that begins with this state; the number of steps for the final state."""
    x: Int64[Tensor, "batch pos"]
    """Tokens, on the CPU."""
    is_masked: Bool[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos vocab"]
    """The model's, on its device."""
    cache: Mapping[str, Tensor] = field(default_factory=dict)
    """The activations that were asked for, on the model's device."""


def replay(
    model: HookedMDLM,
    trajectory: Trajectory,
    *,
    steps: Sequence[int],
    rows: Sequence[int],
    hooks: NameSelection = (),
) -> Iterator[Replayed]:
    """The states before the given steps, one pass each; the step after the last is the final state.

    Args:
        rows: Of the trajectory's batch.
        hooks: Names or globs whose activations are wanted; none by default.
    """
    wanted = isinstance(hooks, str) or hooks is None or callable(hooks) or bool(tuple(hooks))
    for step in steps:
        x = trajectory.states[step, list(rows)]
        sigma = sigma_at(trajectory, step)[list(rows)].to(model.device)
        with torch.no_grad():
            if wanted:
                logits, cache = model.run_with_cache(x.to(model.device), hooks, timesteps=sigma, clone=False)
                found: Mapping[str, Tensor] = cache
            else:
                logits, found = model(x.to(model.device), sigma), {}
        yield Replayed(step=step, x=x, is_masked=x == trajectory.mask_id, logits=logits, cache=found)


def sigma_at(trajectory: Trajectory, step: int) -> Float[Tensor, " batch"]:
    """Float32 sigma that the sampler told the model in a step; of the final state, what it would have told."""
    if trajectory.sampler.get("sigma") == "time":
        time = trajectory.t[step] if step < trajectory.n_steps else torch.zeros_like(trajectory.t[0])
        return LogLinearSchedule().sigma(time.double()).float()
    share = (trajectory.states[step] == trajectory.mask_id).double().mean(1)
    return LogLinearSchedule().sigma(share).float()


def filled(trajectory: Trajectory) -> Bool[Tensor, "batch pos"]:
    """Where the final token was written over a mask: what has a commit step, `trajectory.revealed_at`."""
    before = trajectory.states.gather(0, trajectory.revealed_at.clamp(min=0)[None])[0]
    return (trajectory.revealed_at >= 0) & (before == trajectory.mask_id)


def check_pair(model: HookedMDLM, trajectory: Trajectory) -> None:
    """Raise DataError unless the model can have made the trajectory, and gives the same result each time."""
    if trajectory.mask_id != model.config.mask_id:
        raise DataError(
            f"the trajectory's mask is token {trajectory.mask_id}, the model's {model.config.mask_id}; give the model "
            f"that was sampled from"
        )
    check_still(model)
    if trajectory.n_steps < 1:
        raise DataError("a trajectory to analyse has at least 1 step, got 0; were there no masks to fill?")


def check_still(model: HookedMDLM) -> None:
    """Raise DataError if the model gives another result each time."""
    if model.training and model.config.dropout > 0:
        raise DataError(
            "the model is in training mode and drops activations at random; call model.eval() first"
        )


def need_filled(trajectory: Trajectory, rows: Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """`filled` of some rows.

    Raises:
        DataError: If no step of these rows wrote a final token over a mask.
    """
    found = filled(trajectory)[list(rows)]
    if not bool(found.any()):
        raise DataError(
            f"no mask of rows {list(rows)} was filled, so there is no commit step to compare with; choose other rows"
        )
    return found


def chosen(name: str, values: Sequence[int] | None, end: int) -> tuple[int, ...]:
    """The numbers asked for, each in [0, end); all of them if none.

    Raises:
        DataError: If one is outside, comes twice, or none is left.
    """
    found = tuple(range(end)) if values is None else tuple(values)
    for value in found:
        if not 0 <= value < end:
            raise DataError(f"{name} must be in [0, {end}), got {value}")
    if len(set(found)) != len(found) or not found:
        raise DataError(f"{name} must be one or more different numbers, got {list(found)}")
    return found
