"""Decoding as a film: what each position is after each step, of a finished trajectory or of one under way."""

# Axes: batch, pos

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from mdlm_interp.decoding.trajectory import Seen, Trajectory
from mdlm_interp.errors import DataError


class State(StrEnum):
    """What a position is to the viewer."""

    GIVEN = "given"
    """Stood there from the start and could not be written: a prompt."""
    MASK = "mask"
    """Not written yet."""
    NEW = "new"
    """Written, or written anew, in the step just taken."""
    SETTLED = "settled"
    """Written before."""
    TAKEN_BACK = "back"
    """A mask again since the step just taken."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One sequence after some number of steps."""

    number: int
    """Steps taken; 0 is the start."""
    n_steps: int | None
    """Steps of the whole run at most, if known."""
    t: float | None
    """Time at the start of the step just taken, in [0, 1]."""
    tokens: tuple[int, ...]
    """Token of each position."""
    states: tuple[State, ...]
    """What each position is."""

    def count(self, *wanted: State) -> int:
        """Positions in any of these states."""
        return sum(state in wanted for state in self.states)


class Film:
    """The frames of one batch. A run under way adds to them; both kinds show the same of the same steps."""

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id
        self.n_steps: int | None = None
        self._tokens: list[Tensor] = []
        self._times: list[Tensor] = []
        self._given = torch.empty(0, dtype=torch.bool)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Film:
        """The whole film of a trajectory."""
        film = cls(trajectory.mask_id)
        film.n_steps = trajectory.n_steps
        film._tokens, film._times = list(trajectory.states), list(trajectory.t)
        film._given = given(trajectory)
        return film

    def add(self, seen: Seen) -> None:
        """The next step of a run.

        Raises:
            DataError: If it is not the next step.
        """
        if not self._tokens:
            self._given = (seen.before != self.mask_id) & ~seen.is_open
            self._tokens.append(seen.before)
        if seen.number != self.last:
            raise DataError(f"a film is told of its steps in order: expected {self.last}, got {seen.number}")
        self.n_steps = seen.n_steps
        self._tokens.append(seen.after)
        self._times.append(seen.t)

    @property
    def last(self) -> int:
        """Number of the newest frame."""
        return len(self._tokens) - 1

    @property
    def batch(self) -> int:
        """Sequences in it."""
        return self._tokens[0].shape[0]

    def frame(self, number: int, row: int = 0) -> Frame:
        """One sequence after some number of steps."""
        tokens = self._tokens[number][row].tolist()
        before = self._tokens[max(number - 1, 0)][row].tolist()
        known = self._given[row].tolist()
        return Frame(
            number=number,
            n_steps=self.n_steps,
            t=float(self._times[number - 1][row]) if number else None,
            tokens=tuple(tokens),
            states=tuple(map(self._state, before, tokens, known)),
        )

    def _state(self, before: int, token: int, is_given: bool) -> State:
        if token == self.mask_id:
            return State.MASK if before == token else State.TAKEN_BACK
        if before != token:
            return State.NEW
        return State.GIVEN if is_given else State.SETTLED


def given(trajectory: Trajectory) -> Tensor:
    """Positions [batch pos] that hold a token from the start and could not be written."""
    stood = trajectory.states[0] != trajectory.mask_id
    # A position that may be written has a confidence; one that waits for its block has none yet, but is a mask.
    return stood & trajectory.confidence[0].isnan() if trajectory.n_steps else stood
