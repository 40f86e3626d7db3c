"""What a training run needs to know: the settings that every recipe has, and those of training on text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

from mdlm_interp.config import MDLMConfig
from mdlm_interp.config_files import check_fields
from mdlm_interp.errors import ConfigError

Form = Literal["wrapped", "bare"]
"""A sequence with an end-of-text at both ends, or one that is all text."""

SHORTEST = 16
"""Tokens in the shortest sequence of a short step; the others are its powers-of-two multiples."""

MAX_VOCAB_SIZE = 65_536
"""Training text is held as 16-bit ids."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the trainer needs of any recipe's config."""

    RESUMABLE: ClassVar[tuple[str, ...]] = (
        "steps",
        "validate_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "log_every",
        "out",
    )
    """Settings that may differ between the run that was stopped and the one that continues it."""

    recipe: str
    """Which recipe this is a config of."""
    out: Path
    """Directory for checkpoints, the log and the finished model; a run found there is resumed."""
    seed: int = 0
    """Key of all randomness: initial weights, windows, times, masks."""
    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 64
    """Sequences in a step."""
    micro_batch_size: int | None = None
    """Sequences in memory at a time, whose gradients add up to the step's; all of the step's if none."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    warmup_steps: int = 2500
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to zero over the last decay_steps, straight or as a half cosine."""
    decay_steps: int = 0
    """Length of the final fall, in steps; 0 when the rate is constant."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 1.0e9 never clips."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights that are evaluated and saved; ramps up as (1 + n) / (10 + n)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products in training (autocast); weights, optimiser and loss stay float32."""
    compile: bool = False
    """Compile the network: needs a C++ compiler, takes a minute to start and then runs twice as fast."""
    validate_every: int = 1000
    """Steps between validations on held-out data."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; Ctrl-C saves one as well, and the same command continues from the last."""
    checkpoint_minutes: float | None = None
    """Save a checkpoint after this many minutes too, whatever the step; by steps alone if none."""
    log_every: int = 50
    """Steps between lines in the log."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_numbers()
        self._check_decay()

    def _check_numbers(self) -> None:
        """Each number by itself; every comparison is false for nan, which therefore never passes."""
        _require("seed", self.seed, 0 <= self.seed < 2**64, "be in [0, 2**64)")
        for name in (
            "steps",
            "batch_size",
            "validate_every",
            "checkpoint_every",
            "log_every",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "be at least 1")
        micro, minutes = self.micro_batch_size, self.checkpoint_minutes
        if micro is not None:
            usable = 1 <= micro <= self.batch_size
            rule = f"be in [1, {self.batch_size}], the batch_size"
            _require("micro_batch_size", micro, usable, rule, "none takes the batch at once")
        if minutes is not None:
            usable = isfinite(minutes) and minutes > 0.0
            _require(
                "checkpoint_minutes", minutes, usable, "be positive and finite", "none saves by steps alone"
            )
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "be at least 0", "0 has none")
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

    def _check_decay(self) -> None:
        if self.decay != "constant" and not 0 < self.decay_steps <= self.steps:
            raise ConfigError(
                f"{self.decay} decay needs decay_steps in [1, {self.steps}], got {self.decay_steps}; "
                f"the rate falls over the last decay_steps of the {self.steps} steps"
            )
        if self.decay == "constant" and self.decay_steps != 0:
            raise ConfigError(
                f"constant decay needs decay_steps 0, got {self.decay_steps}; set decay to linear or drop it"
            )

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay != "constant":
            left = min(1.0, (self.steps - step) / self.decay_steps)
            rate *= left if self.decay == "linear" else (1.0 - math.cos(math.pi * left)) / 2.0
        return rate


@runtime_checkable
class Shape(Protocol):
    """What training on text asks of a network's config."""

    @property
    def vocab_size(self) -> int:
        """Ids, the mask included."""
        ...

    @property
    def model_length(self) -> int:
        """Tokens in a sequence."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextConfig(RunConfig):
    """Train a language model on text files."""

    RESUMABLE: ClassVar[tuple[str, ...]] = (
        *RunConfig.RESUMABLE,
        "validation_sequences",
        "files",  # may have moved: their content is compared by hash
        "tokenizer",
        "token_cache",
        "compressor",
    )

    files: tuple[Path, ...]
    """Text files (.txt, .jsonl, .parquet) or uint16 ids (.bin); one listed twice is seen twice as often."""
    tokenizer: Path
    """Directory with the tokenizer, or bundled; its size must be the model's vocab_size."""
    order: Literal["random", "packed"] = "random"
    """Windows at random offsets of the text, or its consecutive blocks, each once an epoch in a new order."""
    wrap_share: float = 1.0
    """Share of sequences with an end-of-text at both ends, as published; the rest are bare windows."""
    short_share: float = 0.0
    """Share of steps whose sequences are 16, 32, 64, ... tokens long, so that short texts are familiar."""
    held_out_share: float = 0.03
    """Share of documents kept for validation, chosen by the hash of their text."""
    validation_sequences: int = 256
    """Held-out sequences in a validation, of each form: wrapped, bare or each of both, as trained."""
    token_cache: Path | None = None
    """Directory for the text's ids as uint16 files, written once and then mapped; in memory if none."""
    compressor: Literal["lzma", "bz2", "zlib"] | None = None
    """Compressor whose code length of the text is reported beside the losses; none if none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.files:
            raise ConfigError("files must name at least one text file")
        super().__post_init__()
        self._check_shares()
        self._check_together()

    @property
    def shape(self) -> Shape:
        """The network's config: `model`, in each recipe of its own type."""
        model: Shape = self.model  # type: ignore[attr-defined]
        return model

    def _check_shares(self) -> None:
        _require(
            "validation_sequences", self.validation_sequences, self.validation_sequences >= 1, "be at least 1"
        )
        for name in ("wrap_share", "short_share"):
            _require(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "be in [0, 1]")
        _require("held_out_share", self.held_out_share, 0.0 < self.held_out_share < 1.0, "be between 0 and 1")

    def _check_together(self) -> None:
        """What one setting asks of another."""
        length, vocab_size = self.shape.model_length, self.shape.vocab_size
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
        if self.order == "packed" and (self.wrap_share not in (0.0, 1.0) or self.short_share > 0.0):
            raise ConfigError(
                f"packed blocks are of one form and length, got wrap_share {self.wrap_share} and short_share "
                f"{self.short_share}; set wrap_share to 0 or 1 and short_share to 0, or order to random"
            )

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of sequence that are trained, and so the ones that held-out text is measured in."""
        if self.wrap_share == 1.0:
            return ("wrapped",)
        return ("bare",) if self.wrap_share == 0.0 else ("wrapped", "bare")


@dataclass(frozen=True, kw_only=True)
class TrainLMConfig(TextConfig):
    """Train a masked diffusion language model on text files (--recipe learner, dllm, flowlm: other recipes)."""

    recipe: Literal["mdlm"] = "mdlm"
    """MDLM from scratch; learner, dllm and flowlm have settings of their own, see --recipe NAME --help."""
    model: MDLMConfig
    """Shape of the network."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer on text files."""

    files: tuple[Path, ...]
    """Text files (.txt, .jsonl, .parquet)."""
    out: Path
    """Directory for tokenizer.json; it must not hold one."""
    vocab_size: int = 4096
    """Ids in all, <|endoftext|>, [MASK] and the special tokens included."""
    special_tokens: tuple[str, ...] = ()
    """Texts that are one token each wherever they stand, such as <|user|>; <|endoftext|> always is."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.files:
            raise ConfigError("files must name at least one text file")
        fewest = 258 + len(self.special_tokens)
        if not fewest < self.vocab_size <= MAX_VOCAB_SIZE:
            specials = "two specials" if fewest == 258 else f"{fewest - 256} specials"
            raise ConfigError(
                f"vocab_size must be in ({fewest}, {MAX_VOCAB_SIZE}]: 256 bytes and {specials}, "
                f"got {self.vocab_size}"
            )


def _require(name: str, value: object, holds: bool, rule: str, remedy: str = "") -> None:
    if not holds:
        raise ConfigError(f"{name} must {rule}, got {value}" + (f"; {remedy}" if remedy else ""))
