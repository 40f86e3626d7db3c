"""What to capture: the model, the text, the hook points, the diffusion times and where the store goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdlm_interp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Record activations of a model over noised text, one row a token."""

    files: tuple[Path, ...]
    """Text files to read, in this order: .txt, .jsonl with "text", or .parquet with a column "text"."""
    out: Path
    """Directory of the store, which must not exist yet or be empty."""
    model: str = "bundled"
    """Model directory, hub id, or "bundled" for the small model in this package."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; none takes the model's own."""
    hooks: tuple[str, ...] = ("blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out")
    """Names or globs of the hook points to record; each must have a position axis."""
    length: int | None = None
    """Tokens per sequence; none takes the model's context."""
    wrap: bool = True
    """Whether each sequence starts and ends with an end-of-text token, as in upstream's training."""
    max_sequences: int | None = None
    """Number of sequences to stop after; none takes all the text."""
    times: Literal["low_discrepancy", "fixed"] = "low_discrepancy"
    """How each sequence gets its diffusion time: spread evenly over (0, 1), or the same for all."""
    time: float = 0.0
    """Diffusion time in [0, 1] of every sequence when times is fixed; 0 is clean text."""
    seed: int = 0
    """Key of the times and masks, from 0 to 2**64 - 1."""
    batch_size: int = 16
    """Sequences per forward pass; it changes activations by rounding only, tokens and masks never."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("files must name at least one text file")
        if not self.hooks:
            raise ConfigError("hooks must name at least one hook point")
        for name in ("length", "max_sequences", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be in [0, 2**64), got {self.seed}")
        if not 0.0 <= self.time <= 1.0:
            raise ConfigError(f"time must be in [0, 1], 0 being clean text, got {self.time}")
        if self.times != "fixed" and self.time != 0.0:
            raise ConfigError(
                f"time {self.time} has no effect with times {self.times!r}; set times to 'fixed'"
            )
