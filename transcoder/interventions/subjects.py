"""What interventions are made on: a model, a model beside its transcoder, or one in which the transcoder stands in.

HookedMDLM              hook points, heads and edges
ReplacementModel        features too; the MLPs stay, and an edited feature adds its difference to their outputs
Spliced                 the MLPs are replaced by the transcoder, for any state and for decoding
LocalReplacement        the same at one masked state: with error terms, attention patterns and LayerNorm scales
                        held at the model's, each as chosen
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import HookFunction, HookPoint, select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float, Int64
from transcoder.error_terms import ErrorTerms
from transcoder.interventions.frozen import PATTERNS, SCALES, frozen_hooks
from transcoder.interventions.plan import Entry, Ground, Order, Plan
from transcoder.replacement import ReplacementModel


@dataclass(frozen=True)
class Spliced:
    """A replacement model in earnest: no error terms, nothing frozen.

    Args:
        layers: Blocks whose MLP is replaced; all by default.
    """

    replacement: ReplacementModel
    layers: Sequence[int] | None = None

    def ground(self) -> Ground:
        """The splice."""
        entries = _splice(self.replacement, self.layers, None)
        return Ground(self.replacement.model, self.replacement.clt, entries)


class LocalReplacement:
    """The replacement model of one masked state, from one pass of the model on it.

    With error terms its logits there are the model's: bit for bit those of a pass in which the patterns are listened
    to, which is every pass in exact arithmetic; torch's fused attention differs from that in the last bits.

    Args:
        input_ids: The state; one sequence serves a batch of equal ones too.
        timesteps: sigma, as the model takes it.
        layers: Blocks whose MLP is replaced; all by default.
        error_terms: Add what the reconstruction missed in that pass.
        patterns: Hold the attention patterns.
        scales: Hold the LayerNorm scales.
    """

    def __init__(
        self,
        replacement: ReplacementModel,
        input_ids: Int64[Tensor, "batch pos"],
        timesteps: Tensor | None = None,
        *,
        layers: Sequence[int] | None = None,
        error_terms: bool = True,
        patterns: bool = True,
        scales: bool = True,
    ) -> None:
        self.replacement, self.input_ids, self.timesteps = replacement, input_ids, timesteps
        self.layers, self.patterns, self.scales = layers, patterns, scales
        chosen = [*(PATTERNS if patterns else ()), *(SCALES if scales else ()), "hook_logits"]
        self.run: dict[str, Tensor] = {}
        """What is held, and the model's logits there, by hook point."""

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            self.run[hook.name] = tensor.clone()

        model = replacement.model
        names = select_names(chosen, model.hook_names)
        with torch.no_grad(), model.hooks(dict.fromkeys(names, keep), read_only=True):
            if error_terms:
                self.errors: ErrorTerms | None = replacement.error_terms(input_ids, timesteps)
            else:
                self.errors = None
                model(input_ids, timesteps)

    @property
    def logits(self) -> Float[Tensor, "batch pos vocab"]:
        """The model's own at this state."""
        return self.run["hook_logits"]

    def __call__(self) -> Float[Tensor, "batch pos vocab"]:
        """Raw logits of the local replacement model."""
        model = self.replacement.model
        with Plan(self.ground(), []).installed():
            logits: Tensor = model(self.input_ids, self.timesteps)
        return logits

    def ground(self) -> Ground:
        """What is held, and the splice."""
        model = self.replacement.model
        held = frozen_hooks(model, self.run, patterns=self.patterns, scales=self.scales)
        entries = [*_entries(Order.FROZEN, held), *_splice(self.replacement, self.layers, self.errors)]
        return Ground(model, self.replacement.clt, entries, self._check)

    def _check(self, x: Tensor) -> None:
        known = self.input_ids.to(x.device)
        fits = x.shape[1:] == known.shape[1:] and known.shape[0] in (1, x.shape[0])
        if not fits or not bool((x == known).all()):
            raise DataError(
                "a local replacement model is of one masked state, got other tokens; make a LocalReplacement of them"
            )


Subject: TypeAlias = HookedMDLM | ReplacementModel | Spliced | LocalReplacement


def ground_of(subject: object) -> Ground:
    """What a subject is without edits.

    Raises:
        DataError: If it is none.
    """
    if isinstance(subject, HookedMDLM):
        return Ground(subject)
    if isinstance(subject, ReplacementModel):
        return Ground(subject.model, subject.clt)
    if isinstance(subject, Spliced | LocalReplacement):
        return subject.ground()
    raise DataError(
        f"interventions are made on a HookedMDLM, ReplacementModel, Spliced or LocalReplacement, got "
        f"{type(subject).__name__}; of an Oracle hand in its .model"
    )


def _entries(order: Order, functions: Mapping[str, HookFunction]) -> list[Entry]:
    return [Entry(order, name, function) for name, function in functions.items()]


def _splice(
    replacement: ReplacementModel, layers: Sequence[int] | None, errors: ErrorTerms | None
) -> list[Entry]:
    reading, writing = replacement.splice_hooks(layers, errors)
    return [*_entries(Order.SPLICE_READ, reading), *_entries(Order.SPLICE_WRITE, writing)]
