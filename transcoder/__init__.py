"""Cross-layer transcoders: sparse features that read each MLP's input and write every later MLP's output.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transcoder.config import CLTRunConfig, TrainConfig, TranscoderConfig
    from transcoder.evaluation import evaluate
    from transcoder.model import CrossLayerTranscoder
    from transcoder.replacement import ReplacementModel
    from transcoder.run import train

__all__ = [
    "CrossLayerTranscoder",
    "TranscoderConfig",
    "TrainConfig",
    "CLTRunConfig",
    "train",
    "evaluate",
    "ReplacementModel",
]

_HOMES = {
    "CrossLayerTranscoder": "transcoder.model",
    "TranscoderConfig": "transcoder.config",
    "TrainConfig": "transcoder.config",
    "CLTRunConfig": "transcoder.config",
    "train": "transcoder.run",
    "evaluate": "transcoder.evaluation",
    "ReplacementModel": "transcoder.replacement",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
