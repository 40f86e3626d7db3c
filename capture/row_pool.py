"""Memory for the rows of batches, used again and again.

A batch's activations wait for the thread that writes them while the next batches are computed. In memory of their
own the model's operations find theirs still in the processor's cache, and the system has no new pages to clear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor


class RowPool:
    """Lends memory for a batch's rows; there is as much of it as batches that are under way at once.

    Args:
        shapes: Of one row of each hook.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        # A list's append and pop are atomic, so two threads may use it.
        self._free: list[dict[str, Tensor]] = []

    def take(self, rows: int, room: int = 0) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Memory [row, ...] by hook with anything in it, and what to call when nobody needs it any more.

        Args:
            room: Rows that a later batch may have: new memory has room for them, or it would be replaced by larger
                and larger pieces, whose gaps the process keeps. Pages that nobody writes to cost nothing.
        """
        try:
            memory = self._free.pop()
        except IndexError:
            memory = {}
        if any(len(acts) < rows for acts in memory.values()) or not memory:
            memory = {hook: torch.empty((max(rows, room), *shape)) for hook, shape in self._shapes.items()}
        return {hook: acts[:rows] for hook, acts in memory.items()}, partial(self._free.append, memory)
