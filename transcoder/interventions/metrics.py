"""What a sweep measures of the logits: a number for each sequence, with a gradient."""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import DataError

Metric: TypeAlias = Callable[[Tensor], Tensor]
"""From raw logits [batch pos vocab] to one number for each sequence [batch]."""


def log_odds(position: int, token: int) -> Metric:
    """log(p / (1 - p)) of a token at a position, in nats, the mask being impossible as SUBS has it.

    Adding a constant to every raw logit changes no prediction, and does not change this.

    >>> logits = torch.tensor([[[0.0, 0.0, 9.0]]])  # two tokens, equally likely, and the mask
    >>> float(log_odds(0, 1)(logits))
    0.0
    """

    def measured(logits: Tensor) -> Tensor:
        row = _row(logits, position, token)
        # The mask is the last token.
        is_other = torch.arange(row.shape[-1] - 1, device=row.device) != token
        return row[:, token] - row[:, :-1][:, is_other].logsumexp(-1)

    return measured


def logit_difference(position: int, token: int, other: int) -> Metric:
    """Logit of a token minus that of another, in nats: the log of the ratio of their probabilities."""

    def measured(logits: Tensor) -> Tensor:
        row = _row(logits, position, token)
        return row[:, token] - _row(logits, position, other)[:, other]

    return measured


def _row(logits: Tensor, position: int, token: int) -> Tensor:
    n_positions, mask_id = logits.shape[1], logits.shape[2] - 1
    if not 0 <= position < n_positions:
        raise DataError(
            f"position must be in [0, {n_positions}), got {position}; it counts from 0 in each sequence"
        )
    if not 0 <= token < mask_id:
        raise DataError(f"token must be in [0, {mask_id}), which leaves out the mask, got {token}")
    return logits[:, position]
