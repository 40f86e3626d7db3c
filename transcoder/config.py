"""What a cross-layer transcoder is, and how one is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from mdlm_interp.config_fields import presets, shown
from mdlm_interp.errors import ConfigError

LAYER_FIELD = "{layer}"
METRICS = "metrics.jsonl"
"""File of a training run's metrics, one line of JSON every `log_every` steps."""


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig:
    """Shape of a transcoder and the hook points it reads and writes."""

    n_layers: int
    """Number of blocks; each has its own features."""
    d_model: int
    """Width of the residual stream."""
    n_features: int
    """Features of each layer."""
    k: int
    """Features that may be active at once, per layer and token."""
    input_hook: str = "blocks.{layer}.mlp.hook_in"
    """Hook point that a layer's encoder reads; {layer} stands for the block's number."""
    output_hook: str = "blocks.{layer}.hook_mlp_out"
    """Hook point whose activation the decoders reconstruct."""

    def __post_init__(self) -> None:
        require_at_least_one(self, ("n_layers", "d_model"))
        require_k_features(self)
        require_hooks(self)

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hook point that each layer reads."""
        return hook_names(self.input_hook, self.n_layers)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hook point that each layer's reconstruction stands for."""
        return hook_names(self.output_hook, self.n_layers)


def hook_names(template: str, n_layers: int) -> tuple[str, ...]:
    """A template's hook point in each layer.

    >>> hook_names("blocks.{layer}.hook_mlp_out", 2)
    ('blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out')
    """
    return tuple(template.replace(LAYER_FIELD, str(layer)) for layer in range(n_layers))


def require_at_least_one(config: Any, names: Sequence[str]) -> None:
    """Raise ConfigError unless these fields of a config are whole numbers from 1, or None where that is off."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}; {_remedy(config, name)}")


def require_in(config: Any, name: str, rule: str, holds: bool) -> None:
    """Raise ConfigError with the rule that a field breaks."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {getattr(config, name)}; {_remedy(config, name)}")


def require_k_features(config: Any) -> None:
    """Raise ConfigError unless k of n_features can be active at once."""
    require_at_least_one(config, ("n_features", "k"))
    if config.k > config.n_features:
        raise ConfigError(
            f"k must be at most n_features, got k {config.k} and n_features {config.n_features}; "
            f"lower k or raise n_features"
        )


def require_hooks(config: Any) -> None:
    """Raise ConfigError unless both hook points have a place for the block's number."""
    for name in ("input_hook", "output_hook"):
        holds = LAYER_FIELD in getattr(config, name)
        require_in(config, name, f"a hook point with {LAYER_FIELD} for the block's number", holds)


def require_apart(out: Path | None, store: Path) -> None:
    """Raise ConfigError if output would go into an activation store."""
    if out is None:
        return
    place, inside = Path(os.path.abspath(store)), Path(os.path.abspath(out))
    if place in (inside, *inside.parents):
        raise ConfigError(f"out must lie outside the store {store}, got {out}; choose another directory")


def _remedy(config: Any, name: str) -> str:
    preset = presets(type(config))[name]
    return "give a number from 1" if preset is MISSING else f"leave it out for {shown(preset)}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 512
    """Rows (tokens) in a step."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    warmup_steps: int = 50
    """Steps of linear warm-up from zero."""
    decay_fraction: float = 0.2
    """Last part of the run over which the learning rate falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the two moments."""
    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; none does not clip."""
    auxk_alpha: float = 0.03125
    """Weight of the auxiliary loss that revives dead features."""
    auxk: int | None = 64
    """Dead features per layer and token that the auxiliary loss uses; none switches it off."""
    dead_after_tokens: int = 100_000
    """Rows without activity after which a feature counts as dead."""
    window_chunks: int = 32
    """Chunks of 256 rows that are held in memory and shuffled together."""
    seed: int = 0
    """Key of the initial weights and of the order of rows."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 500
    """Steps between saved states; the state is also saved when the run is interrupted."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "dead_after_tokens",
            "window_chunks",
            "log_every",
            "checkpoint_every",
        )
        require_at_least_one(self, counts)
        require_in(self, "warmup_steps", "at least 0", self.warmup_steps >= 0)
        require_in(self, "seed", "in [0, 2**64)", 0 <= self.seed < 2**64)
        # Written so that nan breaks them too.
        require_in(self, "lr", "above 0 and finite", 0.0 < self.lr < math.inf)
        require_in(self, "auxk_alpha", "at least 0 and finite", 0.0 <= self.auxk_alpha < math.inf)
        require_in(self, "decay_fraction", "in [0, 1]", 0.0 <= self.decay_fraction <= 1.0)
        require_in(self, "betas", "in [0, 1)", all(0.0 <= beta < 1.0 for beta in self.betas))
        revives = self.auxk is None or self.auxk >= 1
        require_in(self, "auxk", "at least 1, or none, which switches it off", revives)
        clips = self.grad_clip is None or 0.0 < self.grad_clip < math.inf
        require_in(self, "grad_clip", "above 0 and finite, or none, which does not clip", clips)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * self.steps
        left = self.steps - step
        return self.lr * warmup * (min(1.0, left / decay_steps) if decay_steps > 0 else 1.0)


@dataclass(frozen=True, kw_only=True)
class CLTRunConfig:
    """Train a cross-layer transcoder on an activation store."""

    store: Path
    """Activation store made by `mdlm-interp capture run` with the input and output hooks of every block."""
    out: Path
    """Directory for the transcoder, its metrics and its checkpoints; a stopped run found there continues."""
    n_features: int = 512
    """Features of each layer."""
    k: int = 16
    """Features that may be active at once, per layer and token."""
    held_out_fraction: float = 0.1
    """Share of the sequences that training never sees; sequences of equal text stay together."""
    input_hook: str = TranscoderConfig.input_hook
    """Hook point that a layer's encoder reads; {layer} stands for the block's number."""
    output_hook: str = TranscoderConfig.output_hook
    """Hook point whose activation the decoders reconstruct."""
    device: str = "cpu"
    """Where to train, as torch names it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""

    def __post_init__(self) -> None:
        require_k_features(self)
        require_hooks(self)
        require_in(self, "held_out_fraction", "in (0, 1)", 0.0 < self.held_out_fraction < 1.0)
        require_apart(self.out, self.store)
