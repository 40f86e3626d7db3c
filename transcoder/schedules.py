"""What changes over a run: learning rate, weight of the sparsity penalty, k. Pure functions of the step."""

from __future__ import annotations

import math

from transcoder.train_config import TrainConfig

WARMUP_STEPS = 50
"""Of a run that names none."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, constant, decay to zero.

    >>> config = TrainConfig(steps=10, lr=1.0, warmup_steps=2, decay_fraction=0.4)
    >>> [learning_rate(config, step) for step in (0, 1, 6, 8)]
    [0.5, 1.0, 1.0, 0.5]
    """
    steps = min(WARMUP_STEPS, config.steps) if config.warmup_steps is None else config.warmup_steps
    warmup = min(1.0, (step + 1) / max(1, steps))
    decay_steps = config.decay_fraction * config.steps
    if config.decay == "none" or decay_steps == 0:
        return config.lr * warmup
    left = min(1.0, (config.steps - step) / decay_steps)
    return config.lr * warmup * (left if config.decay == "linear" else _cosine(left))


def sparsity_weight(config: TrainConfig, step: int) -> float:
    """Weight of the sparsity penalty at a step; its full value when the warm-up is over."""
    if config.sparsity == "none":
        return 0.0
    share = _share(config.sparsity_warmup * config.steps, step)
    return config.sparsity_coefficient * (share if config.sparsity_ramp == "linear" else _cosine(share))


def active_features(config: TrainConfig, k: int, step: int) -> int:
    """k of a step: from k_start down to k in equal ratios, rounded.

    >>> config = TrainConfig(steps=8, k_start=64, k_anneal=0.5)
    >>> [active_features(config, 4, step) for step in range(6)]
    [64, 32, 16, 8, 4, 4]
    """
    if config.k_start is None:
        return k
    now: float = config.k_start * (k / config.k_start) ** _share(config.k_anneal * config.steps, step)
    return round(now)


def _share(steps: float, step: int) -> float:
    return min(1.0, step / steps) if steps > 0 else 1.0


def _cosine(share: float) -> float:
    """From 0 to 1 as the share is, flat at both ends."""
    return (1.0 - math.cos(math.pi * share)) / 2.0
