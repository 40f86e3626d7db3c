"""What a cross-layer transcoder is, and how one is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mdlm_interp.errors import ConfigError

if TYPE_CHECKING:
    import torch

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
        for name in ("n_layers", "d_model", "n_features", "k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.k > self.n_features:
            raise ConfigError(
                f"k must be at most n_features, got k {self.k} and n_features {self.n_features}"
            )
        for name in ("input_hook", "output_hook"):
            if LAYER_FIELD not in getattr(self, name):
                raise ConfigError(f"{name} must contain {LAYER_FIELD}, got {getattr(self, name)!r}")

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


def torch_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: If there is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be cpu, cuda or the like, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch finds no CUDA device; use cpu")
    return device


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
        at_least_one = (
            "steps",
            "batch_size",
            "dead_after_tokens",
            "window_chunks",
            "log_every",
            "checkpoint_every",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "auxk_alpha", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.lr > 0.0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ConfigError(f"decay_fraction must be in [0, 1], got {self.decay_fraction}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {self.betas}")
        for name in ("grad_clip", "auxk"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}; none switches it off")

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
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ConfigError(f"held_out_fraction must be in (0, 1), got {self.held_out_fraction}")
