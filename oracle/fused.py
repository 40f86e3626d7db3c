"""Compiled loops for the passes between matrix products; same bits as the plain path, without its memory traffic.

numba compiles these without its fast-math flags, so every operation rounds on its own and nothing is fused or
reordered; reductions that could be vectorised only by reordering are integer sums and integer maxima, which
any order leaves the same. Rows are shared out to threads that numba's compiled code runs without Python's
lock. Only imported when numba is there; `elementwise.py`, `repair.py` and `products.py` are the plain path.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.shapes import Int64
from oracle import kernels
from oracle.threads import over_rows

_EMPTY = np.zeros(0)
NORM_MARGIN = 1.01
"""Covers what rounding did to norms."""

LEFT_OVER = 64
"""Places for outputs that even the compiled repair leaves to Python integers, for each thread."""


def _flat(x: Tensor) -> NDArray[Any]:
    """The tensor's memory as a numpy array."""
    array: NDArray[Any] = x.detach().numpy()
    return array


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
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    arrays = [_flat(x) for x in (product, a, b, row_bound, col_norms)]
    bounds = _EMPTY if col_bound is None else _flat(col_bound)
    biases = _EMPTY if bias is None else _flat(bias)
    sizes = _flat((row_norms * NORM_MARGIN).contiguous())
    groups, rows = product.shape[:2]

    def run(start: int, stop: int) -> NDArray[np.int64]:
        places = np.empty((LEFT_OVER, 3), np.int64)
        found = kernels.certify(*arrays, bounds, biases, factor, sizes, _flat(target), start, stop, places)
        if found > LEFT_OVER:  # start again with room for all of them
            places = np.empty((found, 3), np.int64)
            kernels.certify(*arrays, bounds, biases, factor, sizes, _flat(target), start, stop, places)
        return places[:found]

    undecided = np.concatenate(over_rows(run, groups * rows, product.numel()))
    if target is not out:
        out.copy_(target)
    return torch.from_numpy(undecided)


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
    arrays = [_flat(x) for x in (product, a, b, row_bound, col_norms)]
    groups, rows, cols = product.shape
    sizes = _flat((row_norms * NORM_MARGIN).contiguous())
    peaks = torch.empty(groups, rows, dtype=torch.float64)

    def run(start: int, stop: int) -> int:
        return int(kernels.attend(*arrays, factor, sizes, np.empty(cols, np.float32), start, stop, _flat(peaks)))

    return None if sum(over_rows(run, groups * rows, product.numel())) else peaks


def softmax(scores: Tensor) -> Tensor:
    """See `elementwise.softmax`."""
    source = scores.detach().contiguous().reshape(-1, scores.shape[-1])
    out = torch.empty_like(source)

    def run(start: int, stop: int) -> None:
        kernels.softmax(_flat(source), np.empty(source.shape[1]), start, stop, _flat(out))

    over_rows(run, source.shape[0], source.numel())
    return out.reshape(scores.shape)


def logistic(x: Tensor, gelu: bool) -> Tensor:
    """See `elementwise.gelu_tanh` and `elementwise.silu`."""
    source = x.detach().contiguous().reshape(-1)
    out = torch.empty_like(source)
    kernel = kernels.gelu_tanh if gelu else kernels.silu
    over_rows(lambda i, j: kernel(_flat(source), i, j, _flat(out)), source.numel(), source.numel())
    return out.reshape(x.shape)


def layer_norm(x: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `elementwise.layer_norm`."""
    source = x.detach().contiguous().reshape(-1, x.shape[-1])
    out = torch.empty_like(source)
    given = scale is not None
    scales = torch.empty(source.shape[0]) if scale is None else scale.detach().reshape(-1).contiguous()
    weights = _flat(weight.detach().contiguous())

    def run(start: int, stop: int) -> None:
        work = np.empty(source.shape[1])
        kernels.layer_norm(_flat(source), weights, _flat(scales), given, work, start, stop, _flat(out))

    over_rows(run, source.shape[0], source.numel())
    return out.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See `elementwise.modulate`; shift and scale [batch, 1, d] for x [batch, pos, d]."""
    source = x.detach().contiguous()
    out = torch.empty_like(source)
    shifts, scales = (_flat(t.detach().contiguous()) for t in (shift, scale))

    def run(start: int, stop: int) -> None:
        kernels.modulate(_flat(source), shifts, scales, start, stop, _flat(out))

    over_rows(run, source.shape[0] * source.shape[1], source.numel())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `elementwise.rotate`."""
    source = x.detach()
    if source.stride(-1) != 1:
        source = source.contiguous()
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    tables = _flat(cos.contiguous()), _flat(sin.contiguous())

    def run(start: int, stop: int) -> None:
        kernels.rotate(_flat(source), *tables, start, stop, _flat(out))

    over_rows(run, source.shape[0] * source.shape[1], source.numel())
    return out
