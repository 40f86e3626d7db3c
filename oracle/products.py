"""The certified engine: correctly rounded float32 matrix products from one float64 product each.

1. Float32 values multiply exactly in float64 (24 + 24 <= 53 bits), so a float64 matrix product errs only by
   its additions: whatever their order, and with fused multiply-adds or not, by less than
   n * 2^-53 * |a_i| |b_j| for n terms (standard error analysis and Cauchy-Schwarz).
2. An output is decided if the float64 result, that bound subtracted and added, rounds to one float32 both
   times: rounding is monotonic, so the exact sum rounds to the same.
3. The rest, between one in a thousand and one in ten thousand, is computed by `repair`.

Norms and bounds only choose what is repaired; no bit of a result depends on them. Sums longer than
`WHOLE_TERMS` are made of products that are added one after another, which shrinks the bound.
"""

# Axes: group (independent products), row, col, term

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.shapes import Float32, Float64, Int64
from oracle.errors import ExactError
from oracle.paths import fused_for
from oracle.repair import UNIT, dot_rows, pairs_at_once

WHOLE_TERMS = 1024
"""Terms up to which a sum is one float64 product; a cut would cost more than the repairs that it saves."""

CHUNK_TERMS = 384
"""About as many terms have the equal parts that longer sums are cut into."""

TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Outputs computed at a time (16 MiB of float64 on a CPU)."""

DECIDED_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 25}
"""Outputs that the plain path rounds at a time."""

MARGIN = 1.0001
"""Covers rounding in the norms themselves, which are sums in unknown order and a library's square root."""

BOUND_SCALE = 1.0
"""A factor on every error bound: 1, except in the test that shows a smaller one to be caught."""


@dataclass(frozen=True)
class Rows:
    """Row vectors as float64, with their lengths: one side of a product."""

    values: Float64[Tensor, "group row term"]
    norms: Float64[Tensor, "group row"]

    def part(self, groups: slice, rows: slice) -> Rows:
        """A block of them."""
        return Rows(self.values[groups, rows], self.norms[groups, rows])


