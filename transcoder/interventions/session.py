"""Interventions on a model: for passes in a `with` block, against the same pass without, or while decoding.

edits = [Ablate(feature=(2, 17), positions=5), Scale(0.5, head=(1, 0))]
with interventions(replacement, edits):
    logits = model(x_t)
print(interventions(replacement, edits).compare(x_t).table(tokenizer))
paths = interventions(replacement, edits, steps=range(4)).decode(start_tokens(model, 32), seed=1)
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.decoding import Record, Sampler, sample
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float, Int64
from transcoder.interventions.comparison import Comparison
from transcoder.interventions.edits import Edit
from transcoder.interventions.paths import Paths
from transcoder.interventions.plan import Plan
from transcoder.interventions.subjects import LocalReplacement, Subject, ground_of


class Interventions:
    """Edits on a subject; a context, and what compares with and without.

    Args:
        edits: One or several, which act in this order; none leaves the subject as it is.
        steps: Denoising steps, counted from 0, of the edits that name none themselves.
    Raises:
        HookError: If an edit names a hook point that the model does not have.
        DataError: If it names a layer, head or feature that there is not, or features of a model alone.
    """

    def __init__(
        self, subject: Subject, edits: Edit | Sequence[Edit], *, steps: int | Collection[int] | None = None
    ) -> None:
        self._subject = subject
        self.edits = [
            replace(edit, steps=steps) if edit.steps is None and steps is not None else edit
            for edit in edit_list(edits)
        ]
        self._ground = ground_of(subject)
        self._plan = Plan(self._ground, self.edits)
        self._installed: ExitStack | None = None

    def __enter__(self) -> Interventions:
        if self._installed is not None:
            raise DataError("these interventions are in effect already; leave that with block first")
        self._check_one_pass()
        with ExitStack() as stack:
            stack.enter_context(self._plan.installed())
            self._installed = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        installed, self._installed = self._installed, None
        if installed is not None:
            installed.close()

    def __call__(
        self, input_ids: Int64[Tensor, "batch pos"], timesteps: Tensor | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Raw logits under the edits, inside their `with` block or outside."""
        if self._installed is not None:
            logits: Tensor = self._ground.model(input_ids, timesteps)
            return logits
        with self:
            return self(input_ids, timesteps)

    @torch.no_grad()
    def compare(self, input_ids: Int64[Tensor, "batch pos"], timesteps: Tensor | None = None) -> Comparison:
        """One masked state without the edits and with them.

        Raises:
            DataError: If a position is outside the state.
        """
        after = self(input_ids, timesteps)
        with self._plan.idle().installed():
            before: Tensor = self._ground.model(input_ids, timesteps)
        return Comparison(input_ids, self._ground.model.config.mask_id, before, after)

    def decode(
        self,
        start: Int64[Tensor, "batch pos"],
        sampler: Sampler | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        record: Record | None = None,
        **settings: Any,
    ) -> Paths:
        """A trajectory without the edits and one with them, of the same random draws.

        Each draw is a function of (seed, step, sequence's number, position), so an edit shifts none of them.

        Args:
            settings: As `mdlm_interp.decoding.sample` takes them, for both.
        Raises:
            DataError: If the subject is of one masked state, a position is outside the sequences, or an edit
                names steps and none of them is taken.
        """
        if isinstance(self._subject, LocalReplacement):
            raise DataError(
                "a local replacement model is of one masked state and decoding has many; "
                "decode with the ReplacementModel, or with Spliced"
            )
        model = self._ground.model
        given = {"seed": seed, "indices": indices, "record": record, **settings}
        with self._plan.decoding() as functions:
            after = sample(model, start, sampler, interventions=functions, **given)
        # How many steps a schedule without a number of them takes is known to nobody beforehand.
        if (sampler or Sampler()).schedule.n_steps is not None:
            self._check_steps(after.n_steps)
        with self._plan.idle().decoding() as functions:
            before = sample(model, start, sampler, interventions=functions, **given)
        return Paths(before, after)

    def _check_steps(self, n_steps: int) -> None:
        for edit in self.edits:
            # An empty collection says that the edit is not to act; one that misses every step does not mean to.
            if edit.window and not any(step in edit.window for step in range(n_steps)):
                raise DataError(
                    f"{edit} acts in none of the {n_steps} denoising steps, got steps {edit.steps!r}; they count from 0"
                )

    def _check_one_pass(self) -> None:
        stepped = next(
            (edit for edit in self.edits if any(one.steps is not None for one in edit.by_step())), None
        )
        if stepped is not None:
            raise DataError(
                f"{stepped} is limited to denoising steps, which a single pass does not have; "
                f"use decode(), or leave steps out"
            )


def edit_list(given: object) -> list[Edit]:
    """One edit or several as a list.

    Raises:
        DataError: If something else is among them.
    """
    edits: list[Edit] = []
    for edit in given if isinstance(given, Sequence) else [given]:
        if not isinstance(edit, Edit):
            raise DataError(
                f"an edit is an Ablate(...), Scale(...), Set(...), Steer(...), Patch(...) or Knockout(...), "
                f"got {edit!r}"
            )
        edits.append(edit)
    return edits


def interventions(
    subject: Subject, edits: Edit | Sequence[Edit], *, steps: int | Collection[int] | None = None
) -> Interventions:
    """Edits on a model, ready for a `with` block, `compare` or `decode`; see `Interventions`."""
    return Interventions(subject, edits, steps=steps)
