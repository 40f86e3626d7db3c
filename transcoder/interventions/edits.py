"""What can be done to a feature, a hook point, a head or an attention edge.

    Ablate(feature=(2, 17), positions=5)              its activation is 0
    Scale(3.0, feature=(2, 17))                       times 3
    Set(1.5, feature=(2, 17), positions=[4, 5])       is 1.5
    Steer(vector, hook="blocks.2.hook_resid_post")    plus a vector
    Patch(other, hook="blocks.2.hook_attn_out")       is what it was in another run
    Knockout(edge=(1, 0), positions=5, keys=[3])      query 5 does not see key 3

Each edit names one place, `positions` (see `positions.py`; queries of an edge) and, for decoding, `steps`. Edits of one
place act in the order of the list, each on what the one before left.
"""

# Axes: batch, pos, head, query, key

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from mdlm_interp.decoding import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from transcoder.interventions.positions import Positions
from transcoder.interventions.sites import (
    AnyPlace,
    edge_place,
    feature_place,
    head_place,
    hook_places,
    recorded,
)
from transcoder.model import CrossLayerTranscoder

Amount: TypeAlias = "float | Tensor"
"""A number, or a tensor that broadcasts to what is edited."""

PLACES = ("hook", "feature", "head", "edge")


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit(ABC):
    """A place in the model, where and when; what happens there is the subclass's."""

    hook: str | None = None
    """Hook name or glob."""
    feature: tuple[int, int] | None = None
    """(layer, feature)."""
    head: tuple[int, int] | None = None
    """(layer, head)."""
    edge: tuple[int, int | None] | None = None
    """(layer, head) of attention patterns; head None for all of the layer."""
    positions: Positions = None
    """Where it acts; everywhere by default. Of an edge: queries."""
    keys: Positions = None
    """Of an edge: keys; all by default."""
    steps: int | Collection[int] | None = None
    """Denoising step or steps, counted from 0, in which it acts; all by default. Only decoding has steps."""

    def __post_init__(self) -> None:
        named = [name for name in PLACES if getattr(self, name) is not None]
        if len(named) != 1:
            got = " and ".join(named) or "none of them"
            raise DataError(f"{type(self).__name__} names one of {', '.join(PLACES)}; got {got}")
        if self.keys is not None and self.edge is None:
            raise DataError(f"{self}: keys are an edge's; name edge=(layer, head), or leave keys out")
        steps = self.window or ()
        # A range may be too long to walk through.
        ends = (steps[0], steps[-1]) if isinstance(steps, range) and steps else steps
        early = next((step for step in ends if step < 0), None)
        if early is not None:
            raise DataError(f"{self}: steps count from 0, got {early}; the last of n steps is n - 1")

    def __str__(self) -> str:
        """The edit as an error or a table names it."""
        named = next((name for name in PLACES if getattr(self, name) is not None), "hook")
        return f"{type(self).__name__}({named}={getattr(self, named)!r})"

    @property
    def window(self) -> Collection[int] | None:
        """The steps in which it acts; None for all."""
        return (self.steps,) if isinstance(self.steps, int) else self.steps

    def places(self, model: HookedMDLM, clt: CrossLayerTranscoder | None) -> list[AnyPlace]:
        """What it is about in a model.

        Raises:
            HookError: If no hook point matches.
            DataError: If the model has no such layer, head or feature.
        """
        if self.hook is not None:
            return [*hook_places(self.hook, model, self.positions, str(self))]
        if self.head is not None:
            return [head_place(self.head, model, str(self))]
        if self.edge is not None:
            return [edge_place(self.edge, self.keys, model, str(self))]
        return [feature_place(self.feature, clt, str(self))]

    def by_step(self) -> list[Edit]:
        """The edit as edits that are the same in every step in which they act."""
        return [self]

    def applied(self, before: Tensor, mask: Tensor | None, place: AnyPlace) -> Tensor:
        """What it leaves of the part that it sees; outside the mask every bit stays."""
        after = self.new(before, place)
        return after if mask is None else torch.where(mask, after, before)

    @abstractmethod
    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """The part if the edit acted everywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Edit):
    """Write zero."""

    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """Zeros."""
        return torch.zeros_like(before)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Edit):
    """Multiply."""

    by: Amount = field(kw_only=False)

    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """by * before."""
        return fitting(self.by, before, f"{self}: by") * before


@dataclass(frozen=True, kw_only=True, eq=False)
class Set(Edit):
    """Replace by a number or a tensor."""

    to: Amount = field(kw_only=False)

    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """to."""
        return fitting(self.to, before, f"{self}: to").expand_as(before).clone()


@dataclass(frozen=True, kw_only=True, eq=False)
class Steer(Edit):
    """Add a number or a vector."""

    by: Amount = field(kw_only=False)

    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """before + by."""
        return before + fitting(self.by, before, f"{self}: by")


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch(Edit):
    """Replace by what another run had there: an `ActivationCache`, or a `Trajectory` with recorded activations.

    A trajectory's step n is patched into step n. A feature is encoded from what its layer's encoder read in that run.
    """

    source: Mapping[str, Tensor] | Trajectory = field(kw_only=False)

    def by_step(self) -> list[Edit]:
        """One for each recorded step of a trajectory.

        Raises:
            DataError: If a step was not recorded.
        """
        source = self.source
        if not isinstance(source, Trajectory):
            return [self]
        kept = source.activation_steps
        missing = [step for step in self.window or () if step not in kept]
        if missing or not kept:
            raise DataError(
                f"{self}: the trajectory recorded the activations of steps {list(kept)}, "
                f"got {missing[0] if missing else 'none'}; record them with sample(record=Record(hooks=...))"
            )
        return [
            replace(self, source={name: acts[at] for name, acts in source.activations.items()}, steps=(step,))
            for at, step in enumerate(kept)
            if self.window is None or step in self.window
        ]

    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """The other run's; of one sequence for all, or of as many."""
        assert not isinstance(self.source, Trajectory), "by_step makes one edit of each of its steps"
        found = recorded(self.source, place, str(self)).to(before)
        if found.shape[1:] != before.shape[1:] or found.shape[0] not in (1, before.shape[0]):
            raise DataError(
                f"{self}: the run to patch from has {list(found.shape)} there, this one {list(before.shape)}; "
                f"run both on sequences of one length"
            )
        return found.expand_as(before).clone()


