"""The loops that numba compiles to pick the largest pre-activations; see `compiled.py`.

They compare the bits of floats, as integers of the same width: above zero both have the same order. `infinity` is
the bits of +inf, `magnitude` all bits but the sign. Only positive values are ever picked, and NaNs, which count as
equal and larger than all: they must stay visible.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import no_type_check

import numpy as np

from oracle.kernels import compiled


@compiled(inline="always")
@no_type_check
def _key(bits, infinity, magnitude):
    return infinity + 1 if (bits & magnitude) > infinity else bits


@compiled()
@no_type_check
def _replace_root(heap, key):
    """Replace the root, the smallest of a heap, by a larger key."""
    place = 0
    while 2 * place + 1 < heap.size:
        child = 2 * place + 1
        if child + 1 < heap.size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = key


@compiled()
@no_type_check
def largest_of_rows(x, infinity, magnitude, k, first, stop, indices, counts):
    """The places of the k largest of each row from `first` up to `stop`; ties go to the lowest place.

    Args:
        indices: Filled with the places in each row, ascending.
        counts: Filled with how many they are.
    """
    heap = np.empty(k, x.dtype)
    for row in range(first, stop):
        heap[:] = 0
        for bits in x[row]:
            key = _key(bits, infinity, magnitude)
            if key > heap[0]:
                _replace_root(heap, key)
        threshold, ties, found = heap[0], k, 0
        for key in heap:
            ties -= key > threshold
        for j in range(x.shape[1]):
            key = _key(x[row, j], infinity, magnitude)
            if key >= threshold and key > 0:
                if key == threshold:
                    if ties == 0:
                        continue
                    ties -= 1
                indices[row, found] = j
                found += 1
        counts[row] = found


@compiled()
@no_type_check
def histogram(x, infinity, magnitude, shift, first, stop, counts):
    """Count the keys above zero of elements `first` up to `stop` by their bits from `shift` up."""
    for i in range(first, stop):
        key = _key(x[i], infinity, magnitude)
        if key > 0:
            counts[key >> shift] += 1


@compiled()
@no_type_check
def count_from(x, infinity, magnitude, lowest, first, stop, counts):
    """How many keys of each row are at `lowest` or above."""
    for row in range(first, stop):
        found = 0
        for j in range(x.shape[1]):
            found += _key(x[row, j], infinity, magnitude) >= lowest
        counts[row] = found


@compiled()
@no_type_check
def list_from(x, infinity, magnitude, lowest, offsets, first, stop, indices, keys):
    """The places in each row, and the keys, of those at `lowest` or above; row by row from `offsets[row]` on."""
    for row in range(first, stop):
        at = offsets[row]
        for j in range(x.shape[1]):
            key = _key(x[row, j], infinity, magnitude)
            if key >= lowest:
                indices[at] = j
                keys[at] = key
                at += 1


@compiled()
@no_type_check
def keep_first(keys, threshold, ties, offsets, kept, counts):
    """Mark keys above the threshold, and the first `ties` of those at it; count what each row keeps."""
    for row in range(offsets.size - 1):
        found = 0
        for i in range(offsets[row], offsets[row + 1]):
            kept[i] = keys[i] > threshold
            if keys[i] == threshold and ties > 0:
                kept[i] = True
                ties -= 1
            found += kept[i]
        counts[row] = found
