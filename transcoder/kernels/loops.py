"""The loops that numba compiles for `compiled.py`.

Floating-point contraction and reassociation are off (numba's default). A dot product is the exception that needs
its own order to be fast: LANES * UNROLLED partial sums, spelled out in LLVM's vector types, so that the result is
the same on machines of any vector width. Every loop writes outputs that no other call writes.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from oracle.kernels import compiled

LANES = 16
UNROLLED = 4
STRIDE = LANES * UNROLLED
"""Elements that one round of a row operation takes; what is left over goes one by one."""

I32 = ir.IntType(32)


# Row operations, on parts of flat arrays. `soon[soon_at:]` is what the next call will read: its cache lines are asked
# for ahead, because rows follow each other at random. It may be any place inside the array.


@no_type_check
def _start(context, builder, array_type, array, place):
    """Pointer to an element of a flat array."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [place])


@no_type_check
def _lanes(builder, pointer, place, vector):
    return builder.bitcast(builder.gep(pointer, [place]), vector.as_pointer())


@no_type_check
def _splat(builder, scalar, vector):
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, scalar, I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


@no_type_check
def _prefetch(builder, pointer, place):
    byte = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
    read, nearest, data = I32(0), I32(3), I32(1)
    builder.call(function, [builder.bitcast(builder.gep(pointer, [place]), byte), read, nearest, data])


@no_type_check
def _in_lanes(builder, n):
    """Loop over the places 0, LANES, 2 LANES ... n - LANES, UNROLLED at a time; yields (which of those, place)."""
    with cgutils.for_range_slice(builder, n.type(0), n, n.type(STRIDE), inc=True) as (place, _):
        for part in range(UNROLLED):
            yield part, builder.add(place, n.type(part * LANES))


@no_type_check
def _total(builder, vector, scalar):
    """Sum of a vector's lanes, by halves."""
    half = LANES // 2
    while half:
        empty = ir.Constant(vector.type, ir.Undefined)
        picked = [
            builder.shuffle_vector(vector, empty, ir.Constant(ir.VectorType(I32, half), list(lanes)))
            for lanes in (range(half), range(half, 2 * half))
        ]
        vector = builder.fadd(*picked)
        half //= 2
    return builder.extract_element(vector, I32(0))


@intrinsic
@no_type_check
def _add_lanes(typing_context, out, out_at, row, row_at, value, n, soon, soon_at):
    """out[out_at : out_at + n] += value * row[row_at : row_at + n], n a multiple of STRIDE."""

    def generate(context, builder, signature, arguments):
        outs = _start(context, builder, signature.args[0], *arguments[0:2])
        rows = _start(context, builder, signature.args[2], *arguments[2:4])
        ahead = _start(context, builder, signature.args[6], *arguments[6:8])
        vector = ir.VectorType(context.get_value_type(value), LANES)
        values = _splat(builder, arguments[4], vector)
        align = vector.element.get_abi_size(context.target_data)
        for _, place in _in_lanes(builder, arguments[5]):
            _prefetch(builder, ahead, place)
            target = _lanes(builder, outs, place, vector)
            term = builder.fmul(values, builder.load(_lanes(builder, rows, place, vector), align=align))
            builder.store(builder.fadd(builder.load(target, align=align), term), target, align=align)
        return context.get_dummy_value()

    return types.void(out, out_at, row, row_at, value, n, soon, soon_at), generate


@intrinsic
@no_type_check
def _dot_lanes(typing_context, a, a_at, b, b_at, n, soon_at):
    """Sum of a[a_at : a_at + n] * b[b_at : b_at + n], n a multiple of STRIDE; next comes b[soon_at:]."""

    def generate(context, builder, signature, arguments):
        return _dot(context, builder, signature, arguments, None)

    return a.dtype(a, a_at, b, b_at, n, soon_at), generate


@intrinsic
@no_type_check
def _dot_add_lanes(typing_context, a, a_at, b, b_at, n, soon_at, out, value):
    """`_dot_lanes`, and out[a_at : a_at + n] += value * b[b_at : b_at + n] in the same pass."""

    def generate(context, builder, signature, arguments):
        outs = _start(context, builder, signature.args[6], arguments[6], arguments[1])
        return _dot(context, builder, signature, arguments, outs)

    return a.dtype(a, a_at, b, b_at, n, soon_at, out, value), generate


