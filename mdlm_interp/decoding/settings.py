"""What a sampler is, and what is kept of its run: plain settings, apart from any model."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

from mdlm_interp.decoding.checks import check_choice, check_count
from mdlm_interp.decoding.draws import Draw
from mdlm_interp.decoding.orders import Order, OrderName
from mdlm_interp.decoding.remasking import ReMDM, TakeBack
from mdlm_interp.decoding.rewriting import Rewrite
from mdlm_interp.decoding.schedules import Ancestral, Even, FirstHitting, Fixed, Threshold
from mdlm_interp.errors import ConfigError

Schedule = Ancestral | Even | Fixed | Threshold | FirstHitting | ReMDM | Rewrite
Told = Literal["share", "time"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a sampler is; none of it depends on the model."""

    schedule: Schedule = field(default_factory=Ancestral)
    """How many positions are written when."""
    order: Order | None = None
    """Which of them come first, for schedules that leave it open (Even, Fixed and Threshold); confidence if none."""
    draw: Draw = field(default_factory=Draw)
    """How a token is drawn."""
    take_back: TakeBack | None = None
    """Revision of what was written, beside ReMDM's own."""
    block_length: int | None = None
    """Write in blocks of this many positions, counted from each sequence's first mask, from left to right; the
    schedule's steps are those of one block."""
    guidance: float = 0.0
    """Strength w of classifier-free guidance towards the given tokens; each step then takes two passes."""
    sigma: Told = "share"
    """What a time-conditioned model is told: the noise of its share of masks, or of the schedule's time."""
    cache: bool = True
    """Do not run the model again on what has not changed."""

    def __post_init__(self) -> None:
        check_choice("sigma", self.sigma, Told)
        if isinstance(self.order, list):
            raise ConfigError(
                f"an order is a name or a tuple of positions, got a list; take tuple({self.order})"
            )
        if isinstance(self.order, str):
            check_choice("order", self.order, OrderName)
        if self.order is not None and not isinstance(self.schedule, Even | Fixed | Threshold):
            raise ConfigError(
                f"{type(self.schedule).__name__} chooses positions by itself, got the order {self.order!r}; "
                f"leave it out, or take Even, Fixed or Threshold"
            )
        stepped = self.schedule.n_steps is not None and not isinstance(self.schedule, Rewrite)
        if self.take_back is not None and not stepped:
            raise ConfigError(
                f"taking back needs a schedule with a number of steps (Ancestral or Even), got {self.schedule}"
            )
        if self.block_length is not None and self.block_length < 1:
            raise ConfigError(f"block_length must be at least 1, or none; got {self.block_length}")
        if self.block_length is not None and isinstance(self.schedule, Rewrite):
            raise ConfigError("rewriting has no masks to count blocks by; leave block_length out")
        if not 0.0 <= self.guidance < float("inf"):
            raise ConfigError(f"guidance must be at least 0 and finite, got {self.guidance}")

    @property
    def revises(self) -> bool:
        """Whether a step without masks may be followed by one with some."""
        return self.take_back is not None or isinstance(self.schedule, ReMDM)

    def to_mapping(self) -> dict[str, Any]:
        """The settings as JSON's plain values, with each part's kind."""
        settings = {
            name: {"kind": type(part).__name__, **asdict(part)}
            if is_dataclass(part) and not isinstance(part, type)
            else part
            for name, part in vars(self).items()
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a trajectory keeps beside tokens, reveal steps, confidence and entropy."""

    hooks: tuple[str, ...] = ()
    """Hook names or globs."""
    steps: Collection[int] | None = None
    """Steps, counted from 0, whose activations are kept; all if none."""
    keep: bool = True
    """Keep activations in the trajectory; else only `watch` sees them, one step at a time."""
    alternatives: int = 0
    """Most probable tokens kept for each position that may be written in a step."""

    def __post_init__(self) -> None:
        check_count("alternatives", self.alternatives, least=0)

    def wants(self, step: int) -> bool:
        """Whether a step's activations are kept."""
        return bool(self.hooks) and (self.steps is None or step in self.steps)
