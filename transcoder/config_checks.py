"""Rules that several configs share, each told in one line: the rule, the value, the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from mdlm_interp.config_fields import presets, shown
from mdlm_interp.errors import ConfigError

LAYER_FIELD = "{layer}"


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


def require_finite_from_zero(config: Any, names: Sequence[str]) -> None:
    """Raise ConfigError unless these fields are at least 0 and finite, or None where that is off."""
    for name in names:
        value = getattr(config, name)
        # Written so that nan breaks it too.
        require_in(config, name, "at least 0 and finite", value is None or 0.0 <= value < math.inf)


def require_share(config: Any, names: Sequence[str]) -> None:
    """Raise ConfigError unless these fields are in [0, 1]."""
    for name in names:
        require_in(config, name, "in [0, 1]", 0.0 <= getattr(config, name) <= 1.0)


def require_k_features(config: Any) -> None:
    """Raise ConfigError unless k of n_features can be active at once."""
    require_at_least_one(config, ("n_features", "k"))
    if config.k is not None and config.k > config.n_features:
        raise ConfigError(
            f"k must be at most n_features, got k {config.k} and n_features {config.n_features}; "
            f"lower k or raise n_features"
        )


def require_hooks(config: Any) -> None:
    """Raise ConfigError unless both hook points have a place for the block's number."""
    for name in ("input_hook", "output_hook"):
        holds = LAYER_FIELD in getattr(config, name)
        require_in(config, name, f"a hook point with {LAYER_FIELD} for the block's number", holds)


def require_apart(out: Path | None, store: Path | None) -> None:
    """Raise ConfigError if output would go into an activation store."""
    if out is None or store is None:
        return
    place, inside = Path(os.path.abspath(store)), Path(os.path.abspath(out))
    if place in (inside, *inside.parents):
        raise ConfigError(f"out must lie outside the store {store}, got {out}; choose another directory")


def _remedy(config: Any, name: str) -> str:
    preset = presets(type(config))[name]
    return "give a number from 1" if preset is MISSING else f"leave it out for {shown(preset)}"
