"""Float64 copies of weights, kept within a budget and never trusted blindly.

torch counts in-place changes of a tensor, but not those made through `.data` or a numpy view. A copy is
therefore used only if a 64-bit checksum over every bit of the weight is what it was, which costs a third of
making the copy again. Nothing depends on what is kept, except time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.randomness import random_bits
from mdlm_interp.shapes import Float32
from oracle.products import Rows, Workspace, as_rows

DEFAULT_BUDGET_BYTES = 512 << 20
"""Room for float64 copies: all of a small model, two thirds of the published model's blocks."""

_WORDS_AT_ONCE = 1 << 15
_multipliers: dict[torch.device, Tensor] = {}


def checksum(weight: Tensor) -> int:
    """A number that changes when any bit of a contiguous float32 tensor does, but for a chance of 2^-63."""
    flat = weight.detach().reshape(-1).view(torch.int32)
    even = flat.numel() // 2 * 2
    words = flat[:even].view(torch.int64)
    if weight.device not in _multipliers:
        bits = random_bits(0, "oracle:checksum", 0, _WORDS_AT_ONCE).view("int64") | 1
        _multipliers[weight.device] = torch.from_numpy(bits).to(weight.device)
    multipliers = _multipliers[weight.device]
    total = int(flat[-1]) if flat.numel() > even else 0
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        piece = words[start : start + _WORDS_AT_ONCE]
        total = (total * 0x9E3779B97F4A7C15 + int((piece * multipliers[: piece.numel()]).sum())) % 2**64
    return total


@dataclass
class _Entry:
    weight: weakref.ref[Tensor]
    checksum: int
    rows: Rows
    size: int

    def describes(self, weight: Tensor) -> bool:
        """Whether the copy is that of this tensor as it is now."""
        same = self.weight() is weight and self.rows.values.device == weight.device
        return same and self.rows.values.shape[1:] == weight.shape and self.checksum == checksum(weight)


class WeightCache:
    """Float64 copies of weights.

    Args:
        budget_bytes: What all copies together may take; 0 keeps nothing. Weights that come when it is full are
            converted each time.
    """

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[WeightCache], tuple[int]]:
        # A copy starts empty: what is kept belongs to the original's weights.
        return WeightCache, (self.budget_bytes,)

    @property
    def used_bytes(self) -> int:
        """What the copies take now."""
        return sum(entry.size for entry in self._entries.values())

    def rows_of(
        self, weight: Float32[Tensor, "d_out d_in"], step: int, what: str
    ) -> Iterator[tuple[int, Rows]]:
        """The weight's rows as float64, `step` at a time, each with the number of its first row.

        What is yielded is valid until the next is asked for.
        """
        kept = self._kept(weight, what) if self.budget_bytes else None
        work = Workspace(weight.device)
        for start in range(0, weight.shape[0], step):
            if kept is not None:
                yield start, kept.part(slice(None), slice(start, start + step))
            else:
                yield start, as_rows(weight[start : start + step], what, work=work)

    def _kept(self, weight: Tensor, what: str) -> Rows | None:
        if not weight.is_contiguous():
            return None
        key = id(weight)
        entry = self._entries.get(key)
        if entry is not None and entry.describes(weight):
            return entry.rows
        self._entries.pop(key, None)
        size = 8 * weight.numel()
        if self.used_bytes + size > self.budget_bytes:
            return None
        rows = as_rows(weight, what)
        entries = self._entries
        forget = weakref.ref(weight, lambda _: entries.pop(key, None))
        self._entries[key] = _Entry(forget, checksum(weight), rows, size)
        return rows
