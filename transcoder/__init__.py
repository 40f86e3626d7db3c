"""Cross-layer transcoders: sparse features that read each MLP's input and write every later MLP's output.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from transcoder.config import CLTRunConfig, TrainConfig, TranscoderConfig
    from transcoder.eval_scores import Condition, Estimate
    from transcoder.eval_tables import conditions_table
    from transcoder.evaluation import Evaluation, NoisedSequences, evaluate
    from transcoder.held_out import held_out_sequences
    from transcoder.model import CrossLayerTranscoder
    from transcoder.replacement import ReplacementModel
    from transcoder.report import write_report
    from transcoder.run import train
    from transcoder.training_log import read_log
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CrossLayerTranscoder": "transcoder.model",
            "TranscoderConfig": "transcoder.config",
            "TrainConfig": "transcoder.config",
            "CLTRunConfig": "transcoder.config",
            "train": "transcoder.run",
            "read_log": "transcoder.training_log",
            "evaluate": "transcoder.evaluation",
            "Evaluation": "transcoder.evaluation",
            "NoisedSequences": "transcoder.evaluation",
            "Condition": "transcoder.eval_scores",
            "Estimate": "transcoder.eval_scores",
            "held_out_sequences": "transcoder.held_out",
            "conditions_table": "transcoder.eval_tables",
            "write_report": "transcoder.report",
            "ReplacementModel": "transcoder.replacement",
        },
    )

__all__ = [
    "CrossLayerTranscoder",
    "TranscoderConfig",
    "TrainConfig",
    "CLTRunConfig",
    "train",
    "read_log",
    "evaluate",
    "Evaluation",
    "NoisedSequences",
    "Condition",
    "Estimate",
    "held_out_sequences",
    "conditions_table",
    "write_report",
    "ReplacementModel",
]