@no_type_check
def _dot(context, builder, signature, arguments, outs):
    firsts = _start(context, builder, signature.args[0], *arguments[0:2])
    seconds = _start(context, builder, signature.args[2], *arguments[2:4])
    ahead = _start(context, builder, signature.args[2], arguments[2], arguments[5])
    scalar = context.get_value_type(signature.return_type)
    vector = ir.VectorType(scalar, LANES)
    align = scalar.get_abi_size(context.target_data)
    zero = ir.Constant(vector, [0.0] * LANES)
    sums = [cgutils.alloca_once(builder, vector) for _ in range(UNROLLED)]
    for partial in sums:
        builder.store(zero, partial)
    values = None if outs is None else _splat(builder, arguments[7], vector)
    for part, place in _in_lanes(builder, arguments[4]):
        _prefetch(builder, ahead, place)
        second = builder.load(_lanes(builder, seconds, place, vector), align=align)
        product = builder.fmul(builder.load(_lanes(builder, firsts, place, vector), align=align), second)
        builder.store(builder.fadd(builder.load(sums[part]), product), sums[part])
        if outs is not None:
            target = _lanes(builder, outs, place, vector)
            term = builder.fmul(values, second)
            builder.store(builder.fadd(builder.load(target, align=align), term), target, align=align)
    parts = [builder.load(partial) for partial in sums]
    while len(parts) > 1:
        parts = [builder.fadd(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return _total(builder, parts[0], scalar)


# Sums over entries. A "strip" is columns `base` up to `base + n` of each row, rows being `stride` elements apart.


@compiled()
@no_type_check
def add_rows(out, out_stride, out_base, table, stride, base, n, starts, rows, values):
    """out[row] += value * table[feature] for all entries, by feature: a strip of the table stays in cache."""
    whole = n - n % STRIDE
    last = rows.size - 1
    for feature in range(starts.size - 1):
        at = feature * stride + base
        for entry in range(starts[feature], starts[feature + 1]):
            to = rows[entry] * out_stride + out_base
            value = values[entry]
            soon = rows[min(entry + 1, last)] * out_stride + out_base
            _add_lanes(out, to, table, at, value, whole, out, soon)
            for j in range(whole, n):
                out[to + j] += value * table[at + j]


@compiled()
@no_type_check
def gather_rows(out, fresh, stride, base, x, x_stride, x_base, n, starts, rows, values, first, stop):
    """out[feature] += value * x[row] for the entries of features `first` up to `stop`.

    Args:
        fresh: Whether what `out` holds counts as zero.
    """
    whole = n - n % STRIDE
    last = rows.size - 1
    for feature in range(first, stop):
        to = feature * stride + base
        if fresh:
            out[to : to + n] = 0
        for entry in range(starts[feature], starts[feature + 1]):
            at = rows[entry] * x_stride + x_base
            value = values[entry]
            _add_lanes(out, to, x, at, value, whole, x, rows[min(entry + 1, last)] * x_stride + x_base)
            for j in range(whole, n):
                out[to + j] += value * x[at + j]


@compiled()
@no_type_check
def dot_rows(dots, table, stride, base, x, x_stride, x_base, n, starts, rows, first, stop):
    """dots[entry] += the dot product of table[feature] and x[row], for the features from `first` to `stop`."""
    whole = n - n % STRIDE
    last = rows.size - 1
    for feature in range(first, stop):
        at = feature * stride + base
        for entry in range(starts[feature], starts[feature + 1]):
            by = rows[entry] * x_stride + x_base
            total = _dot_lanes(table, at, x, by, whole, rows[min(entry + 1, last)] * x_stride + x_base)
            for j in range(whole, n):
                total += table[at + j] * x[by + j]
            dots[entry] += total


@compiled()
@no_type_check
def dot_and_gather_rows(
    dots, out, fresh, table, stride, base, x, x_stride, x_base, n, starts, rows, values, first, stop
):
    """`dot_rows` and `gather_rows` at once: each row of x is read for both."""
    whole = n - n % STRIDE
    last = rows.size - 1
    for feature in range(first, stop):
        at = feature * stride + base
        if fresh:
            out[at : at + n] = 0
        for entry in range(starts[feature], starts[feature + 1]):
            by = rows[entry] * x_stride + x_base
            value = values[entry]
            soon = rows[min(entry + 1, last)] * x_stride + x_base
            total = _dot_add_lanes(table, at, x, by, whole, soon, out, value)
            for j in range(whole, n):
                total += table[at + j] * x[by + j]
                out[at + j] += value * x[by + j]
            dots[entry] += total


# Squared errors


@compiled()
@no_type_check
def row_errors(a, b, n, first, stop, sums):
    """Sum of squares of a - b in each row from `first` up to `stop`; a and b flat, rows of n."""
    whole = n - n % STRIDE
    difference = np.empty(n, a.dtype)
    for row in range(first, stop):
        for j in range(n):
            difference[j] = a[row * n + j] - b[row * n + j]
        total = _dot_lanes(difference, 0, difference, 0, whole, 0)
        for j in range(whole, n):
            total += difference[j] * difference[j]
        sums[row] = total


@compiled()
@no_type_check
def row_error_gradients(a, b, n, factors, first, stop, out):
    """out = 2 * factor * (a - b), with a factor for each row."""
    for row in range(first, stop):
        factor = factors[row] + factors[row]
        for j in range(row * n, row * n + n):
            out[j] = factor * (a[j] - b[j])
