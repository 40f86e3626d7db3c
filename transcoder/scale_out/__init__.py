"""Training by many processes: which of them has what, how their parts become one sum, and how they stay together."""

from transcoder.scale_out.layout import Layout, layout_of
from transcoder.scale_out.processes import LostProcessError, Processes, joined_processes
from transcoder.scale_out.shards import feature_blocks, whole

__all__ = [
    "Layout",
    "layout_of",
    "Processes",
    "LostProcessError",
    "joined_processes",
    "feature_blocks",
    "whole",
]
