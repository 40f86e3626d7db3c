"""A transcoder in blocks of features, and its tensors put together again.

Each feature block is a `CrossLayerTranscoder` whose tensors have some of the features only, in memory of their own:
what is computed with them has the same shapes and alignment on every process. b_dec, W_skip and the normalisation
are the same on all; the blocks of a process share them.

Put together for a saved state, a tensor is a DTensor, sharded along its features over the mesh's feature axis and
replicated along data: torch.distributed.checkpoint writes each part once, and reads it onto any other mesh.
"""

# Axes: layer, feature, d_model, later

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transcoder.config import InitConfig, TranscoderConfig
from transcoder.initialisation import initialise_blocks
from transcoder.model import CrossLayerTranscoder
from transcoder.normalisation import Normalisation
from transcoder.scale_out.layout import Layout
from transcoder.scale_out.processes import Processes

FEATURE_AXES = {"W_enc": 1, "b_enc": 1, "log_threshold": 1, "rows_since_active": 1, "W_dec": 0}
"""Which axis of a tensor goes by features; the others are the same on all processes."""


def feature_axis(name: str) -> int | None:
    """The axis of a state's tensor that goes by features; None if it has none.

    >>> feature_axis("clt.W_dec.2"), feature_axis("adam.exp_avg.W_enc"), feature_axis("adam.step.W_enc")
    (0, 1, None)
    """
    kind, _, rest = name.rpartition("adam.step.")
    if kind or rest != name:
        return None
    parts = (
        name.removeprefix("clt.").removeprefix("adam.exp_avg.").removeprefix("adam.exp_avg_sq.").split(".")
    )
    return FEATURE_AXES.get(parts[0])


def feature_blocks(
    config: TranscoderConfig,
    norms: tuple[Normalisation, Normalisation],
    *,
    seed: int,
    init: InitConfig,
    layout: Layout,
    device: torch.device,
) -> list[CrossLayerTranscoder]:
    """This process's feature blocks of a new transcoder: the same initial weights whatever the blocks."""
    if layout.blocks[1] == 1:
        return [CrossLayerTranscoder(config, *norms, seed=seed, init=init).to(device)]
    cuts = [layout.features(number, config.n_features) for number in layout.feature_blocks]
    blocks = [_empty_block(config, norms, cut) for cut in cuts]
    initialise_blocks(blocks, cuts, init, seed)
    for block in blocks:
        block.to(device)
    for block in blocks[1:]:
        for name, tensor in (*blocks[0].named_parameters(), *blocks[0].named_buffers()):
            if feature_axis(name) is None:
                setattr(block, name, tensor)
    return blocks


def whole(blocks: Sequence[CrossLayerTranscoder], processes: Processes) -> CrossLayerTranscoder:
    """The transcoder of all feature blocks, on every process."""
    if processes.layout.blocks[1] == 1:
        return blocks[0]
    states = [block.state_dict() for block in blocks]
    state = {}
    for name, tensor in states[0].items():
        axis = feature_axis(name)
        if axis is not None:
            parts = processes.gathered([state[name] for state in states], "feature")
            tensor = torch.cat(parts, axis)
        state[name] = tensor
    with torch.device("meta"):
        found = CrossLayerTranscoder(blocks[0].config)
    found.load_state_dict(state, assign=True)
    found.requires_grad_(True)
    found.provenance, found.training_sequences = blocks[0].provenance, blocks[0].training_sequences
    return found


def joined(name: str, parts: Sequence[Tensor], processes: Processes) -> Tensor:
    """A state's tensor from this process's blocks: a DTensor if others have more of it."""
    axis = feature_axis(name)
    if axis is None:
        return parts[0]
    local = parts[0] if len(parts) == 1 else torch.cat([part.detach() for part in parts], axis)
    if processes.layout.is_alone:
        return local
    from torch.distributed.tensor import DTensor

    placed = DTensor.from_local(local.detach(), processes.mesh, _placements(axis), run_check=False)
    return placed


def space_for(name: str, size: Sequence[int], dtype: torch.dtype, processes: Processes) -> Tensor:
    """Memory on the CPU that a state's tensor can be read into: all of it, or as much as is this process's."""
    axis = feature_axis(name)
    if axis is None or processes.layout.is_alone:
        return torch.empty(tuple(size), dtype=dtype)
    from torch.distributed.tensor import DTensor

    local = list(size)
    local[axis] //= processes.layout.mesh[1]
    empty = torch.empty(local, dtype=dtype, device=processes.mesh.device_type)
    placed = DTensor.from_local(empty, processes.mesh, _placements(axis), run_check=False)
    return placed


def parts_of(name: str, tensor: Tensor, layout: Layout) -> list[Tensor]:
    """The reverse of `joined`: what each of this process's feature blocks has of a state's tensor."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    axis = feature_axis(name)
    count = len(layout.feature_blocks)
    if count == 1:
        return [local]
    if axis is None:
        return [local.clone() for _ in range(count)]  # Adam counts in place, for each block
    return [part.contiguous() for part in local.chunk(count, axis)]


def _placements(axis: int) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), Shard(axis)]


def _empty_block(
    config: TranscoderConfig, norms: tuple[Normalisation, Normalisation], cut: slice
) -> CrossLayerTranscoder:
    """A transcoder with memory for some of the features."""
    with torch.device("meta"):
        block = CrossLayerTranscoder(config)
    for name, parameter in list(block.named_parameters()):
        shape, axis = list(parameter.shape), feature_axis(name)
        if axis is not None:
            shape[axis] = cut.stop - cut.start
        *path, last = name.split(".")
        setattr(block.get_submodule(".".join(path)), last, nn.Parameter(torch.empty(shape)))
    for prefix, norm in zip(("in", "out"), norms, strict=True):
        setattr(block, f"{prefix}_mean", norm.mean.to(torch.float32))
        setattr(block, f"{prefix}_scale", norm.scale.to(torch.float32))
    return block
