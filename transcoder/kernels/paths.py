"""Which of two implementations computes: plain torch operations, or loops that numba compiles.

The compiled loops are used on CPU tensors when numba can be imported. The plain path always remains and can be
forced, with `plain_path()` or by setting MDLM_INTERP_KERNELS to "plain". The two differ by float rounding.
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
from torch import Tensor

from mdlm_interp.errors import ConfigError
from transcoder.kernels import plain

VARIABLE = "MDLM_INTERP_KERNELS"
TYPES = (torch.float32, torch.float64)
"""That the loops are compiled for."""

_plain: ContextVar[bool] = ContextVar("transcoder_plain_path", default=False)


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


def kernels_for(x: Tensor) -> ModuleType:
    """The module whose functions compute with tensors of this device and type: `compiled` or `plain`.

    Raises:
        ConfigError: If MDLM_INTERP_KERNELS asks for something that is not there.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "plain", "compiled"):
        raise ConfigError(
            f"{VARIABLE} must be plain or compiled, got {choice!r}; unset it to let the program choose"
        )
    not_compiled = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
    if choice == "plain" or _plain.get() or not_compiled or x.device.type != "cpu" or x.dtype not in TYPES:
        return plain
    if not _numba_is_installed():
        if choice == "compiled":
            raise ConfigError(
                f"{VARIABLE} is compiled, but numba is not installed: pip install 'mdlm-interp[fast]'"
            )
        return plain
    try:
        from transcoder.kernels import compiled
    except ImportError as error:
        raise ConfigError(
            f"numba is installed but cannot be imported ({error}); install a version that fits this numpy, "
            f"or set {VARIABLE}=plain, which is slower"
        ) from None
    return compiled
