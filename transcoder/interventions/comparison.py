"""A masked state before and after an intervention: logits, probabilities, texts, and a table of what changed."""

# Axes: batch, pos, vocab

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mdlm_interp.diffusion import subs_log_probs
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Bool, Float, Float64, Int64
from mdlm_interp.tokenizers import Tokenizer
from transcoder.interventions.metrics import log_odds
from transcoder.interventions.tables import text_table, token_text


@dataclass(frozen=True)
class Change:
    """One token at one position."""

    row: int
    """Sequence of the batch."""
    position: int
    token: int
    before: float
    """Probability."""
    after: float
    log_odds_change: float
    """After minus before, in nats."""


@dataclass(frozen=True)
class Comparison:
    """The same state without an intervention and with it."""

    input_ids: Int64[Tensor, "batch pos"]
    mask_id: int
    logits_before: Float[Tensor, "batch pos vocab"]
    """Raw, as the model gives them."""
    logits_after: Float[Tensor, "batch pos vocab"]

    @property
    def is_masked(self) -> Bool[Tensor, "batch pos"]:
        """Where tokens are predicted."""
        return self.input_ids == self.mask_id

    @cached_property
    def log_probs_before(self) -> Float64[Tensor, "batch pos vocab"]:
        """SUBS log-probabilities in nats: never the mask, and given tokens stay."""
        return self._log_probs(self.logits_before)

    @cached_property
    def log_probs_after(self) -> Float64[Tensor, "batch pos vocab"]:
        """The same with the edits."""
        return self._log_probs(self.logits_after)

    @property
    def probabilities_before(self) -> Float64[Tensor, "batch pos vocab"]:
        """SUBS probabilities."""
        return self.log_probs_before.exp()

    @property
    def probabilities_after(self) -> Float64[Tensor, "batch pos vocab"]:
        """The same with the edits."""
        return self.log_probs_after.exp()

    @cached_property
    def kl(self) -> Float64[Tensor, "batch pos"]:
        """Kullback-Leibler divergence of after from before at each position, in nats; zero where given."""
        p, log_p, log_q = self.probabilities_before, self.log_probs_before, self.log_probs_after
        # The mask and others of probability 0 before have log-probability -inf in both.
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

    def changes(self, k: int = 5) -> list[Change]:
        """The k likeliest tokens of every mask, before and after; largest change of log-odds first.

        Raises:
            DataError: If k is below 1 or above the vocabulary without the mask.
        """
        n_tokens = self.logits_before.shape[-1] - 1
        if not 1 <= k <= n_tokens:
            raise DataError(f"k must be in [1, {n_tokens}], got {k}; it counts tokens to list at each mask")
        found = []
        for row, position in self.is_masked.nonzero().tolist():
            log_p, log_q = self.log_probs_before[row, position], self.log_probs_after[row, position]
            chosen = sorted({*log_p.topk(k).indices.tolist(), *log_q.topk(k).indices.tolist()})
            for token in chosen:
                metric = log_odds(position, token)
                change = float(metric(self.logits_after[row, None].double())) - float(
                    metric(self.logits_before[row, None].double())
                )
                found.append(
                    Change(row, position, token, float(log_p[token].exp()), float(log_q[token].exp()), change)
                )
        return sorted(found, key=lambda change: -abs(change.log_odds_change))

    def texts(self, tokenizer: Tokenizer) -> list[tuple[str, str]]:
        """Every sequence with its masks filled by the likeliest tokens, before and after."""
        filled = [
            log_probs.argmax(-1).tolist() for log_probs in (self.log_probs_before, self.log_probs_after)
        ]
        return [(tokenizer.decode(one), tokenizer.decode(two)) for one, two in zip(*filled, strict=True)]

    def table(self, tokenizer: Tokenizer | None = None, k: int = 3) -> str:
        """The likeliest tokens of every mask, before and after, as text."""
        rows = [
            [
                f"{change.row}:{change.position}",
                token_text(change.token, tokenizer),
                f"{change.before:.4f}",
                f"{change.after:.4f}",
                f"{change.log_odds_change:+.3f}",
            ]
            for change in self.changes(k)
        ]
        header = ["row:pos", "token", "p before", "p after", "log-odds change (nats)"]
        return text_table(header, rows, left=2) if rows else "no position is a mask, so nothing is predicted"

    def _log_probs(self, logits: Tensor) -> Tensor:
        return subs_log_probs(logits.double(), self.input_ids, self.mask_id)
