"""Which predictions a graph explains, and what is meant by a logit.

A raw logit says little: a constant added to all logits changes no prediction. So a logit node stands for a linear
combination of the logits at its position whose weights add up to zero; the mask, which SUBS makes impossible, has
weight zero.

    centre      value                                weights
    mean        logit minus mean over the vocabulary  1 for the token, minus 1 / (vocabulary without the mask) for all
    log_odds    first-order log(p / (1 - p))          1 for the token, minus its probability among the others for each

`mean` is linear as it stands. The log-odds are not; their weights are their derivative at this state, so that the
value is the linear combination with those weights and not the log-odds themselves. They are the default: what moves
all likely tokens alike moves a logit against the mean of thousands of unlikely ones, and no prediction. `mean` is as
published.

Source:
    Ameisen et al. 2025, Circuit Tracing (logit minus mean; tokens to 95 % of the probability, 10 at most).
"""

# Axes: pos, vocab, logit

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.shapes import Float, Float64, Int64
from transcoder.evaluation import masked_log_probs

Centre: TypeAlias = Literal["mean", "log_odds"]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The logits to explain, at masked positions."""

    positions: Sequence[int] | None = None
    """Masked positions whose likeliest tokens are explained; all if none."""
    tokens: Mapping[int, Sequence[int]] | None = None
    """Tokens by position, instead of the likeliest."""
    mass: float = 0.95
    """Take the likeliest tokens until their probabilities add up to this."""
    max_tokens: int = 10
    """But at most this many at a position."""
    centre: Centre = "log_odds"
    """What a logit is relative to."""

    def __post_init__(self) -> None:
        if self.positions is not None and self.tokens is not None:
            raise ConfigError("positions and tokens both say where to look; give one of them")
        if not 0.0 < self.mass <= 1.0:
            raise ConfigError(f"mass must be in (0, 1], got {self.mass}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.centre not in ("mean", "log_odds"):
            raise ConfigError(f"centre must be 'mean' or 'log_odds', got {self.centre!r}")


@dataclass(frozen=True)
class ChosenLogits:
    """Logit nodes with the linear combination of logits that each stands for."""

    logits: Int64[Tensor, "logit 2"]
    """Position and token."""
    probabilities: Float64[Tensor, " logit"]
    weights: Float[Tensor, "logit vocab"]


def choose(
    targets: Targets, logits: Float[Tensor, "pos vocab"], input_ids: Int64[Tensor, " pos"], mask_id: int
) -> ChosenLogits:
    """The logit nodes of a state.

    Args:
        logits: As the model gives them for the state.
    Raises:
        DataError: If a position is not masked, or a token is not one that can be predicted.
    """
    wanted = targets.tokens if targets.tokens is not None else _positions(targets, input_ids, mask_id)
    for position in wanted:
        _check_position(position, input_ids, mask_id)
    pairs: list[tuple[int, int]] = []
    probabilities: list[float] = []
    rows: list[Tensor] = []
    for position, tokens in wanted.items():
        log_probs = masked_log_probs(logits[position : position + 1].detach().double(), mask_id)[0]
        for token in tokens if tokens is not None else _likeliest(log_probs.exp(), targets):
            _check_token(token, mask_id)
            pairs.append((position, token))
            probabilities.append(float(log_probs[token].exp()))
            rows.append(_weights(log_probs, token, mask_id, targets.centre).to(logits))
    if len(set(pairs)) < len(pairs):
        raise DataError("a token is named twice at one position; name each once")
    return ChosenLogits(
        torch.tensor(pairs), torch.tensor(probabilities, dtype=torch.float64), torch.stack(rows)
    )


def _positions(targets: Targets, input_ids: Tensor, mask_id: int) -> dict[int, None]:
    if targets.positions is not None:
        found = list(targets.positions)
    else:
        found = (input_ids == mask_id).nonzero()[:, 0].tolist()
    if not found:
        raise DataError(
            "there is nothing to explain: the state has no masked position, or none was named; "
            "a prediction needs a mask"
        )
    return dict.fromkeys(found)


def _check_position(position: int, input_ids: Tensor, mask_id: int) -> None:
    if not 0 <= position < len(input_ids):
        raise DataError(f"position must be in [0, {len(input_ids)}), got {position}")
    if int(input_ids[position]) != mask_id:
        raise DataError(
            f"position {position} holds token {int(input_ids[position])}, and the model predicts masked "
            f"positions only; name a position of a mask"
        )


def _check_token(token: int, mask_id: int) -> None:
    if not 0 <= token < mask_id:
        raise DataError(f"token must be in [0, {mask_id}), which leaves out the mask, got {token}")


def _likeliest(probabilities: Float64[Tensor, " vocab"], targets: Targets) -> list[int]:
    """Tokens from the likeliest down, the one that reaches the mass included."""
    best = probabilities.topk(min(targets.max_tokens, len(probabilities) - 1))
    reached = (best.values.cumsum(0) >= targets.mass).nonzero()
    count = int(reached[0, 0]) + 1 if len(reached) else len(best.values)
    found: list[int] = best.indices[:count].tolist()
    return found


def _weights(
    log_probs: Float64[Tensor, " vocab"], token: int, mask_id: int, centre: Centre
) -> Float64[Tensor, " vocab"]:
    weights = torch.zeros_like(log_probs)
    if centre == "mean":
        weights -= 1.0 / mask_id  # the mask is the last of the vocabulary: as many tokens as its number
        weights[mask_id] = 0.0
    else:
        others = log_probs.clone()
        others[token] = -torch.inf
        weights -= others.softmax(0)
    weights[token] += 1.0
    return weights
