"""The logit lens along a trajectory: what the model would predict if it stopped after each block.

1. The residual stream behind each block (and the embedding) goes through the output layer as the last one does: final
   LayerNorm, the final adaLN modulation *at the same sigma*, unembedding. The last depth is the model's own prediction,
   bit for bit.
2. The logits are read under SUBS: the mask is never predicted, and a position that is no mask keeps its token with
   probability 1 at every depth. Only masked positions say something about the model.
3. Kept are probability and rank of the token that stands there at the end, and the likeliest token. A position that is
   still a mask at the end has no such token: its probability is 0 and its rank behind all tokens.

An early block need not write in the last one's coordinates: a small probability there does not prove that the block
knows nothing.

Source:
    nostalgebraist 2020, Interpreting GPT: the logit lens.
"""

# Axes: step, depth (0 the embedding, l + 1 behind block l), batch, pos, vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import Replayed, check_pair, chosen, filled, replay
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool, Float, Float64, Int64


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Predictions by step, depth and position."""

    steps: tuple[int, ...]
    rows: tuple[int, ...]
    """Of the trajectory's batch."""
    positions: tuple[int, ...]
    token: Int64[Tensor, "batch pos"]
    """At the end of the trajectory."""
    commit: Int64[Tensor, "batch pos"]
    """Step that wrote it over a mask; -1 where none did."""
    is_masked: Bool[Tensor, "step batch pos"]
    probability: Float64[Tensor, "step depth batch pos"]
    """Of the final token."""
    rank: Int64[Tensor, "step depth batch pos"]
    """Tokens that are likelier than the final one; 0 if it is the likeliest."""
    top_token: Int64[Tensor, "step depth batch pos"]
    top_probability: Float64[Tensor, "step depth batch pos"]

    @property
    def depths(self) -> tuple[str, ...]:
        """Names of the depths."""
        return ("embedding", *(f"block {layer}" for layer in range(self.probability.shape[1] - 1)))

    @property
    def to_commit(self) -> Int64[Tensor, "step batch pos"]:
        """Step minus the step that commits the position: 0 is the state that the token was drawn from."""
        return torch.tensor(self.steps)[:, None, None] - self.commit

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each step, depth and position, as plain values."""
        return [
            {
                "step": step,
                "depth": depth,
                "row": row,
                "position": position,
                "is_masked": bool(self.is_masked[s, b, p]),
                "token": int(self.token[b, p]),
                "probability": float(self.probability[s, d, b, p]),
                "rank": int(self.rank[s, d, b, p]),
                "top_token": int(self.top_token[s, d, b, p]),
                "top_probability": float(self.top_probability[s, d, b, p]),
            }
            for s, step in enumerate(self.steps)
            for d, depth in enumerate(self.depths)
            for b, row in enumerate(self.rows)
            for p, position in enumerate(self.positions)
        ]

    def summary(self) -> list[dict[str, Any]]:
        """By depth and step relative to the commit: how likely the final token is at positions still masked."""
        relative = self.to_commit
        counts = self.is_masked & (self.commit >= 0) & (relative <= 0)
        found = []
        for offset in sorted(set(relative[counts].tolist())):
            here = counts & (relative == offset)
            for d, depth in enumerate(self.depths):
                found.append(
                    {
                        "to_commit": offset,
                        "depth": depth,
                        "positions": int(here.sum()),
                        "probability": float(self.probability[:, d][here].mean()),
                        "is_top": float((self.rank[:, d][here] == 0).double().mean()),
                    }
                )
        return found


def logit_lens(
    model: HookedMDLM,
    trajectory: Trajectory,
    *,
    steps: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> LogitLens:
    """Read every block's residual stream as if it were the last, before each step.

    Args:
        steps: All if none; so are rows and positions.
    Raises:
        DataError: If a step, row or position is outside the trajectory, or the model is not the one sampled from.
    """
    check_pair(model, trajectory)
    at_steps = chosen("steps", steps, trajectory.n_steps)
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    at = chosen("positions", positions, trajectory.states.shape[2])
    token = trajectory.final[list(at_rows)][:, list(at)]
    names = [*depth_hooks(model), "adaln_final.hook_shift", "adaln_final.hook_scale"]
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("is_masked", "probability", "rank", "top_token", "top_probability")
    }
    for seen in replay(model, trajectory, steps=at_steps, rows=at_rows, hooks=names):
        with torch.no_grad():
            depths = [_read(model, seen, resid, at, token) for resid in depth_hooks(model)]
        found["is_masked"].append(seen.is_masked[:, list(at)])
        for place, name in enumerate(("probability", "rank", "top_token", "top_probability")):
            found[name].append(torch.stack([one[place] for one in depths]))
    commit = trajectory.revealed_at.masked_fill(~filled(trajectory), -1)
    return LogitLens(
        steps=at_steps,
        rows=at_rows,
        positions=at,
        token=token,
        commit=commit[list(at_rows)][:, list(at)],
        **{name: torch.stack(parts) for name, parts in found.items()},
    )


def depth_hooks(model: HookedMDLM) -> list[str]:
    """Hook points of the residual stream: what block 0 reads, then what each block leaves."""
    n_blocks = model.config.n_blocks
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(n_blocks))]


def lens_logits(
    model: HookedMDLM,
    resid: Float[Tensor, "batch pos d"],
    shift: Float[Tensor, "batch 1 d"],
    scale: Float[Tensor, "batch 1 d"],
) -> Float[Tensor, "batch pos vocab"]:
    """A residual stream through the output layer, modulated as given; hooks on the output layer do not run."""
    layer, arithmetic = model.backbone.output_layer, model.arithmetic
    normalized, _ = arithmetic.layer_norm(resid, layer.norm_final.weight)
    return layer.linear.forward(arithmetic.modulate(normalized, shift, scale), arithmetic)


def _read(
    model: HookedMDLM, seen: Replayed, name: str, at: Sequence[int], token: Int64[Tensor, "batch pos"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probability and rank of the tokens, the likeliest, and its probability, at one depth."""
    cache, x, is_masked = seen.cache, seen.x[:, list(at)], seen.is_masked[:, list(at)]
    # What carries over: the standing token for sure, and any other is less likely than that one alone.
    stays = x == token
    probability, rank = stays.double(), (~stays).long()
    top_token, top_probability = x.clone(), torch.ones_like(probability)
    if bool(is_masked.any()):
        # All positions go through one product: that of chosen rows alone may differ in its last bits.
        logits = lens_logits(
            model, cache[name], cache["adaln_final.hook_shift"], cache["adaln_final.hook_scale"]
        )
        # The mask is the last token, and SUBS leaves it out before anything is normalised.
        rows = logits[:, list(at)][is_masked.to(logits.device)][:, : model.config.mask_id]
        log_probs = rows.double().log_softmax(-1)
        # A position that is still a mask at the end has no token to be found.
        wanted = token[is_masked].to(rows.device)
        is_token = wanted < model.config.mask_id
        own = log_probs.gather(-1, wanted.clamp(max=model.config.mask_id - 1)[:, None])
        own = own.masked_fill(~is_token[:, None], -torch.inf)
        top = log_probs.max(-1)
        probability[is_masked] = own[:, 0].exp().cpu()
        rank[is_masked] = (log_probs > own).sum(-1).cpu()
        top_token[is_masked], top_probability[is_masked] = top.indices.cpu(), top.values.exp().cpu()
    return probability, rank, top_token, top_probability
