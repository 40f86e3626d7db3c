"""Prediction stability: how early the model knows the token that it commits, and how much it changes its mind.

At every step the model predicts all masks, and the sampler writes a few. For a position that step c commits, the steps
that count are those up to c at which it is a mask (a token that was written and taken back is no prediction).
"""

# Axes: step, pair (step and the one after it), batch, pos, rank, vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import check_pair, chosen, need_filled, replay
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Bool, Float64, Int64


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Predictions at each step against the token that was committed."""

    rows: tuple[int, ...]
    """Of the trajectory's batch."""
    final: Int64[Tensor, "batch pos"]
    """Tokens at the end."""
    commit: Int64[Tensor, "batch pos"]
    """Step that wrote the final token over a mask; -1 where none did."""
    is_open: Bool[Tensor, "step batch pos"]
    """The position is a mask before this step, and will be committed in it or later."""
    top_tokens: Int64[Tensor, "step batch pos rank"]
    """The likeliest tokens under SUBS, the mask excluded; -1 where not open."""

    @property
    def k(self) -> int:
        """Tokens that overlaps are taken over."""
        return self.top_tokens.shape[-1]

    @property
    def agrees(self) -> Bool[Tensor, "step batch pos"]:
        """Open, and the likeliest token is the final one."""
        return self.is_open & (self.top_tokens[..., 0] == self.final)

    @property
    def agreement(self) -> Float64[Tensor, "batch pos"]:
        """Share of the open steps at which the likeliest token is the final one; NaN where there are none."""
        return self.agrees.sum(0).double() / self.is_open.sum(0).double()

    @property
    def settled(self) -> Int64[Tensor, "batch pos"]:
        """First open step from which on the likeliest token is the final one; -1 if it is another at the commit."""
        wrong = self.is_open & ~self.agrees
        last_wrong = _last(wrong)
        after = self.agrees & (_numbers(wrong) > last_wrong)
        return torch.where(after.any(0), after.int().argmax(0), -1)

    @property
    def last_change(self) -> Int64[Tensor, "batch pos"]:
        """Last open step whose likeliest token is another than at the open step before; -1 if it never changed."""
        top = self.top_tokens[..., 0]
        before = torch.full_like(top[0], -1)
        found = torch.full_like(top[0], -1)
        for step in range(len(top)):
            is_open = self.is_open[step]
            found = torch.where(is_open & (before >= 0) & (top[step] != before), step, found)
            before = torch.where(is_open, top[step], before)
        return found

    @property
    def shared(self) -> Float64[Tensor, "pair batch pos"]:
        """Tokens among the k likeliest at a step and at the next, as a share of k; NaN unless both are open."""
        now, then = self.top_tokens[:-1], self.top_tokens[1:]
        count = (now[..., :, None] == then[..., None, :]).any(-1).sum(-1).double()
        both = self.is_open[:-1] & self.is_open[1:]
        return torch.where(both, count / self.k, torch.nan)

    @property
    def jaccard(self) -> Float64[Tensor, "pair batch pos"]:
        """The same two sets: tokens in both over tokens in either."""
        count = self.shared * self.k
        return count / (2 * self.k - count)

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each position that was filled, as plain values."""
        settled, changed, agreement = self.settled, self.last_change, self.agreement
        shared, jaccard = self.shared, self.jaccard
        return [
            {
                "row": self.rows[b],
                "position": p,
                "token": int(self.final[b, p]),
                "commit": int(self.commit[b, p]),
                "open_steps": int(self.is_open[:, b, p].sum()),
                "settled": int(settled[b, p]),
                "last_change": int(changed[b, p]),
                "agreement": float(agreement[b, p]),
                "shared": float(shared[:, b, p].nanmean()),
                "jaccard": float(jaccard[:, b, p].nanmean()),
            }
            for b, p in (self.commit >= 0).nonzero().tolist()
        ]

    def summary(self) -> dict[str, Any]:
        """Over all filled positions."""
        filled = self.commit >= 0
        settled = self.settled[filled]
        lead = (self.commit[filled] - settled)[settled >= 0].double()
        return {
            "positions": int(filled.sum()),
            "top_at_commit": float((settled >= 0).double().mean()),
            "median_steps_settled_before_commit": float(lead.median()) if len(lead) else float("nan"),
            "agreement": float(self.agreement[filled].mean()),
            "shared": float(self.shared.nanmean()),
            "jaccard": float(self.jaccard.nanmean()),
            "k": self.k,
        }


def prediction_stability(
    model: HookedMDLM, trajectory: Trajectory, *, k: int = 5, rows: Sequence[int] | None = None
) -> Stability:
    """Follow what the model predicts at every mask, in every step.

    Raises:
        DataError: If k or a row is out of range, nothing was filled, or the model is not the one sampled from.
    """
    check_pair(model, trajectory)
    if not 1 <= k < model.config.vocab_size:
        raise DataError(f"k must be in [1, {model.config.vocab_size}), tokens that can be predicted; got {k}")
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    commit = trajectory.revealed_at[list(at_rows)].masked_fill(~need_filled(trajectory, at_rows), -1)
    top, is_open = [], []
    for seen in replay(model, trajectory, steps=range(trajectory.n_steps), rows=at_rows):
        still_open = seen.is_masked & (seen.step <= commit)
        # The mask is the last token, and SUBS never predicts it.
        logits = seen.logits[still_open.to(seen.logits.device)][:, : model.config.mask_id]
        likeliest = torch.full((*commit.shape, k), -1)
        likeliest[still_open] = logits.topk(k, -1).indices.cpu()
        top.append(likeliest)
        is_open.append(still_open)
    return Stability(
        rows=at_rows,
        final=trajectory.final[list(at_rows)],
        commit=commit,
        is_open=torch.stack(is_open),
        top_tokens=torch.stack(top),
    )


def _numbers(flags: Tensor) -> Int64[Tensor, "step 1 1"]:
    return torch.arange(len(flags))[:, None, None]


def _last(flags: Tensor) -> Int64[Tensor, "batch pos"]:
    """The last step with a flag; -1 where there is none."""
    return torch.where(flags, _numbers(flags), -1).amax(0)
