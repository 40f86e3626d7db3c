"""The largest pre-activations of all feature blocks, and of all rows, chosen by values or counts alone.

topk: each block offers its k largest of a row; the blocks' offers, side by side in the order of features, are chosen
from as one row is. batchtopk: the value of a layer's n-th largest is found by its bits, from the highest on, eight at
a time: what is exchanged is how many have which next eight. Ties go where `selection` has them go. What is kept is
exactly what one process with all of it would keep.
"""

# Axes: layer, batch, feature; block

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from transcoder.activations import topk_mask
from transcoder.scale_out.processes import Processes
from transcoder.sparse import SparseActs, from_mask, offsets_of

BITS = 8
"""Of a value that are compared at a time."""


def largest_of_rows(
    offers: Sequence[Sequence[SparseActs]], k: int, processes: Processes
) -> list[list[SparseActs]]:
    """Of each row the k largest, from every feature block's k largest.

    Args:
        offers: Of each of this process's feature blocks, of each layer.
    """
    layout = processes.layout
    if layout.blocks[1] == 1:
        return [list(of_block) for of_block in offers]
    padded = [torch.stack([_padded(acts, k) for acts in of_block]) for of_block in offers]
    every = torch.cat(processes.gathered(padded, "feature"), 2)
    kept = (topk_mask(every, k) & ~(every <= 0)).unflatten(2, (layout.blocks[1], k))  # type: ignore[no-untyped-call]
    return [
        [_where(acts, of_layer[:, number]) for acts, of_layer in zip(of_block, kept, strict=True)]
        for number, of_block in zip(layout.feature_blocks, offers, strict=True)
    ]


def largest_of_batch(
    pre_acts: Sequence[Sequence[Tensor]], k: int, processes: Processes
) -> list[list[list[SparseActs]]]:
    """Of each layer the k * rows largest of all rows, those that are positive or NaN.

    Args:
        pre_acts: [layer batch feature] of each of this process's data blocks, of each feature block.
    Returns:
        Entries of each data block, of each feature block, of each layer.
    """
    n_layers, rows, _ = pre_acts[0][0].shape
    budget = k * rows * processes.layout.blocks[0]
    cells = [block for of_rows in pre_acts for block in of_rows]
    masks = [torch.empty_like(cell, dtype=torch.bool) for cell in cells]
    for layer in range(n_layers):
        keys = [_keys(cell[layer]) for cell in cells]
        limit, ties = _nth_largest(keys, budget, processes)
        at_limit = [key == limit for key in keys]
        kept = _first_ties(at_limit, ties, limit, processes)
        for mask, key, tied in zip(masks, keys, kept, strict=True):
            mask[layer] = (key > limit) | tied
    found = [
        [from_mask(*of_layer) for of_layer in zip(cell.unbind(), mask.unbind(), strict=True)]
        for cell, mask in zip(cells, masks, strict=True)
    ]
    width = len(processes.layout.feature_blocks)
    return [found[start : start + width] for start in range(0, len(found), width)]


def _padded(acts: SparseActs, k: int) -> Tensor:
    """The values of each row [batch k], zeros after the last."""
    padded = acts.values.new_zeros(acts.n_rows, k)
    padded[acts.rows(), _places(acts)] = acts.values.detach()
    return padded


def _places(acts: SparseActs) -> Tensor:
    """How many entries of its row come before each entry."""
    return torch.arange(acts.nnz, device=acts.offsets.device) - acts.offsets[acts.rows()]


def _where(acts: SparseActs, kept: Tensor) -> SparseActs:
    """The entries whose places in their rows are kept [batch k]."""
    chosen = kept[acts.rows(), _places(acts)]
    return SparseActs(acts.values[chosen], acts.indices[chosen], offsets_of(kept.sum(1)))


def _keys(values: Tensor) -> Tensor:
    """Whole numbers in the order of the values: 0 for those not above zero, NaNs equal and above all."""
    kind = {4: torch.int32, 8: torch.int64}[values.element_size()]
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(kind))
    keys = torch.where(values > 0, values.contiguous().view(kind), 0)
    return torch.where(values.isnan(), infinity + 1, keys)


def _nth_largest(keys: Sequence[Tensor], n: int, processes: Processes) -> tuple[int, int]:
    """The n-th largest key of all processes, and how many of those equal to it belong to the n largest.

    Fewer than n above zero make it 0, of which none belong.
    """
    left = [key[key > 0].long() for key in keys]
    width = 8 * keys[0].element_size()
    limit = 0
    cuts = [*range(width, 0, -BITS), 0]
    for above, shift in pairwise(cuts):
        digits = [(own >> shift) & ((1 << (above - shift)) - 1) for own in left]
        counts = torch.stack([digit.bincount(minlength=1 << BITS) for digit in digits]).sum(0)
        counts = processes.count(counts, "data", "feature")
        from_top = counts.flip(0).cumsum(0)
        reached = (from_top >= n).nonzero()
        if len(reached) == 0:
            return 0, 0
        place = int(reached[0])
        n -= int(from_top[place] - counts.flip(0)[place])
        digit = len(counts) - 1 - place
        limit = (limit << (above - shift)) | digit
        left = [own[is_digit == digit] for own, is_digit in zip(left, digits, strict=True)]
    return limit, n


def _first_ties(at_limit: Sequence[Tensor], ties: int, limit: int, processes: Processes) -> list[Tensor]:
    """Of all places at the limit, the first by row, then by feature.

    Args:
        at_limit: [batch feature] of each of this process's pairs of blocks.
    """
    if limit == 0:
        return [torch.zeros_like(mask) for mask in at_limit]
    layout = processes.layout
    width = len(layout.feature_blocks)
    per_row = [mask.sum(1) for mask in at_limit]
    total = processes.count(torch.stack(per_row).sum(), "data", "feature")
    if int(total) == ties:
        return list(at_limit)
    by_rows = [
        torch.stack(processes.gathered(per_row[start : start + width], "feature"))
        for start in range(0, len(per_row), width)
    ]
    # [data block, row, feature block]: the order in which ties are kept.
    every = torch.stack(processes.gathered(by_rows, "data")).transpose(1, 2)
    before = (every.flatten().cumsum(0) - every.flatten()).view_as(every)
    numbers = [(i, j) for i in layout.data_blocks for j in layout.feature_blocks]
    return [
        mask & (mask.cumsum(1) <= (ties - before[i, :, j])[:, None])
        for mask, (i, j) in zip(at_limit, numbers, strict=True)
    ]
