"""A sampler as options of a command or a config file: flat, checked, and turned into a `Sampler`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mdlm_interp.config_files import check_fields
from mdlm_interp.decoding.draws import Draw
from mdlm_interp.decoding.orders import Order
from mdlm_interp.decoding.remasking import ReMDM, TakeBack
from mdlm_interp.decoding.rewriting import Rewrite
from mdlm_interp.decoding.schedules import Ancestral, Even, FirstHitting, Fixed, Threshold
from mdlm_interp.decoding.settings import Sampler, Schedule
from mdlm_interp.errors import ConfigError

ReMasking = Literal["cap", "rescale", "conf", "loop", "low_confidence", "random"]
REMDM: tuple[ReMasking, ...] = ("cap", "rescale", "conf", "loop")
ETA = 0.02
By = Literal[
    "ancestral",
    "analytic",
    "first_hitting",
    "confidence",
    "drawn_confidence",
    "margin",
    "entropy",
    "random",
    "left_to_right",
]


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """Which sampler, by its options."""

    steps: int | None = None
    """Denoising steps, of each block if there are blocks; 64 if none."""
    by: By = "ancestral"
    """Sampler: ancestral, analytic, first_hitting, or an order in which positions are filled."""
    positions: tuple[int, ...] | None = None
    """Positions, counted from 0, in the order in which they are filled; instead of --by."""
    per_step: int | None = None
    """With an order: positions filled in each step, instead of --steps."""
    threshold: float | None = None
    """With an order: fill all positions that are at least this sure, and one a step; instead of --steps."""
    block_length: int | None = None
    """Fill blocks of this many positions one after the other."""
    temperature: float = 1.0
    """Divides the log-probabilities; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens; after the temperature, before top_p."""
    top_p: float | None = None
    """Draw from the smallest set of most probable tokens with this mass."""
    suppress: tuple[int, ...] = ()
    """Token ids that are never drawn, beside the mask."""
    remask: ReMasking | None = None
    """Take tokens back: as ReMDM (cap, rescale, conf, loop), or the least confident or random ones of each step."""
    eta: float = ETA
    """Strength of ReMDM (remask cap, rescale, conf or loop); the published one is 1 for conf."""
    guidance: float = 0.0
    """Strength of classifier-free guidance towards the prompt."""
    rewrite: Literal["least_confident", "most_confident"] | None = None
    """Start from random tokens and write positions again and again, per_step at a time, below the threshold."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._refuse_unused()
        self.sampler()

    def sampler(self) -> Sampler:
        """The sampler that the options describe."""
        by = self.remask
        return Sampler(
            schedule=self._schedule(),
            order=self._order(),
            draw=Draw(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, suppress=self.suppress
            ),
            take_back=TakeBack(by=by) if by == "low_confidence" or by == "random" else None,
            block_length=self.block_length,
            guidance=self.guidance,
        )

    def _order(self) -> Order | None:
        if self.positions is not None:
            return self.positions
        if self.by == "ancestral" or self.by == "analytic" or self.by == "first_hitting":
            return None
        return self.by

    def _schedule(self) -> Schedule:
        steps = 64 if self.steps is None else self.steps
        if self.rewrite is not None:
            given = 1.0 if self.threshold is None else self.threshold
            count = 1 if self.per_step is None else self.per_step
            return Rewrite(version=self.rewrite, steps=steps, per_step=count, threshold=given)
        if self._ordered:
            if self.threshold is not None:
                return Threshold(probability=self.threshold, of_drawn=self.by == "drawn_confidence")
            if self.per_step is not None:
                return Fixed(per_step=self.per_step)
            return Even(steps=steps)
        if self.by == "first_hitting":
            return FirstHitting()
        if self.by == "analytic":
            return Ancestral(steps=steps, noise="log_linear", end=1e-5, joint=True)
        grid = Ancestral(steps=steps)
        by = self.remask
        if by is None or by == "low_confidence" or by == "random":
            return grid
        return ReMDM(grid=grid, strategy=by, eta=self.eta)

    @property
    def _ordered(self) -> bool:
        return self._order() is not None

    def _refuse_unused(self) -> None:
        """Options that would change nothing are mistakes."""
        if self.positions is not None and self.by != "ancestral":
            raise ConfigError(
                f"positions are an order of their own, got by {self.by!r} too; give one of them"
            )
        if self.eta != ETA and self.remask not in REMDM:
            raise ConfigError(
                f"eta is the strength of ReMDM, got remask {self.remask or 'none'}; add --remask {' or '.join(REMDM)}"
            )
        if self.rewrite is not None:
            if self._ordered or self.by != "ancestral" or self.remask is not None:
                raise ConfigError("rewrite has an order of its own; leave by, positions and remask out")
            return
        needs_order = {"per_step": self.per_step, "threshold": self.threshold}
        for name, value in needs_order.items():
            if value is not None and not self._ordered:
                raise ConfigError(
                    f"{name} needs an order, got by {self.by!r}; add --by confidence or the like"
                )
        if self.remask in REMDM and (self._ordered or self.by != "ancestral"):
            raise ConfigError(
                f"remask {self.remask} is a kind of ancestral sampling; leave by and positions out"
            )
        ways = [name for name in ("steps", "per_step", "threshold") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ConfigError(
                f"{' and '.join(ways)} both say how many positions a step fills; give one of them"
            )
        if self.by == "first_hitting" and self.steps is not None:
            raise ConfigError("first_hitting fills one position a step; leave steps out")
