"""Text that the model runs over while a transcoder trains, in the place of a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mdlm_interp.config_files import check_fields
from transcoder.config_checks import require_at_least_one


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """Rows from the running model."""

    files: tuple[Path, ...] = ()
    """Text files, globs or directories of shards, as `capture run` takes them; none trains on a store."""
    length: int | None = None
    """Tokens of a sequence; none takes the model's context."""
    max_sequences: int | None = None
    """Sequences to use; none takes all the text."""
    window_sequences: int = 64
    """Sequences whose rows are held in memory and shuffled together."""
    batch_sequences: int = 16
    """Sequences per forward pass; it changes activations by rounding only."""
    statistics_sequences: int = 256
    """Training sequences, at most, that the normalisation is taken of before training."""

    def __post_init__(self) -> None:
        check_fields(self)
        counts = "length max_sequences window_sequences batch_sequences statistics_sequences"
        require_at_least_one(self, counts.split())
