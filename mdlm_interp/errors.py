"""Every error that a user can cause, under one base class.

The command line prints these as one line and exits with 2; anything else is a bug and shows a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MAX_LISTED = 8


class MdlmError(Exception):
    """Base of every error that states a rule, what was received and the remedy."""


class ConfigError(MdlmError, ValueError):
    """A configuration or command line that cannot be right."""


class DataError(MdlmError, ValueError):
    """Input text, token ids or arrays that break a rule."""


class CheckpointError(MdlmError):
    """Weights or a model directory that do not load."""


class HookError(MdlmError, ValueError):
    """A hook name that matches nothing, or a hook function that breaks a rule."""


class StoreError(MdlmError):
    """An activation store that is damaged, incomplete or another run's."""


class OutputExistsError(MdlmError):
    """An output that is there already and would have been overwritten."""


class WriteError(MdlmError):
    """An output that cannot be written: the disk is full, read-only or failing."""


def nearest(name: str, choices: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error message: what was probably meant, or what there is.

    Args:
        prefix: Shown before each choice, but not compared (the dashes of an option).

    >>> "unknown method 'topp'" + nearest("topp", ["top_k", "top_p", "greedy"])
    "unknown method 'topp'; did you mean 'top_p'?"
    >>> nearest("beam", ["top_k", "top_p"])
    "; known: 'top_k', 'top_p'"
    """
    known = [str(choice) for choice in choices]
    if not known:
        return ""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    more = ", ..." if len(known) > MAX_LISTED else ""
    return "; known: " + ", ".join(repr(prefix + choice) for choice in known[:MAX_LISTED]) + more
