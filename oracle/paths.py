"""Which of two implementations computes: plain torch operations, or compiled loops with the same bits.

The compiled loops (`fused.py`) are used on CPU tensors when numba can be imported. The plain path always
remains and can be forced, with `plain_path()` or by setting MDLM_INTERP_EXACT_PATH to "plain".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch

from oracle.errors import ExactError

VARIABLE = "MDLM_INTERP_EXACT_PATH"
_plain: ContextVar[bool] = ContextVar("oracle_plain_path", default=False)


@contextmanager
def plain_path() -> Iterator[None]:
    """Use plain torch operations within this block, also where compiled loops are at hand."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@lru_cache(maxsize=1)
def _numba_is_installed() -> bool:
    return find_spec("numba") is not None


def fused_for(device: torch.device) -> ModuleType | None:
    """The module of compiled loops, or None if plain operations are to be used on this device.

    Raises:
        ExactError: If MDLM_INTERP_EXACT_PATH asks for something that is not there.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "plain", "fused"):
        raise ExactError(
            f"{VARIABLE} must be plain or fused, got {choice!r}; unset it to let the program choose"
        )
    not_compiled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    if choice == "plain" or _plain.get() or device.type != "cpu" or not_compiled:
        return None
    if not _numba_is_installed():
        if choice == "fused":
            raise ExactError(
                f"{VARIABLE} is fused, but numba is not installed: pip install 'mdlm-interp[fast]'"
            )
        return None
    try:
        from oracle import fused
    except ImportError as error:
        raise ExactError(
            f"numba is installed but cannot be imported ({error}); install a version that fits this numpy, "
            f"or set {VARIABLE}=plain: the bits are the same, only slower"
        ) from None
    return fused
