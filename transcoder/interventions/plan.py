"""Edits as functions on hook points, in an order that gives several at once one meaning.

At each hook point: what is frozen first; edits of what encoders read before anything is encoded from it; the splice's
reconstruction before what edited features add to it; edits of other hook points last, so that a value set there stands.
"""

# Axes: batch, pos, feature

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.decoding import Intervention
from mdlm_interp.errors import DataError
from mdlm_interp.hooks import HookFunction, HookPoint
from mdlm_interp.model import HookedMDLM
from transcoder.feature_edits import with_change
from transcoder.interventions.edits import Edit
from transcoder.interventions.positions import where
from transcoder.interventions.sites import AnyPlace, FeaturePlace
from transcoder.model import CrossLayerTranscoder


class Order(IntEnum):
    """When functions on the same hook point run."""

    FROZEN = 0
    ENCODER_INPUT = 1
    SPLICE_READ = 2
    FEATURE_READ = 3
    SPLICE_WRITE = 4
    FEATURE_WRITE = 5
    REST = 6


@dataclass(frozen=True)
class Entry:
    """One function on one hook point."""

    order: Order
    hook: str
    function: HookFunction
    steps: Collection[int] | None = None


@dataclass(frozen=True)
class Ground:
    """What holds with or without edits."""

    model: HookedMDLM
    clt: CrossLayerTranscoder | None = None
    entries: Sequence[Entry] = ()
    """A splice, frozen parts."""
    check: Callable[[Tensor], None] | None = None
    """Raises an error for tokens that it is not for."""


class PassState:
    """What the functions of one plan know of the pass that is running."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Before a pass: nothing is encoded."""
        self.acts: dict[int, Tensor] = {}
        """Activations of the layers read so far."""
        self.edited: dict[tuple[int, int], Tensor] = {}
        """Activations [batch pos] of (layer, feature) as the edits so far leave them."""

    def change(self, key: tuple[int, int]) -> Tensor | None:
        """What the edits of a feature add to its activation, all together; None if none acts in this pass."""
        layer, feature = key
        return self.edited[key] - self.acts[layer][..., feature] if key in self.edited else None

    @property
    def x(self) -> Tensor:
        """The tokens of the pass."""
        if self.tokens is None:
            raise DataError(
                "the tokens of this pass are not known, which interventions need; call the model itself, not a "
                "compiled one or its forward()"
            )
        return self.tokens


class Plan:
    """Edits compiled for one model.

    Raises:
        HookError: If an edit names a hook point that the model does not have.
        DataError: If it names a layer, head or feature that there is not.
    """

    def __init__(self, ground: Ground, edits: Sequence[Edit]) -> None:
        self._ground, self._edits, self._state = ground, list(edits), PassState()
        clt = ground.clt
        self._inputs = frozenset(clt.config.input_hooks) if clt is not None else frozenset()
        self._edited: list[Entry] = []
        self._written: set[tuple[int, int]] = set()
        for edit in edits:
            for one in edit.by_step():
                for place in one.places(ground.model, clt):
                    self._edited += self._entries(one, place)
        self.entries = sorted([*ground.entries, *self._edited], key=lambda entry: entry.order)

    def idle(self) -> Plan:
        """The same without what the edits do, listening where they listen.

        Attention whose pattern is listened to is computed without the fused kernel: with this as the baseline, a
        difference is the edits' doing to the last bit.
        """
        found = Plan(self._ground, [])
        found.entries += [replace(entry, function=_look) for entry in self._edited]
        return found

    @contextmanager
    def installed(self) -> Iterator[None]:
        """All functions on the model, for the length of a `with` block."""
        with self._told(), ExitStack() as stack:
            for entry in self.entries:
                stack.enter_context(self._ground.model.hooks({entry.hook: entry.function}))
            yield

    @contextmanager
    def decoding(self) -> Iterator[list[Intervention]]:
        """The functions as the sampler takes them."""
        with self._told():
            yield [Intervention(entry.hook, entry.function, steps=entry.steps) for entry in self.entries]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The state hears of every pass before it begins, and the positions are checked then."""

        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input_ids"]
            self._state.clear()
            self._state.tokens = x
            if self._ground.check is not None:
                self._ground.check(x)
            for edit in self._edits:
                if not callable(edit.positions):
                    where(edit.positions, x, str(edit))
                if not callable(edit.keys):
                    where(edit.keys, x, f"{edit}, keys")

        handle = self._ground.model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._state.clear()
            self._state.tokens = None

    def _entries(self, edit: Edit, place: AnyPlace) -> list[Entry]:
        if isinstance(place, FeaturePlace):
            return self._feature_entries(edit, place)
        state = self._state

        def change(tensor: Tensor, hook: HookPoint) -> Tensor | None:
            part = place.part(tensor)
            mask = place.mask(part, state.x, edit.positions, str(edit))
            return unless_same_scale(tensor, place.put(tensor, edit.applied(part, mask, place)), hook)

        order = Order.ENCODER_INPUT if place.hook in self._inputs else Order.REST
        return [Entry(order, place.hook, change, edit.window)]

    def _feature_entries(self, edit: Edit, place: FeaturePlace) -> list[Entry]:
        state, key = self._state, (place.layer, place.feature)

        def read(tensor: Tensor, hook: HookPoint) -> None:
            if place.layer not in state.acts:
                state.acts[place.layer] = place.clt.encode_layer(tensor, place.layer)
            before = state.edited.get(key, state.acts[place.layer][..., place.feature])
            mask = place.mask(before, state.x, edit.positions, str(edit))
            state.edited[key] = edit.applied(before, mask, place)

        def writing(decoder: int) -> HookFunction:
            def write(tensor: Tensor, hook: HookPoint) -> Tensor | None:
                change = state.change(key)
                if change is None:
                    return None
                return with_change(
                    tensor, change, place.clt.decoder_rows(place.layer, place.feature)[decoder]
                )

            return write

        entries = [Entry(Order.FEATURE_READ, place.hook, read, edit.window)]
        if key not in self._written:
            # Several edits of one feature are written as one change: those that cancel leave every bit.
            self._written.add(key)
            for hook, decoder in place.targets.items():
                entries.append(Entry(Order.FEATURE_WRITE, hook, writing(decoder)))
        return entries


def unless_same_scale(tensor: Tensor, changed: Tensor, hook: HookPoint) -> Tensor | None:
    """The changed tensor; None for a LayerNorm's scale that is as it was.

    A replaced scale makes the norm be computed again from it, which rounds otherwise than torch's kernel. With
    gradients it is replaced in any case: a frozen scale has none.
    """
    is_scale = hook.name.endswith(("ln1.hook_scale", "ln2.hook_scale", "ln_final.hook_scale"))
    watched = torch.is_grad_enabled() and (tensor.requires_grad or changed.requires_grad)
    return None if is_scale and not watched and torch.equal(tensor, changed) else changed


def _look(tensor: Tensor, hook: HookPoint) -> None:
    """Listens and leaves all as it is."""
