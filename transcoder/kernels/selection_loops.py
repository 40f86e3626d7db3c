"""The loops that numba compiles to pick the largest pre-activations; see `compiled.py`.

They compare the bits of floats, as integers of the same width: above zero both have the same order. `infinity` is
the bits of +inf, `magnitude` all bits but the sign. Only positive values are ever picked, and NaNs, which count as
equal and larger than all: they must stay visible.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from oracle.kernels import compiled

LANES = 16
"""Elements compared at once."""

GUESS = 0.8
"""Where to look for a row's largest, as a share of the smallest that was kept of the row before."""


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


@intrinsic
@no_type_check
def _which_above(typing_context, x, at, limit):
    """Bits that say which of x[at : at + LANES] are above a limit, or NaN."""

    def generate(context, builder, signature, arguments):
        start = builder.gep(context.make_array(x)(context, builder, arguments[0]).data, [arguments[1]])
        scalar = context.get_value_type(x.dtype)
        vector, empty = ir.VectorType(scalar, LANES), ir.VectorType(scalar, LANES)(ir.Undefined)
        align = scalar.get_abi_size(context.target_data)
        values = builder.load(builder.bitcast(start, vector.as_pointer()), align=align)
        zeros = ir.VectorType(ir.IntType(32), LANES)([0] * LANES)
        first = builder.insert_element(empty, arguments[2], ir.IntType(32)(0))
        is_above = builder.fcmp_unordered(">", values, builder.shuffle_vector(first, empty, zeros))
        return builder.zext(builder.bitcast(is_above, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(x, at, limit), generate


@intrinsic
@no_type_check
def _lowest_bit(typing_context, bits):
    """Place of the lowest bit that is set."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return bits(bits), generate


@intrinsic
@no_type_check
def _bits_set(typing_context, bits):
    """How many bits are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return bits(bits), generate


@compiled()
@no_type_check
def _list_above(x, start, n, limit, places):
    """The places of x[start : start + n] above a limit, or NaN; returns how many."""
    found, whole = 0, n - n % LANES
    for block in range(0, whole, LANES):
        bits = _which_above(x, start + block, limit)
        while bits:
            places[found] = block + _lowest_bit(bits)
            found += 1
            bits &= bits - 1
    for j in range(whole, n):
        if not x[start + j] <= limit:
            places[found] = j
            found += 1
    return found


@compiled()
@no_type_check
def largest_of_rows(x, bits, infinity, magnitude, n, k, first, stop, indices, counts):
    """The places of the k largest of each row from `first` up to `stop`; ties go to the lowest place.

    A row is searched above a guess, from the row before; if fewer than k are there, above zero.

    Args:
        x: Flat, rows of n.
        bits: The same as integers.
        indices: Filled with the places in each row, ascending.
        counts: Filled with how many they are.
    """
    zero = x.dtype.type(0)
    heap, places, guess = np.empty(k, bits.dtype), np.empty(n, np.int32), zero
    for row in range(first, stop):
        start = row * n
        listed = _list_above(x, start, n, guess, places)
        if listed < k and guess > 0:
            listed = _list_above(x, start, n, zero, places)
        heap[:] = 0
        for place in places[:listed]:
            key = _key(bits[start + place], infinity, magnitude)
            if key > heap[0]:
                _replace_root(heap, key)
        threshold, ties, found, at_threshold = heap[0], k, 0, zero
        for key in heap:
            ties -= key > threshold
        for place in places[:listed]:
            key = _key(bits[start + place], infinity, magnitude)
            if key < threshold:
                continue
            if key == threshold:
                if ties == 0:
                    continue
                ties -= 1
                at_threshold = x[start + place]
            indices[row, found] = place
            found += 1
        counts[row] = found
        guess = x.dtype.type(GUESS) * at_threshold
        if not zero <= guess < np.inf:
            guess = zero


@compiled()
@no_type_check
def count_above(x, n, limit, first, stop, counts):
    """How many of each row are above a limit, or NaN; x flat, rows of n."""
    whole = n - n % LANES
    for row in range(first, stop):
        found = 0
        for at in range(row * n, row * n + whole, LANES):
            found += _bits_set(_which_above(x, at, limit))
        for at in range(row * n + whole, (row + 1) * n):
            found += not x[at] <= limit
        counts[row] = found


@compiled()
@no_type_check
def list_above(x, bits, infinity, magnitude, n, limit, offsets, first, stop, places, keys):
    """The places in each row, and the keys, of what `count_above` counts; row by row from `offsets[row]` on."""
    for row in range(first, stop):
        at = offsets[row]
        for i in range(at, at + _list_above(x, row * n, n, limit, places[at : offsets[row + 1]])):
            keys[i] = _key(bits[row * n + places[i]], infinity, magnitude)


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
