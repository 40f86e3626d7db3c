"""Fine-tuning a masked encoder into a diffusion language model: masks in the answers, cross-entropy at the masks.

1. Of an example's n answer tokens max(floor(n u), 1) are chosen without replacement, u uniform in [0.15, 0.99].
2. The rule says what becomes of each: the mask, a random token, or left as it is; all of them are predicted.
3. The loss is the plain mean of the cross-entropy over the chosen tokens: no weight 1/t, so it bounds nothing.

Masks are drawn anew in each epoch, as a pure function of (seed, epoch, example). The published recipe draws them once
in preprocessing and lets the padding be attended to; both are options here.

Source:
    github.com/tom-pollak/dllm at 43ea9ff, train_dllm.py; github.com/tom-pollak/FlowLM at 3168765 (the rules).
"""

# Axes: batch, pos, vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.config_files import check_fields
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Bool, Float, Float32, Int64

IGNORED = -100
"""Label of a position without loss: torch's own default."""

SHARE_BOUNDS = (0.25, 0.5, 0.75, 1.0)
"""Upper ends of the shares of masked answer tokens by which accuracy is told apart, as published."""

Rule = Literal["pure_mask", "bert", "llada", "flowlm", "pure_random"]

RULES: dict[Rule, tuple[float, float]] = {
    "pure_mask": (1.0, 0.0),
    "bert": (0.8, 0.1),
    "llada": (0.9, 0.1),
    "flowlm": (0.2, 0.7),
    "pure_random": (0.0, 1.0),
}
"""Shares of the chosen tokens that become the mask and a random token; the rest stay."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How answers are corrupted."""

    rule: Rule = "pure_mask"
    """Chosen tokens become: pure_mask, masks; bert, .8 masks .1 random .1 kept; llada, .9 .1 0; flowlm, .2 .7 .1;
    pure_random, random tokens."""
    lowest: float = 0.15
    """Smallest share of an answer's tokens that is chosen."""
    highest: float = 0.99
    """Largest share of an answer's tokens that is chosen."""
    static: bool = False
    """Keep an example's masks in all epochs, as published; else they are drawn anew in each."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.0 <= self.lowest <= self.highest <= 1.0:
            raise ConfigError(
                f"lowest and highest must be shares with lowest <= highest, got {self.lowest} and {self.highest}; "
                f"0.15 and 0.99 are as published"
            )


@dataclass(frozen=True)
class Masked:
    """One example with holes in its answers."""

    ids: NDArray[np.int64]
    """What the model sees [pos]."""
    labels: NDArray[np.int64]
    """The token to predict, or IGNORED [pos]."""


def mask_answers(
    ids: NDArray[np.int64],
    is_answer: NDArray[np.bool_],
    masking: MaskingConfig,
    *,
    mask_id: int,
    random_ids: NDArray[np.int64],
    seed: int,
    epoch: int,
    example: int,
) -> Masked:
    """Corrupt one example [pos]; a pure function of (seed, epoch, example), and with static masks of (seed, example).

    Args:
        random_ids: Tokens that a random one is drawn from, each equally often.
    Raises:
        DataError: If no token is an answer's.
    """
    candidates = np.flatnonzero(is_answer)
    n = len(candidates)
    if n == 0:
        raise DataError(f"example {example} has no answer token to mask; leave it out or raise max_length")
    stream = f"dllm:mask:{0 if masking.static else epoch}"
    draws = uniforms(seed, stream, example, 1 + 3 * n)
    share = masking.lowest + (masking.highest - masking.lowest) * draws[0]
    order, dice, where = draws[1:].reshape(3, n)
    chosen = np.sort(np.argsort(order, kind="stable")[: max(int(n * share), 1)])
    labels = np.full(len(ids), IGNORED, np.int64)
    labels[candidates[chosen]] = ids[candidates[chosen]]
    to_mask, to_random = RULES[masking.rule]
    masked = chosen[dice[chosen] < to_mask]
    changed = chosen[(dice[chosen] >= to_mask) & (dice[chosen] < to_mask + to_random)]
    seen = ids.copy()
    seen[candidates[masked]] = mask_id
    seen[candidates[changed]] = random_ids[(where[changed] * len(random_ids)).astype(np.int64)]
    return Masked(seen, labels)


def pad(
    rows: Sequence[NDArray[np.int64]], fill: int, length: int | None = None
) -> Int64[Tensor, "batch pos"]:
    """Rows of one length, filled up at the end.

    Args:
        length: What they are filled up to; the longest row's length if none.
    """
    length = max(len(row) for row in rows) if length is None else length
    return torch.from_numpy(
        np.stack([np.pad(row, (0, length - len(row)), constant_values=fill) for row in rows])
    )


def masked_loss_sum(
    logits: Float[Tensor, "batch pos vocab"], labels: Int64[Tensor, "batch pos"]
) -> Float32[Tensor, ""]:
    """Cross-entropy summed over the labelled positions of the batch, in nats; each token counts the same."""
    wanted = labels != IGNORED
    return F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")


@dataclass(frozen=True)
class ByShare:
    """Of the examples with such a share of masked answer tokens."""

    at_most: float
    """Largest share; the smallest is above that of the entry before."""
    n_tokens: int
    """Tokens that were predicted."""
    accuracy: float
    """Share of them whose most probable token is right; NaN of none."""


def accuracy_by_share(
    predicted: Int64[Tensor, "batch pos"],
    labels: Int64[Tensor, "batch pos"],
    is_answer: Bool[Tensor, "batch pos"],
) -> tuple[ByShare, ...]:
    """How often the best token is right, told apart by the share of masked answer tokens.

    Source:
        tom-pollak/FlowLM at 3168765, src/flowlm/evaluation.py.
    """
    wanted = labels != IGNORED
    share = wanted.sum(1) / is_answer.sum(1)
    right = wanted & (predicted == labels)
    found, below = [], -1.0
    for bound in SHARE_BOUNDS:
        rows = (share > below) & (share <= bound)
        n_tokens = int(wanted[rows].sum())
        accuracy = int(right[rows].sum()) / n_tokens if n_tokens else float("nan")
        found.append(ByShare(bound, n_tokens, accuracy))
        below = bound
    return tuple(found)
