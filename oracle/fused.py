"""Compiled loops for the passes between matrix products; same bits as the plain path, without its memory traffic.

numba compiles these without its fast-math flags, so every operation rounds on its own and nothing is fused or
reordered; reductions that could be vectorised only by reordering are integer sums and integer maxima, which
any order leaves the same. Rows are shared out to threads that run the compiled code without Python's lock.
Only imported when numba is there; `elementwise.py`, `repair.py` and `products.py` are the plain path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.shapes import Int64
from oracle import kernels, product_kernels
from oracle.errors import NotFiniteError
from oracle.threads import over_rows

NORM_MARGIN = 1.01
"""Covers what rounding did to norms."""

LEFT_OVER = 64
"""Places for outputs that even the compiled repair leaves to Python integers, for each thread."""

INFINITY_BITS = 0x7F800000


def _array(x: Tensor) -> NDArray[Any]:
    """The tensor's memory as a numpy array."""
    array: NDArray[Any] = x.detach().numpy()
    return array


def _zeros(n: int) -> NDArray[np.float64]:
    """What stands for biases where there are none, so that one loop serves both."""
    return np.zeros(n)


def _memory(x: Tensor) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat memory of [group, row, term], stored by rows or by terms, and the three strides."""
    _, rows, terms = x.shape
    if not x.is_contiguous() and x.mT.is_contiguous():
        return _array(x.mT.reshape(-1)), np.array([rows * terms, 1, rows])
    return _array(x.contiguous().reshape(-1)), np.array([rows * terms, terms, 1])


def _window(x: Tensor) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Flat memory that spans [group, row, col] with adjacent columns, and the strides of groups and rows."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _array(x.as_strided((span if x.numel() else 0,), (1,))), np.array(x.stride()[:2])


def certify(
    product: Tensor,
    a: Tensor,
    b: Tensor,
    row_bound: Tensor,
    col_norms: Tensor,
    col_bound: Tensor | None,
    bias: Tensor | None,
    factor: float,
    row_norms: Tensor,
    out: Tensor,
) -> Int64[Tensor, "undecided three"]:
    """See `products.certified`: rounds, repairs, and returns the places (group, row, col) it could not decide."""
    given = (
        _array(product),
        _array(a),
        *_memory(b),
        *(_array(x.contiguous()) for x in (row_bound, col_norms)),
        *(_zeros(product.shape[2]) if x is None else _array(x) for x in (col_bound, bias)),
        factor,
        _array((row_norms * NORM_MARGIN).contiguous()),
        *_window(out),
    )

    def run(start: int, stop: int) -> NDArray[np.int64]:
        places = np.empty((LEFT_OVER, 3), np.int64)
        found = product_kernels.certify(*given, start, stop, places)
        if found > LEFT_OVER:  # start again with room for all of them
            places = np.empty((found, 3), np.int64)
            product_kernels.certify(*given, start, stop, places)
        return places[:found]

    return torch.from_numpy(
        np.concatenate(over_rows(run, product.shape[0] * product.shape[1], product.numel()))
    )


def attend(
    product: Tensor,
    a: Tensor,
    b: Tensor,
    row_bound: Tensor,
    col_norms: Tensor,
    factor: float,
    row_norms: Tensor,
) -> Tensor | None:
    """Round the scores in place of their float64 product and replace each row by its softmax, as float64.

    Returns each row's largest probability before rounding; None if some score could not be decided: then
    nothing in `product` is of use.
    """
    given = (
        _array(product),
        _array(a),
        *_memory(b),
        *(_array(x.contiguous()) for x in (row_bound, col_norms)),
        _zeros(product.shape[2]),
        factor,
        _array((row_norms * NORM_MARGIN).contiguous()),
    )
    groups, rows, cols = product.shape
    peaks = product.new_empty(groups, rows)

    def run(start: int, stop: int) -> int:
        return int(product_kernels.attend(*given, np.empty(cols, np.float32), start, stop, _array(peaks)))

    return None if sum(over_rows(run, groups * rows, product.numel())) else peaks


def softmax(scores: Tensor) -> Tensor:
    """See `elementwise.softmax`."""
    source = scores.detach().contiguous().reshape(-1, scores.shape[-1])
    out = torch.empty_like(source)

    def run(start: int, stop: int) -> None:
        kernels.softmax(_array(source), np.empty(source.shape[1]), start, stop, _array(out))

    over_rows(run, source.shape[0], source.numel())
    return out.reshape(scores.shape)


def _logistic(x: Tensor, kernel: Callable[..., None]) -> Tensor:
    source = x.detach().contiguous().reshape(-1)
    out = torch.empty_like(source)
    over_rows(lambda i, j: kernel(_array(source), i, j, _array(out)), source.numel(), source.numel())
    return out.reshape(x.shape)


def gelu_tanh(x: Tensor) -> Tensor:
    """See `elementwise.gelu_tanh`."""
    return _logistic(x, kernels.gelu_tanh)


def silu(x: Tensor) -> Tensor:
    """See `elementwise.silu`."""
    return _logistic(x, kernels.silu)


def _finite(out: Tensor, largest: list[int]) -> Tensor:
    """The result, if the bits of its largest magnitude in each thread's part are those of a finite number."""
    if max(largest, default=0) >= INFINITY_BITS:
        raise NotFiniteError
    return out


def layer_norm(x: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `elementwise.layer_norm`."""
    source = x.detach().contiguous().reshape(-1, x.shape[-1])
    out = torch.empty_like(source)
    given = scale is not None
    scales = source.new_empty(source.shape[0]) if scale is None else scale.detach().reshape(-1).contiguous()
    weights = _array(weight.detach().contiguous())

    def run(start: int, stop: int) -> int:
        work = np.empty(source.shape[1])
        arguments = _array(source), weights, _array(scales), given, work
        return int(kernels.layer_norm(*arguments, start, stop, _array(out)))

    _finite(out, over_rows(run, source.shape[0], source.numel()))
    return out.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def add(a: Tensor, b: Tensor) -> Tensor:
    """See `elementwise.add`; equal shapes."""
    given = tuple(_array(t.detach().contiguous().reshape(-1)) for t in (a, b))
    out = a.new_empty(a.shape)
    flat = _array(out.reshape(-1))
    return _finite(out, over_rows(lambda i, j: int(kernels.add(*given, i, j, flat)), a.numel(), a.numel()))


def mul(x: Tensor, factor: Tensor) -> Tensor:
    """See `elementwise.mul`; factor [batch, 1, d] for x [batch, pos, d]."""
    return _by_position(kernels.gate, x, factor)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See `elementwise.modulate`; shift and scale [batch, 1, d] for x [batch, pos, d]."""
    return _by_position(kernels.modulate, x, shift, scale)


def _by_position(kernel: Callable[..., int], x: Tensor, *per_sequence: Tensor) -> Tensor:
    source = x.detach().contiguous()
    given = (_array(source), *(_array(t.detach().contiguous()) for t in per_sequence))
    out = torch.empty_like(source)
    target, rows = _array(out), x.shape[0] * x.shape[1]
    return _finite(out, over_rows(lambda i, j: int(kernel(*given, i, j, target)), rows, x.numel()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `elementwise.rotate`."""
    source = x.detach().contiguous()
    given = _array(source), _array(cos.detach().contiguous()), _array(sin.detach().contiguous())
    out = torch.empty_like(source)
    target, rows = _array(out), x.shape[0] * x.shape[1]
    return _finite(out, over_rows(lambda i, j: int(kernels.rotate(*given, i, j, target)), rows, x.numel()))
