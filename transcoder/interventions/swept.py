"""What a patching sweep found: effects, their agreement, a table and heat maps."""

# Axes: layer, pos, head; an effect is [layer pos], of heads [layer head pos]

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdlm_interp.errors import DataError, nearest
from mdlm_interp.tokenizers import Tokenizer
from transcoder.interventions.tables import text_table, token_text


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well effects by gradient tell the exact ones, over cells where either is not zero.

    Both are zero where the two runs have the same activation, and where it cannot reach the metric.
    """

    n: int
    """Cells compared."""
    correlation: float
    """Pearson's; NaN if there are fewer than two cells or one side is constant."""
    slope: float
    """Exact effect for one unit of estimate, by least squares through the origin: below 1, estimates are too large."""
    same_sign: float
    """Share of the cells in which both have the same sign; NaN if there are none."""


@dataclass(frozen=True, kw_only=True)
class PatchingSweep:
    """Effects on the metric, in its unit, by component."""

    exact: dict[str, Tensor]
    """Float64 metric with the patch minus metric without."""
    estimated: dict[str, Tensor]
    """The same by gradient; empty if it was not asked for."""
    metric_clean: float
    metric_corrupted: float
    clean: list[int]
    """Tokens."""
    corrupted: list[int]

    def recovered(self, component: str) -> Tensor:
        """Exact effects as a share of the whole difference: 1 brings the clean run's metric back.

        Raises:
            DataError: If both runs have the same metric.
        """
        whole = self.metric_clean - self.metric_corrupted
        if whole == 0:
            raise DataError(
                f"the clean and the corrupted run both have the metric {self.metric_clean:g}, so no share of their "
                f"difference is defined; read .exact, or change another token"
            )
        return self.exact[self._known(component)] / whole

    def agreement(self, component: str | None = None) -> Agreement:
        """Of one component, or of all cells together.

        Raises:
            DataError: If there is no such component, or the sweep has no gradients.
        """
        if not self.estimated:
            raise DataError("this sweep was made without gradients; repeat it with gradient=True")
        parts = list(self.exact) if component is None else [self._known(component)]
        exact, estimated = (
            torch.cat([side[part].flatten() for part in parts]) for side in (self.exact, self.estimated)
        )
        counts = (exact != 0) | (estimated != 0)
        exact, estimated = exact[counts], estimated[counts]
        return Agreement(
            n=len(exact),
            correlation=_pearson(exact, estimated),
            # 0 / 0 without an estimate that is not zero is NaN.
            slope=float((exact * estimated).sum() / estimated.square().sum()),
            same_sign=float((exact.sign() == estimated.sign()).double().mean()),
        )

    def agreement_table(self) -> str:
        """`agreement` of every component and of all, as text."""
        rows = []
        for part in (*self.exact, None):
            found = self.agreement(part)
            shown = [f"{found.correlation:.4f}", f"{found.slope:.3f}", f"{found.same_sign:.3f}"]
            rows.append([part or "all", str(found.n), *shown])
        return text_table(["component", "cells", "correlation", "slope", "same sign"], rows)

    def table(self, tokenizer: Tokenizer | None = None, k: int = 10) -> str:
        """The k cells of largest exact effect."""
        cells = [
            (part, *place)
            for part, effects in self.exact.items()
            for place in torch.ones_like(effects).nonzero().tolist()
        ]
        cells.sort(key=lambda cell: -abs(float(self.exact[cell[0]][tuple(cell[1:])])))
        rows = []
        for part, layer, *head, position in cells[:k]:
            place = (layer, *head, position)
            estimate = f"{float(self.estimated[part][place]):+.3f}" if self.estimated else "-"
            name = f"head {head[0]}" if head else part
            token = token_text(self.clean[position], tokenizer)
            effect = f"{float(self.exact[part][place]):+.3f}"
            rows.append([name, str(layer), f"{position} {token}", effect, estimate])
        return text_table(["component", "layer", "position", "exact", "by gradient"], rows, left=3)

    def plot(self, path: str | Path, tokenizer: Tokenizer | None = None) -> Path:
        """Write heat maps as a PNG; see `heat_maps.py`."""
        from transcoder.interventions.heat_maps import save_heat_maps

        return save_heat_maps(self, Path(path), self.labels(tokenizer))

    def labels(self, tokenizer: Tokenizer | None) -> Sequence[str]:
        """Each position's token; both where the runs differ, the corrupted one first."""
        pairs = zip(self.corrupted, self.clean, strict=True)
        return [
            token_text(one, tokenizer)
            if one == other
            else f"{token_text(one, tokenizer)} → {token_text(other, tokenizer)}"
            for one, other in pairs
        ]

    def _known(self, component: str) -> str:
        if component not in self.exact:
            raise DataError(f"this sweep has no {component!r}{nearest(component, self.exact)}")
        return component


def _pearson(a: Tensor, b: Tensor) -> float:
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    # 0 / 0 of a constant side is NaN, as promised.
    return float((a * b).sum() / (a.norm() * b.norm()))
