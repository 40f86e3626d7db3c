"""Activations of a masked diffusion language model over text, as a Zarr store.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from capture.config import CaptureConfig
    from capture.reader import ActivationStore, open_store
    from capture.run import run_capture

__all__ = ["open_store", "CaptureConfig", "run_capture", "ActivationStore"]

_HOMES = {
    "open_store": "capture.reader",
    "CaptureConfig": "capture.config",
    "run_capture": "capture.run",
    "ActivationStore": "capture.reader",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
