"""The gradient of a step from those of its blocks: by rows a sum, by features one norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transcoder.kernels import GradientBuffers
from transcoder.scale_out.processes import Processes


def backward(
    shares: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    buffers: Sequence[GradientBuffers],
    processes: Processes,
) -> None:
    """Set the gradient of the loss: that of each data block by itself, then their sum.

    Args:
        shares: What each of this process's data blocks gives to the loss.
        buffers: Memory for the gradients of each, as it was handed to the objective.
    """
    found = []
    for share, kept in zip(shares, buffers, strict=True):
        for parameter in parameters:
            parameter.grad = None
        kept.release()
        torch.autograd.backward(share)
        found.append([parameter.grad for parameter in parameters])
    if processes.layout.blocks[0] == 1:
        return
    for number, parameter in enumerate(parameters):
        of_blocks = [grads[number] for grads in found]
        parts = [torch.zeros_like(parameter) if part is None else part for part in of_blocks]
        parameter.grad = processes.added_in_pieces(parts, "data")


def clip(
    blocks: Sequence[nn.Module], shared: Sequence[Tensor | None], max_norm: float, processes: Processes
) -> Tensor:
    """Scale the gradient to at most this norm of all parameters on all processes; returns the norm before.

    Args:
        blocks: This process's feature blocks.
        shared: Parameters that all blocks have; they count once, with the first block.
    """
    parameters = list(dict.fromkeys(p for block in blocks for p in block.parameters()))
    norm: Tensor
    if processes.layout.blocks[1] == 1:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm
    others = {id(parameter) for parameter in shared}
    of_blocks = []
    for number, block in zip(processes.layout.feature_blocks, blocks, strict=True):
        norms = [
            p.grad.new_zeros(()) if number and id(p) in others else torch.linalg.vector_norm(p.grad)
            for p in block.parameters()
            if p.grad is not None
        ]
        of_blocks.append(torch.stack(norms))
    norm = torch.linalg.vector_norm(torch.stack(processes.gathered(of_blocks, "feature")))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
