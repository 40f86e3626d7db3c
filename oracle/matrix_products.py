"""The exact linear map and matrix product, in tiles that bound the memory; see `products` for the engine."""

# Axes: group (independent products), row, col, d (any width)

from __future__ import annotations

import torch
from torch import Tensor

from mdlm_interp.shapes import Float32
from oracle.guard import exact_operation, require_finite
from oracle.operands import broadcast_shape, require_fit
from oracle.products import (
    Rows,
    Workspace,
    as_columns,
    as_rows,
    certified,
    require_representable,
    tile_elements,
    tiles,
)
from oracle.selftest import require_workers
from oracle.weights import WeightCache

WEIGHT_ELEMENTS_AT_ONCE = 1 << 22
"""Weights converted to float64 at a time where they are not kept (32 MiB)."""

LEAST_COLUMNS = 256
"""Outputs of a linear map that are computed together however many rows there are."""

_NOTHING_KEPT = WeightCache(0)


@exact_operation
def linear(
    x: Float32[Tensor, "*rows d_in"],
    weight: Float32[Tensor, "d_out d_in"],
    bias: Float32[Tensor, " d_out"] | None = None,
    *,
    cache: WeightCache | None = None,
) -> Float32[Tensor, "*rows d_out"]:
    """x times weight transposed, plus bias: the exact value rounded once.

    Args:
        cache: Keeps float64 copies of weights between calls.
    """
    require_fit("linear", x=(x, "*rows d_in"), weight=(weight, "d_out d_in"), bias=(bias, "d_out"))
    n_out, n_in = weight.shape
    if bias is not None:
        require_finite(bias, "linear: bias")
    n_rows = x.shape[:-1].numel()
    if n_in == 0 or n_out == 0:  # a sum of no products is the bias
        empty = x.new_zeros(*x.shape[:-1], n_out)
        return empty if bias is None else empty + bias.detach()
    rows = as_rows(x.reshape(n_rows, n_in), "linear: x")
    out = x.new_empty(1, n_rows, n_out)
    require_workers(out.device, out.numel())
    biases = None if bias is None else bias.detach().double()
    largest = float(rows.norms.amax()) if n_rows else 0.0
    work = Workspace(x.device)
    # Whole columns of outputs, as even as can be: large products run best.
    fit = max(1, min(WEIGHT_ELEMENTS_AT_ONCE // max(1, n_in), tile_elements(x.device) // max(1, n_rows)))
    step = -(-n_out // max(1, -(-n_out // max(fit, LEAST_COLUMNS))))
    for start, columns in (cache or _NOTHING_KEPT).rows_of(weight, step, "linear: weight"):
        stop = start + columns.norms.shape[1]
        part = None if biases is None else biases[start:stop]
        for _, block in tiles(1, n_rows, stop - start, tile_elements(x.device)):
            certified(rows.part(slice(0, 1), block), columns, out[:, block, start:stop], work, part)
        reach = largest * float(columns.norms.amax()) + (0.0 if part is None else float(part.abs().amax()))
        require_representable(out[..., start:stop], reach, "linear")
    return out.reshape(*x.shape[:-1], n_out)


@exact_operation
def matmul(
    a: Float32[Tensor, "*#batch m k"], b: Float32[Tensor, "*#batch k n"]
) -> Float32[Tensor, "*shape m n"]:
    """The matrix product, each element the exact sum rounded once; leading axes broadcast."""
    require_fit("matmul", a=(a, "*leading_of_a m k"), b=(b, "*leading_of_b k n"))
    batch = broadcast_shape("matmul", 2, a=a, b=b)
    left = as_rows(a.expand(*batch, *a.shape[-2:]), "matmul: a")
    right = as_columns(b.expand(*batch, *b.shape[-2:]), "matmul: b")
    return rounded_products(left, right, "matmul").reshape(*batch, a.shape[-2], b.shape[-1])


def rounded_products(a: Rows, b: Rows, what: str, factor: float = 1.0) -> Float32[Tensor, "group row col"]:
    """factor * (a @ b.T) of each group, every element rounded once."""
    n_groups, n_rows, n_cols = a.values.shape[0], a.values.shape[1], b.values.shape[1]
    out = a.values.new_empty(n_groups, n_rows, n_cols, dtype=torch.float32)
    require_workers(out.device, out.numel())
    work = Workspace(out.device)
    for groups, block in tiles(n_groups, n_rows, n_cols, tile_elements(out.device)):
        certified(a.part(groups, block), b.part(groups, slice(None)), out[groups, block], work, factor=factor)
    if out.numel():
        require_representable(out, float(a.norms.amax()) * float(b.norms.amax()) * factor, what)
    return out
