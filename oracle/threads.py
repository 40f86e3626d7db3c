"""Sharing rows out to as many threads as torch uses, for loops that run without Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")

WORTH_A_THREAD = 1 << 16
"""Elements below which handing work to another thread costs more than it saves."""


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # Keyed by the process: a pool does not survive a fork.
    return ThreadPoolExecutor(threads, thread_name_prefix="exact")


def over_rows(run: Callable[[int, int], T], n_rows: int, n_elements: int) -> list[T]:
    """run(start, stop) over rows 0 ... n_rows - 1, in order of the rows; results do not depend on the split."""
    threads = min(torch.get_num_threads(), n_rows, max(1, n_elements // WORTH_A_THREAD))
    if threads <= 1:
        return [run(0, n_rows)]
    cuts = [n_rows * i // threads for i in range(threads + 1)]
    futures = [_pool(threads, os.getpid()).submit(run, start, stop) for start, stop in pairwise(cuts)]
    return [future.result() for future in futures]
