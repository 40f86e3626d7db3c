"""A sampler as a source of capture, as options: which decodings, and which of their steps become sequences."""

from __future__ import annotations

from dataclasses import dataclass

from mdlm_interp.config_files import check_fields
from mdlm_interp.decoding.choice import SamplerChoice
from mdlm_interp.errors import ConfigError

MOST_TOGETHER = 2**16
"""Decodings in one batch: more of them would take all memory before the first step."""


@dataclass(frozen=True, kw_only=True)
class SamplerSource(SamplerChoice):
    """Decodings instead of text: each state that the model read on the way is a sequence of the store."""

    n: int = 16
    """Decodings, numbered from 0; their draws are keyed by the capture's seed and that number."""
    prompt: str = ""
    """Text that each begins with; [MASK] inside it is filled too."""
    every_step: int = 1
    """Record steps 0, this, twice this and so on of each decoding."""
    together: int = 16
    """Decodings that are sampled in one batch; whole batches are, so that n changes none of them."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("n", "every_step", "together"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.together > MOST_TOGETHER:
            raise ConfigError(f"together must be at most {MOST_TOGETHER:,}, got {self.together}; lower it")
        super().__post_init__()
