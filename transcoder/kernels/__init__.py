"""Encode and decode with gradients through active features only: in compiled loops on CPU, plain torch elsewhere."""

from transcoder.kernels.autograd import (
    decode,
    encode_selected,
    encode_topk,
    pre_activations,
    row_errors,
    select_batch_topk,
    select_topk,
)
from transcoder.kernels.buffers import GradientBuffers
from transcoder.kernels.paths import plain_path

__all__ = [
    "decode",
    "encode_topk",
    "encode_selected",
    "pre_activations",
    "select_topk",
    "select_batch_topk",
    "row_errors",
    "GradientBuffers",
    "plain_path",
]
