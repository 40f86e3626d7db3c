"""Cross-layer transcoders: sparse features that read each MLP's input and write every later MLP's output.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from transcoder.config import CLTRunConfig, TrainConfig, TranscoderConfig
    from transcoder.evaluation import evaluate
    from transcoder.model import CrossLayerTranscoder
    from transcoder.replacement import ReplacementModel
    from transcoder.run import train
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CrossLayerTranscoder": "transcoder.model",
            "TranscoderConfig": "transcoder.config",
            "TrainConfig": "transcoder.config",
            "CLTRunConfig": "transcoder.config",
            "train": "transcoder.run",
            "evaluate": "transcoder.evaluation",
            "ReplacementModel": "transcoder.replacement",
        },
    )

__all__ = [
    "CrossLayerTranscoder",
    "TranscoderConfig",
    "TrainConfig",
    "CLTRunConfig",
    "train",
    "evaluate",
    "ReplacementModel",
]
