"""What an edit is about: a hook point, a head, attention edges or a feature, checked against the model.

place               part that an edit sees                      where it is written
hook point          the whole activation                        the hook point
head (l, h)         `attn.hook_z` of that head  [b p e]         the same slice
edge (l, h)         `attn.hook_pattern`  [b q k] or [b h q k]   the chosen queries and keys
feature (l, f)      its activation  [b p]                       outputs of all layers that it writes to
"""

# Axes: batch, pos, head, query, key, e (d_head)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from mdlm_interp.decoding.interventions import position_axis
from mdlm_interp.errors import DataError, nearest
from mdlm_interp.hooks import select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool
from transcoder.interventions.positions import Positions, where
from transcoder.model import CrossLayerTranscoder


class Place(Protocol):
    """A hook point and the part of its tensor that an edit sees."""

    @property
    def hook(self) -> str: ...

    def part(self, tensor: Tensor) -> Tensor:
        """What the edit sees of an activation, of this run or of another."""
        ...

    def mask(self, part: Tensor, x: Tensor, positions: Positions, whose: str) -> Bool[Tensor, "..."] | None:
        """Where the edit counts, to be broadcast to the part; None for everywhere."""
        ...

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        """The activation with the part in its place."""
        ...


@dataclass(frozen=True)
class HookPlace:
    """All of a hook point."""

    hook: str

    def part(self, tensor: Tensor) -> Tensor:
        return tensor

    def mask(self, part: Tensor, x: Tensor, positions: Positions, whose: str) -> Tensor | None:
        if positions is None:
            return None
        shape = [x.shape[0], *(1,) * (part.dim() - 1)]
        shape[position_axis(self.hook) or 1] = x.shape[1]
        return where(positions, x, whose).reshape(shape)

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        return part


@dataclass(frozen=True)
class HeadPlace:
    """What one head hands to the output projection."""

    layer: int
    head: int

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.attn.hook_z"

    def part(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, self.head]

    def mask(self, part: Tensor, x: Tensor, positions: Positions, whose: str) -> Tensor | None:
        return None if positions is None else where(positions, x, whose)[..., None]

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[:, :, self.head] = part
        return changed


@dataclass(frozen=True)
class EdgePlace:
    """What queries of one head, or of all, take from keys."""

    layer: int
    head: int | None
    keys: Positions

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.attn.hook_pattern"

    def part(self, tensor: Tensor) -> Tensor:
        return tensor if self.head is None else tensor[:, self.head]

    def mask(self, part: Tensor, x: Tensor, positions: Positions, whose: str) -> Tensor | None:
        edges = where(positions, x, whose)[:, :, None] & where(self.keys, x, f"{whose}, keys")[:, None, :]
        return edges[:, None] if self.head is None else edges

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        if self.head is None:
            return part
        changed = tensor.clone()
        changed[:, self.head] = part
        return changed


@dataclass(frozen=True)
class FeaturePlace:
    """The activation of a feature, which is computed from what its layer's encoder reads."""

    clt: CrossLayerTranscoder
    layer: int
    feature: int

    @property
    def hook(self) -> str:
        return self.clt.config.input_hooks[self.layer]

    @property
    def targets(self) -> Mapping[str, int]:
        """Hook points that it writes to, and which of its decoders does."""
        targets = self.clt.config.targets(self.layer)
        return {self.clt.config.output_hooks[target]: target - self.layer for target in targets}

    def part(self, tensor: Tensor) -> Tensor:
        return self.clt.encode_layer(tensor, self.layer)[..., self.feature]

    def mask(self, part: Tensor, x: Tensor, positions: Positions, whose: str) -> Tensor | None:
        return None if positions is None else where(positions, x, whose)

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        raise AssertionError("a feature is written at its targets")


AnyPlace: TypeAlias = HookPlace | HeadPlace | EdgePlace | FeaturePlace


def hook_places(hook: str, model: HookedMDLM, positions: Positions, whose: str) -> list[HookPlace]:
    """The hook points that a name or glob means.

    Raises:
        HookError: If it matches nothing.
        DataError: If one is the same at every position, and positions are given.
    """
    names = select_names(hook, model.hook_names)
    for name in names:
        if positions is not None and position_axis(name) is None:
            raise DataError(f"{whose}: {name} is the same at every position; leave positions out to edit it")
    return [HookPlace(name) for name in names]


def head_place(head: object, model: HookedMDLM, whose: str) -> HeadPlace:
    """A checked (layer, head)."""
    layer, number = _pair(head, whose, "head")
    _within("layer", layer, model.config.n_blocks, whose, "the model's blocks count from 0")
    _within("head", number, model.config.n_heads, whose, "heads count from 0 in each block")
    return HeadPlace(layer, number)


def edge_place(edge: object, keys: Positions, model: HookedMDLM, whose: str) -> EdgePlace:
    """A checked (layer, head) of a pattern; head None for all."""
    if isinstance(edge, tuple) and len(edge) == 2 and edge[1] is None and type(edge[0]) is int:
        _within("layer", edge[0], model.config.n_blocks, whose, "the model's blocks count from 0")
        return EdgePlace(edge[0], None, keys)
    checked = head_place(edge, model, whose)
    return EdgePlace(checked.layer, checked.head, keys)


def feature_place(feature: object, clt: CrossLayerTranscoder | None, whose: str) -> FeaturePlace:
    """A checked (layer, feature)."""
    if clt is None:
        raise DataError(
            f"{whose}: features need a transcoder, got a model alone; hand in ReplacementModel(model, clt)"
        )
    layer, number = _pair(feature, whose, "feature")
    _within("layer", layer, clt.config.n_layers, whose, "the transcoder's layers count from 0")
    _within("feature", number, clt.config.n_features, whose, "it is the number within its layer")
    return FeaturePlace(clt, layer, number)


def recorded(source: Mapping[str, Tensor], place: AnyPlace, whose: str) -> Tensor:
    """The part of another run's activation.

    Raises:
        DataError: If that run did not keep the hook point.
    """
    if place.hook not in source:
        raise DataError(
            f"{whose}: the run to patch from kept no {place.hook!r}{nearest(place.hook, source)}; "
            f"name it in run_with_cache"
        )
    return place.part(source[place.hook])


def _pair(value: object, whose: str, what: str) -> tuple[int, int]:
    if not isinstance(value, tuple) or len(value) != 2 or any(type(number) is not int for number in value):
        raise DataError(f"{whose}: a {what} is (layer, {what}), two whole numbers, got {value!r}")
    return value


def _within(what: str, number: int, end: int, whose: str, remedy: str) -> None:
    if not 0 <= number < end:
        raise DataError(f"{whose}: {what} must be in [0, {end}), got {number}; {remedy}")