class Workspace:
    """Float64 buffers for tile after tile: fresh memory costs a page fault every few hundred numbers."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = [torch.empty(0, dtype=torch.float64, device=device) for _ in range(2)]

    def of_shape(self, *shape: int) -> Tensor:
        """Uninitialised memory of this shape, valid until the next call."""
        return self._buffer(0, shape)

    def second_of_shape(self, *shape: int) -> Tensor:
        """The same, from another buffer."""
        return self._buffer(1, shape)

    def _buffer(self, which: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._buffers[which].numel() < size:
            self._buffers[which] = torch.empty(size, dtype=torch.float64, device=self._buffers[which].device)
        return self._buffers[which][:size].view(shape)


def _as_float64(x: Tensor, work: Workspace | None = None) -> Float64[Tensor, "group row term"]:
    """A contiguous copy, leading axes made one, in a single pass whatever the strides."""
    work = work or Workspace(x.device)
    values = work.of_shape(*x.shape)
    values.copy_(x.detach())
    return values.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def as_rows(x: Tensor, what: str, factor: float = 1.0, work: Workspace | None = None) -> Rows:
    """Prepare float32 values [..., row, term].

    Args:
        factor: A power of two to multiply by.
        work: Where to keep the values, if they need not last.
    Raises:
        ExactError: If a value is not finite.
    """
    values = _as_float64(x, work)
    if factor != 1.0:
        values.mul_(factor)
    norms = torch.linalg.vector_norm(values, dim=-1)
    require_finite_norms(norms, what)
    return Rows(values, norms)


def as_columns(x: Tensor, what: str) -> Rows:
    """Prepare float32 values [..., term, row], which stay stored in that order; see `as_rows`."""
    values = _as_float64(x)
    norms = torch.linalg.vector_norm(values, dim=1)
    require_finite_norms(norms, what)
    return Rows(values.mT, norms)


def require_finite_norms(norms: Tensor, what: str) -> None:
    """Raise unless all are finite, which they are exactly if all the values were."""
    if not bool(torch.isfinite(norms).all()):
        row = int((~torch.isfinite(norms.flatten())).nonzero()[0])
        raise ExactError(
            f"{what} has values that are not finite (first in row {row}); exact arithmetic is defined for finite "
            f"numbers only: look for the first hook point where they appear, or check the weights"
        )


def tile_elements(device: torch.device) -> int:
    """Outputs to compute at a time."""
    return TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cpu"])


def tiles(n_groups: int, n_rows: int, n_cols: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole groups, or of rows of one group, of at most `limit` outputs if a row has no more."""
    if n_rows * n_cols <= limit:
        step = max(1, limit // max(1, n_rows * n_cols))
        for group in range(0, n_groups, step):
            yield slice(group, min(group + step, n_groups)), slice(0, n_rows)
        return
    step = max(1, limit // n_cols)
    step = -(-n_rows // -(-n_rows // step))  # as even as can be
    for group in range(n_groups):
        for row in range(0, n_rows, step):
            yield slice(group, group + 1), slice(row, min(row + step, n_rows))


def raw_product(a: Rows, b: Rows, work: Workspace) -> tuple[Float64[Tensor, "group row col"], float]:
    """The float64 product a @ b.T, and the factor of the norms in the bound on its error.

    n terms take n - 1 additions in any order, joining chunks one more each; adding a bias, scaling, and
    forming product -+ bound round once each.
    """
    n_terms = a.values.shape[-1]
    n_chunks = -(-n_terms // CHUNK_TERMS) if n_terms > WHOLE_TERMS else 1
    size = max(1, -(-n_terms // n_chunks))
    columns = b.values.transpose(1, 2)
    product = work.of_shape(a.values.shape[0], a.values.shape[1], b.values.shape[1])
    torch.bmm(a.values[..., :size], columns[:, :size], out=product)
    for start in range(size, n_terms, size):
        chunk = slice(start, start + size)
        product.add_(
            torch.bmm(a.values[..., chunk], columns[:, chunk], out=work.second_of_shape(*product.shape))
        )
    return product, BOUND_SCALE * MARGIN * UNIT * (size + n_chunks + 4)


def certified(
    a: Rows,
    b: Rows,
    out: Float32[Tensor, "group row col"],
    work: Workspace,
    bias: Float64[Tensor, " col"] | None = None,
    factor: float = 1.0,
) -> None:
    """Write factor * (a @ b.T + bias), correctly rounded, to out.

    Args:
        factor: Any positive float64; other than 1 it is part of the single rounding.
    """
    product, unit = raw_product(a, b, work)
    if bias is not None:
        product.add_(bias)
    if factor != 1.0:
        product.mul_(factor)
    row_bound = a.norms * (unit * factor)
    col_bound = None if bias is None else bias.abs() * (8 * UNIT * MARGIN * factor)
    fused = fused_for(product.device)
    if fused is not None:
        undecided = fused.certify(
            product, a.values, b.values, row_bound, b.norms, col_bound, bias, factor, a.norms, out
        )
    else:
        undecided = _decide(product, row_bound, b.norms, col_bound, out)
    if undecided.shape[0]:
        group, row, col = undecided.unbind(1)
        out[group, row, col] = dot_pairs(a, b, group, row, col, bias, factor)


def _decide(
    product: Tensor, row_bound: Tensor, col_norms: Tensor, col_bound: Tensor | None, out: Tensor
) -> Int64[Tensor, "undecided three"]:
    """Round what is decided to out; the places (group, row, col) of the rest."""
    found = []
    n_groups, n_rows, n_cols = product.shape
    limit = DECIDED_AT_ONCE.get(out.device.type, DECIDED_AT_ONCE["cpu"])
    step = min(n_rows, max(1, limit // max(1, n_cols)))
    errors, ends = product.new_empty(step, n_cols), product.new_empty(step, n_cols)
    lows = out.new_empty(step, n_cols)
    for group in range(n_groups):
        for start in range(0, n_rows, max(1, step)):
            rows = slice(start, start + step)
            values, high = product[group, rows], out[group, rows]
            error, end, low = (buffer[: values.shape[0]] for buffer in (errors, ends, lows))
            # Fused or not, as the kernel likes: a bound decides no bit.
            if col_bound is None:
                torch.mul(row_bound[group, rows, None], col_norms[group], out=error)
            else:
                torch.addcmul(col_bound, row_bound[group, rows, None], col_norms[group], out=error)
            low.copy_(torch.sub(values, error, out=end))
            high.copy_(torch.add(values, error, out=end))
            if not torch.equal(low, high):
                places = (low != high).nonzero()
                first = torch.tensor([group, start], device=out.device).expand(places.shape[0], 2)
                found.append(torch.cat((first[:, :1], first[:, 1:] + places[:, :1], places[:, 1:]), 1))
            high.add_(0.0)  # -0 becomes +0
    return torch.cat(found) if found else torch.empty(0, 3, dtype=torch.int64, device=out.device)


def dot_pairs(
    a: Rows, b: Rows, group: Tensor, row: Tensor, col: Tensor, bias: Tensor | None, factor: float
) -> Float32[Tensor, " pair"]:
    """The outputs at some places, by `repair`; a few at a time, as each gathers two rows."""
    step = pairs_at_once(a.values)
    pieces = []
    for start in range(0, group.shape[0], step):
        g, i, j = (index[start : start + step] for index in (group, row, col))
        pieces.append(dot_rows(a.values[g, i], b.values[g, j], None if bias is None else bias[j], factor))
    return torch.cat(pieces)


def require_representable(out: Tensor, bound: float, what: str) -> None:
    """Raise if a result went beyond float32, which is looked for only where the bound leaves it possible."""
    if bound < 2.0**127:
        return
    if not bool(torch.isfinite(out).all()):
        raise ExactError(
            f"{what}: a result is beyond float32's range (about 3.4e38); the inputs have diverged"
        )
