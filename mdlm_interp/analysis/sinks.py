"""Attention sinks and how they drift: which position each head looks at most, at every step.

What a position receives is the mean over queries of the attention paid to it; over all positions that adds up to 1, so
an even pattern gives 1 / length each. In a causal model the sink is the first token; here nothing is fixed, and the
positions that are masks change from step to step.

Source:
    Rulli et al. 2025, arXiv:2510.15731, on sinks that move while a diffusion language model decodes.
"""

# Axes: step, pair (of chosen steps), layer, head, batch, pos, query, key

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import check_pair, chosen, replay
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError, nearest
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool, Float64, Int64

Queries = Literal["all", "masked", "unmasked"]
QUERIES: tuple[Queries, ...] = ("all", "masked", "unmasked")


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Attention received by each position."""

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    rows: tuple[int, ...]
    """Of the trajectory's batch."""
    queries: Queries
    """Whose attention was counted."""
    tokens: Int64[Tensor, "step batch pos"]
    is_masked: Bool[Tensor, "step batch pos"]
    received: Float64[Tensor, "step layer head batch pos"]
    """Mean attention over queries; NaN where a state has none of them."""

    @property
    def position(self) -> Int64[Tensor, "step layer head batch"]:
        """The sink: the position that receives most, the first of equals; -1 where there are no queries."""
        top = self.received.nan_to_num(-1.0).max(-1)
        return torch.where(top.values >= 0, top.indices, -1)

    @property
    def share(self) -> Float64[Tensor, "step layer head batch"]:
        """What the sink receives of all attention; NaN where there are no queries."""
        return self.received.amax(-1)

    @property
    def moved(self) -> Float64[Tensor, "pair layer head batch"]:
        """Positions between a step's sink and the next chosen step's; NaN if either has none."""
        now, then = self.position[:-1], self.position[1:]
        far = (then - now).abs().double()
        return torch.where((now >= 0) & (then >= 0), far, torch.nan)

    @property
    def on_mask(self) -> Float64[Tensor, "step layer head batch"]:
        """1 if a mask stands at the sink, 0 if a token does; NaN where there is no sink."""
        position = self.position
        flags = self.is_masked[:, None, None].expand(*position.shape, -1)
        found = flags.gather(-1, position.clamp(min=0)[..., None])[..., 0].double()
        return torch.where(position >= 0, found, torch.nan)

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each step, layer, head and sequence that has a sink."""
        position, share, on_mask = self.position, self.share, self.on_mask
        found = []
        for s, layer, head, b in (position >= 0).nonzero().tolist():
            sink = int(position[s, layer, head, b])
            found.append(
                {
                    "step": self.steps[s],
                    "layer": self.layers[layer],
                    "head": head,
                    "row": self.rows[b],
                    "position": sink,
                    "token": int(self.tokens[s, b, sink]),
                    "is_masked": bool(on_mask[s, layer, head, b]),
                    "share": float(share[s, layer, head, b]),
                }
            )
        return found

    def summary(self) -> list[dict[str, Any]]:
        """By layer and head: the sink's mean share, how often and how far it moves, and how often it is a mask."""
        share, moved, on_mask, position = self.share, self.moved, self.on_mask, self.position
        found = []
        for place, layer in enumerate(self.layers):
            for head in range(share.shape[2]):
                steps = moved[:, place, head]
                known = steps[~steps.isnan()]
                found.append(
                    {
                        "layer": layer,
                        "head": head,
                        "share": float(share[:, place, head].nanmean()),
                        "moves": float((known > 0).double().mean()),
                        "mean_distance": float(known[known > 0].mean()),
                        "on_mask": float(on_mask[:, place, head].nanmean()),
                        "distinct_positions": _distinct(position[:, place, head]),
                    }
                )
        return found


def attention_sinks(
    model: HookedMDLM,
    trajectory: Trajectory,
    *,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    queries: Queries = "all",
) -> Sinks:
    """Attention that each position receives, from every head at every step.

    Args:
        queries: Count the attention of all positions, or only of those that are masks, or are not.
    Raises:
        DataError: If a step, layer or row does not exist, or the model is not the one sampled from.
    """
    check_pair(model, trajectory)
    if queries not in QUERIES:
        raise DataError(
            f"queries must be all, masked or unmasked, got {queries!r}{nearest(queries, QUERIES)}"
        )
    at_steps = chosen("steps", steps, trajectory.n_steps)
    at_layers = chosen("layers", layers, model.config.n_blocks)
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in at_layers]
    received, tokens, masked = [], [], []
    for seen in replay(model, trajectory, steps=at_steps, rows=at_rows, hooks=names):
        counted = {"all": torch.ones_like(seen.is_masked), "masked": seen.is_masked}.get(
            queries, ~seen.is_masked
        )
        found = [_received(seen.cache[name], counted) for name in names]
        received.append(torch.stack(found))
        tokens.append(seen.x)
        masked.append(seen.is_masked)
    return Sinks(
        steps=at_steps,
        layers=at_layers,
        rows=at_rows,
        queries=queries,
        tokens=torch.stack(tokens),
        is_masked=torch.stack(masked),
        received=torch.stack(received),
    )


def _received(pattern: Tensor, counted: Bool[Tensor, "batch query"]) -> Float64[Tensor, "head batch key"]:
    weights = counted.to(pattern.device).double()
    # 0 / 0 of a state without such queries is NaN, as promised.
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("bq,bhqk->hbk", weights, pattern.double()).cpu()


def _distinct(position: Int64[Tensor, "step batch"]) -> float:
    """Mean over sequences of how many different positions were the sink."""
    counts = [len(set(column[column >= 0].tolist())) for column in position.T]
    return sum(counts) / len(counts)
