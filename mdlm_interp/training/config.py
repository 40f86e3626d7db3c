"""What a language-model training run needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import ConfigError

Form = Literal["wrapped", "bare"]
"""A sequence with an end-of-text at both ends, or one that is all text."""

SHORTEST = 16
"""Tokens in the shortest sequence of a short step; the others are its powers-of-two multiples."""

MAX_VOCAB_SIZE = 65_536
"""Training text is held as 16-bit ids."""


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
    """Length of the final linear fall, in steps; 0 when the rate is constant."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 1.0e9 never clips."""
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
    """Steps between validations on held-out text, in the form trained: wrapped, bare or each of both."""
    validation_sequences: int = 256
    """Held-out sequences in a validation, of each form."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; Ctrl-C saves one as well, and the same command continues from the last."""
    log_every: int = 50
    """Steps between lines in the log."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("files must name at least one text file")
        self._check_numbers()
        self._check_together()

    def _check_numbers(self) -> None:
        """Each number by itself; every comparison is false for nan, which therefore never passes."""
        _require("seed", self.seed, 0 <= self.seed < 2**64, "be in [0, 2**64)")
        for name in (
            "steps",
            "batch_size",
            "validate_every",
            "validation_sequences",
            "checkpoint_every",
            "log_every",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "be at least 0", "0 has none")
        for name in ("wrap_share", "short_share"):
            _require(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "be in [0, 1]")
        _require("held_out_share", self.held_out_share, 0.0 < self.held_out_share < 1.0, "be between 0 and 1")
        usable = isfinite(self.lr) and self.lr > 0.0
        _require("lr", self.lr, usable, "be positive and finite", "3.0e-4 is usual")
        usable = all(0.0 <= beta < 1.0 for beta in self.betas)
        _require("betas", self.betas, usable, "both be in [0, 1)", "0.9 and 0.999 are usual")
        usable = isfinite(self.weight_decay) and self.weight_decay >= 0.0
        _require("weight_decay", self.weight_decay, usable, "be at least 0 and finite", "0 has none")
        usable = isfinite(self.grad_clip) and self.grad_clip > 0.0
        _require("grad_clip", self.grad_clip, usable, "be positive and finite", "1.0e9 never clips")
        usable = 0.0 <= self.ema_decay < 1.0
        _require("ema_decay", self.ema_decay, usable, "be in [0, 1)", "0 keeps the last weights, unaveraged")

    def _check_together(self) -> None:
        """What one setting asks of another."""
        if self.decay == "linear" and not 0 < self.decay_steps <= self.steps:
            raise ConfigError(
                f"linear decay needs decay_steps in [1, {self.steps}], got {self.decay_steps}; "
                f"the rate falls over the last decay_steps of the {self.steps} steps"
            )
        if self.decay == "constant" and self.decay_steps != 0:
            raise ConfigError(
                f"constant decay needs decay_steps 0, got {self.decay_steps}; set decay to linear or drop it"
            )
        length, vocab_size = self.model.model_length, self.model.vocab_size
        if self.wrap_share > 0.0 and length < 3:
            raise ConfigError(
                f"wrapped sequences need model.model_length of at least 3, a token between two end-of-texts, "
                f"got {length}; raise it or set wrap_share to 0"
            )
        if self.short_share > 0.0 and length <= SHORTEST:
            raise ConfigError(
                f"short_share needs model.model_length over {SHORTEST}, the shortest sequence, got {length}; "
                f"raise it or set short_share to 0"
            )
        if vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(
                f"model.vocab_size must be at most {MAX_VOCAB_SIZE} to train here, as text is held in 16-bit "
                f"ids, got {vocab_size}; use a smaller tokenizer"
            )

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of sequence that are trained, and so the ones that held-out text is measured in."""
        if self.wrap_share == 1.0:
            return ("wrapped",)
        return ("bare",) if self.wrap_share == 0.0 else ("wrapped", "bare")

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
        if not self.files:
            raise ConfigError("files must name at least one text file")
        if not 258 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size must be in (258, {MAX_VOCAB_SIZE}]: 256 bytes and two specials, "
                f"got {self.vocab_size}"
            )


def _require(name: str, value: object, holds: bool, rule: str, remedy: str = "") -> None:
    if not holds:
        raise ConfigError(f"{name} must {rule}, got {value}" + (f"; {remedy}" if remedy else ""))
