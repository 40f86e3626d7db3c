"""Which sequences of many are looked at, and which of them are one text.

A store that was captured at fixed times has every block of text once at each time. Evenly spaced numbers would beat
with these repetitions, and leave whole times out. So the choice is made within each part of time:
1. parts are the times themselves, or, if there are more of them than sequences are wanted, equal shares of the
   sequences in order of time;
2. every part gives as many as is its share, one at least (Adams' method);
3. in a part those texts come first that were chosen least often so far, in an order that the seed gives.
"""

# Axes: seq, pos, chosen

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.randomness import permutation
from mdlm_interp.shapes import Int64


def text_numbers(x_0: Int64[Tensor, "seq pos"]) -> NDArray[np.int64]:
    """The text of each sequence, numbered from 0 by first appearance: sequences of equal clean tokens are one text.

    What was captured at several times is so one text, as in the store's column "block", and a text that comes twice
    in the data too.
    """
    _, first, number = np.unique(x_0.numpy(), axis=0, return_index=True, return_inverse=True)
    found: NDArray[np.int64] = np.argsort(np.argsort(first))[number.reshape(-1)].astype(np.int64)
    return found


def well_mixed(t: NDArray[np.float64], text: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """Numbers of at most `limit` sequences, ascending, that are mixed as all are: a function of what is given alone.

    Args:
        t: Diffusion time of each sequence.
        text: Number of its text, from 0.

    >>> t, text = np.tile([0.1, 0.5, 0.9], 4), np.repeat(np.arange(4), 3)
    >>> chosen = well_mixed(t, text, 6, seed=0)
    >>> [int((t[chosen] == time).sum()) for time in (0.1, 0.5, 0.9)], len(set(text[chosen].tolist()))
    ([2, 2, 2], 4)
    """
    if limit >= len(t):
        return np.arange(len(t))
    keyed = permutation(seed, "clt:evaluated", 0, len(t))
    by_time = keyed[np.argsort(t[keyed], kind="stable")]
    ends = np.flatnonzero(np.diff(t[by_time])) + 1
    parts = np.split(by_time, ends) if len(ends) < limit else np.array_split(by_time, limit)
    times_chosen = np.zeros(int(text.max()) + 1, np.int64)
    chosen = []
    for part, count in zip(parts, _shares([len(part) for part in parts], limit), strict=True):
        texts = text[part]
        order = np.argsort(times_chosen[texts] + _earlier_equal(texts), kind="stable")[:count]
        np.add.at(times_chosen, texts[order], 1)
        chosen.append(part[order])
    return np.sort(np.concatenate(chosen))


def _shares(sizes: list[int], total: int) -> list[int]:
    """Adams' apportionment: one each, then always to the part with the most members for each that it gives."""
    given = [1] * len(sizes)
    queue = [(-float(size), part) for part, size in enumerate(sizes)]
    heapq.heapify(queue)
    for _ in range(total - len(sizes)):
        _, part = queue[0]
        given[part] += 1
        heapq.heapreplace(queue, (-sizes[part] / given[part], part))
    return given


def _earlier_equal(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    run_lengths = np.diff(starts, append=len(ordered))
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - np.repeat(starts, run_lengths)
    return found
