"""What a language-model training run needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainLMConfig:
    """Train a masked diffusion language model on text files."""

    files: tuple[Path, ...]
    """Text files (.txt, .jsonl, .parquet); one listed twice is seen twice as often."""
    tokenizer: Path
    """Directory with the tokenizer; its size must be the model's vocab_size."""
    out: Path
    """Directory for checkpoints, the log and the finished model; a run found there is resumed."""
    model: MDLMConfig
    """Shape of the network."""
    seed: int = 0
    """Key of all randomness: initial weights, windows, times, masks."""
    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 64
    """Sequences in a step."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    warmup_steps: int = 2500
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "linear"] = "constant"
    """After the warm-up: constant as published, or falling linearly to zero over the last decay_steps."""
    decay_steps: int = 0
    """Length of the final linear fall, in steps."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights that are evaluated and saved; ramps up as (1 + n) / (10 + n)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products in training (autocast); weights, optimiser and loss stay float32."""
    compile: bool = False
    """Compile the network: needs a C++ compiler, takes a minute to start and then runs twice as fast."""
    wrap_share: float = 1.0
    """Share of sequences with an end-of-text at both ends, as published; the rest are bare windows."""
    short_share: float = 0.0
    """Share of steps whose sequences are 16, 32, 64, ... tokens long, so that short texts are familiar."""
    held_out_share: float = 0.03
    """Share of documents kept for validation, chosen by the hash of their text."""
    validate_every: int = 1000
    """Steps between validations on held-out text."""
    validation_sequences: int = 256
    """Held-out sequences in a validation."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; an interrupted run continues from the last one."""
    log_every: int = 50
    """Steps between lines in the log."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("files must name at least one text file")
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("wrap_share", "short_share", "held_out_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0.0 < self.held_out_share < 1.0:
            raise ConfigError(f"held_out_share must be between 0 and 1, got {self.held_out_share}")
        if self.lr <= 0.0:
            raise ConfigError(f"lr must be positive, got {self.lr}")
        if self.decay == "linear" and not 0 < self.decay_steps <= self.steps:
            raise ConfigError(f"linear decay needs decay_steps in [1, {self.steps}], got {self.decay_steps}")

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "linear":
            rate *= min(1.0, (self.steps - step) / self.decay_steps)
        return rate


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer on text files."""

    files: tuple[Path, ...]
    """Text files (.txt, .jsonl, .parquet)."""
    out: Path
    """Directory for tokenizer.json; it must not hold one."""
    vocab_size: int = 4096
    """Ids in all, <|endoftext|> and [MASK] included."""

    def __post_init__(self) -> None:
        if not 258 < self.vocab_size <= 65_536:
            raise ConfigError(
                f"vocab_size must be in (258, 65536]: 256 bytes and two specials, got {self.vocab_size}"
            )