@dataclass(frozen=True, kw_only=True, eq=False)
class Knockout(Edit):
    """Cut attention edges (or a head, which then writes zero).

    With renormalise, the rest of a cut query's row is divided by its sum, as if the softmax had not seen those keys;
    without, the query takes the rest as it was and so less in all. Sums are taken in float64.
    """

    renormalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edge is None and self.head is None:
            raise DataError(f"{self}: a knockout is of an edge or a head; Ablate takes the others")

    def applied(self, before: Tensor, mask: Tensor | None, place: AnyPlace) -> Tensor:
        """The pattern without the edges; rows that lose none keep every bit."""
        if self.edge is None or mask is None:
            return super().applied(before, mask, place)
        kept = before.masked_fill(mask, 0)
        if not self.renormalise:
            return kept
        cut = mask.any(-1, keepdim=True)
        total = kept.double().sum(-1, keepdim=True)
        if bool((cut & (total == 0)).any()):
            *_, query, _ = (cut & (total == 0)).expand_as(total).nonzero()[0].tolist()
            raise DataError(
                f"{self}: query {query} has no key left to share its attention; spare one, or pass renormalise=False"
            )
        return torch.where(cut, (kept.double() / total).to(before.dtype), before)

    def new(self, before: Tensor, place: AnyPlace) -> Tensor:
        """Zeros."""
        return torch.zeros_like(before)


def fitting(amount: object, before: Tensor, whose: str) -> Tensor:
    """A number or tensor in the type of what is edited.

    Raises:
        DataError: If it is neither, or does not broadcast to it.
    """
    try:
        value = torch.as_tensor(amount, device=before.device).to(before.dtype)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{whose} must be a number or a tensor, got {amount!r}") from None
    own = before.shape[before.dim() - value.dim() :] if value.dim() <= before.dim() else ()
    if len(own) != value.dim() or any(
        one not in (1, all_) for one, all_ in zip(value.shape, own, strict=True)
    ):
        raise DataError(
            f"{whose} must broadcast to {list(before.shape)}, got {list(value.shape)}; a number always does"
        )
    return value
