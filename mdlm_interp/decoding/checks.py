"""Settings that are refused when they are made: a wrong one would otherwise sample by some other rule, in silence."""

from __future__ import annotations

from typing import Any, SupportsIndex, get_args

from mdlm_interp.errors import ConfigError, nearest


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that a `Literal` does not list.

    Raises:
        ConfigError: If it is none of them.
    """
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"{name}: {value!r} is not a choice{nearest(str(value), known)}")


def check_whole(name: str, value: object) -> None:
    """Refuse what is no whole number, as 2.5 and 2.0.

    Raises:
        ConfigError: If it is none.
    """
    if not isinstance(value, SupportsIndex):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is no whole number, or too small a one.

    Raises:
        ConfigError: If it is either.
    """
    check_whole(name, value)
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
