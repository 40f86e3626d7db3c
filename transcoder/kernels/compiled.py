"""The kernels as compiled loops, on CPU tensors; `plain.py` has the same functions.

decode       target by target: its [batch, d_model] block stays near the core while every feature of every source
             adds its strip of the decoder; each weight is read once.
backward     target by target again: a strip of a feature's decoder and of its gradient stay in the innermost cache
             while all rows that use the feature pass by, each read once for the value's gradient (a dot product)
             and the weights' gradient (a sum).

Threads share out targets, or features, so each output is written by one thread, in the same order whatever their
number: additions go by source layer, then by feature within a row, or by row within a feature.
"""

# Axes: layer (source), target, batch, d_model, feature, nnz

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float
from oracle.threads import over_rows
from transcoder.kernels import loops, order_loops
from transcoder.kernels.buffers import Gradient
from transcoder.kernels.compiled_selection import select_batch_topk, select_topk
from transcoder.sparse import SparseActs

__all__ = [
    "decode",
    "decode_backward",
    "encode_backward",
    "row_errors",
    "row_errors_backward",
    "select_batch_topk",
    "select_topk",
]

SHARES = 4096
"""Into how many parts of equal work the features of a layer are divided, to be shared out."""


def _array(x: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = x.detach().numpy()
    return array


def _flat(x: Tensor) -> NDArray[Any]:
    return _array(x.detach().view(-1))


class Order(NamedTuple):
    """The entries of one layer, sorted by feature."""

    starts: NDArray[np.int64]
    """First entry of each feature, then nnz."""
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    """Where each sorted entry came from."""

    @classmethod
    def of(cls, acts: SparseActs, n_features: int) -> Order:
        """Sort the entries of a layer with this many features.

        Raises:
            DataError: If a loop over them would leave the memory it is given.
        """
        order = cls(*(np.empty(n, np.int64) for n in (n_features + 1, acts.nnz, acts.nnz)))
        if not order_loops.by_feature(_array(acts.indices), _array(acts.offsets), *order):
            raise DataError(
                f"entries of {acts.nnz} values must have offsets that ascend from 0 to it and features from 0 to "
                f"{n_features - 1}; are they those of another layer or transcoder?"
            )
        return order

    def sorted(self, values: Tensor) -> NDArray[Any]:
        """Values of the entries in this order."""
        return _array(values)[self.places]

    def unsorted(self, values: NDArray[Any]) -> Tensor:
        """The reverse of `sorted`."""
        out = np.empty_like(values)
        out[self.places] = values
        return torch.from_numpy(out)

    def share(self, parts: int) -> NDArray[np.int64]:
        """Feature at which each of so many parts of about equal work starts: a row costs about what an entry does."""
        work = self.starts + np.arange(len(self.starts))
        found: NDArray[np.int64] = np.searchsorted(work, np.arange(parts + 1) * work[-1] // parts)
        return found


def _orders(entries: Sequence[SparseActs], tables: Sequence[Tensor]) -> list[Order]:
    return [Order.of(acts, len(table)) for acts, table in zip(entries, tables, strict=True)]


def _over_features(run: Callable[[list[tuple[int, int]]], None], orders: list[Order], elements: int) -> None:
    """run(first and last feature of each layer), in as many parts of equal work as there are threads."""
    shares = [order.share(SHARES) for order in orders]
    over_rows(lambda i, j: run([(int(s[i]), int(s[j])) for s in shares]), SHARES, elements)


def _sources(W_dec: Sequence[Tensor], target: int) -> list[int]:
    """The layers that write to a target, in order; W_dec[s] writes to s, s + 1 ..."""
    return [s for s in range(target + 1) if s + W_dec[s].shape[1] > target]


def _additions(entries: Sequence[SparseActs], W_dec: Sequence[Tensor]) -> int:
    return sum(acts.nnz * w[0].numel() for acts, w in zip(entries, W_dec, strict=True) if len(w))


def _blocks(n_targets: int, d_model: int) -> list[tuple[int, int, int]]:
    """What threads share out in a decode: (target, first column, columns), neighbours together of average work."""
    per_target = -(-2 * torch.get_num_threads() // n_targets) if torch.get_num_threads() > 1 else 1
    width = max(loops.STRIDE, -(-d_model // per_target // loops.STRIDE) * loops.STRIDE)
    # Later targets have more sources: the first, the last, the second, the one before the last ...
    targets = [i // 2 if i % 2 == 0 else n_targets - 1 - i // 2 for i in range(n_targets)]
    return [(t, c, min(width, d_model - c)) for c in range(0, d_model, width) for t in targets]


def decode(
    entries: Sequence[SparseActs], W_dec: Sequence[Tensor], b_dec: Float[Tensor, "target d_model"]
) -> Float[Tensor, "target batch d_model"]:
    """See `plain.decode`."""
    n_targets, d_model = b_dec.shape
    batch = entries[0].n_rows
    orders = _orders(entries, W_dec)
    values = [order.sorted(acts.values) for order, acts in zip(orders, entries, strict=True)]
    out = b_dec.detach()[:, None].repeat(1, batch, 1)
    flat, tables = _flat(out), [_flat(w) for w in W_dec]
    blocks = _blocks(n_targets, d_model)

    def run(first: int, stop: int) -> None:
        for target, column, width in blocks[first:stop]:
            to = d_model, target * batch * d_model + column
            for s in _sources(W_dec, target):
                strip = W_dec[s].shape[1] * d_model, (target - s) * d_model + column, width
                loops.add_rows(flat, *to, tables[s], *strip, orders[s].starts, orders[s].rows, values[s])

    over_rows(run, len(blocks), _additions(entries, W_dec))
    return out


def decode_backward(
    entries: Sequence[SparseActs],
    W_dec: Sequence[Tensor],
    grad: Float[Tensor, "target batch d_model"],
    wants_values: bool,
    gradients: Sequence[Gradient | None],
) -> list[Tensor] | None:
    """See `plain.decode_backward`."""
    n_targets, batch, d_model = grad.shape
    orders = _orders(entries, W_dec)
    values = [order.sorted(acts.values) for order, acts in zip(orders, entries, strict=True)]
    dots = [np.zeros_like(v) for v in values]
    flat, tables = _flat(grad), [_flat(w) for w in W_dec]
    outs = [None if g is None else _flat(g.tensor) for g in gradients]

    def run(features: list[tuple[int, int]]) -> None:
        for target in range(n_targets):
            rows_of_x = flat, d_model, target * batch * d_model, d_model
            for s in _sources(W_dec, target):
                gradient, sorted_by = gradients[s], (orders[s].starts, orders[s].rows)
                strip = W_dec[s].shape[1] * d_model, (target - s) * d_model
                if gradient is None:
                    if wants_values:
                        loops.dot_rows(dots[s], tables[s], *strip, *rows_of_x, *sorted_by, *features[s])
                    continue
                out, weights = (outs[s], gradient.is_fresh), (*sorted_by, values[s], *features[s])
                if wants_values:
                    given = dots[s], *out, tables[s], *strip, *rows_of_x, *weights
                    loops.dot_and_gather_rows(*given)
                else:
                    loops.gather_rows(*out, *strip, *rows_of_x, *weights)

    _over_features(run, orders, 2 * _additions(entries, W_dec))
    if not wants_values:
        return None
    return [order.unsorted(dot) for order, dot in zip(orders, dots, strict=True)]


def encode_backward(
    x: Float[Tensor, "layer batch d_model"],
    W_enc: Float[Tensor, "layer feature d_model"],
    selected: Sequence[SparseActs],
    W_gradient: Gradient | None,
    b_gradient: Gradient | None,
    wants_x: bool,
) -> Float[Tensor, "layer batch d_model"] | None:
    """See `plain.encode_backward`."""
    n_layers, batch, d_model = x.shape
    n_features = W_enc.shape[1]
    orders = _orders(selected, W_enc.unbind())
    values = [order.sorted(acts.values) for order, acts in zip(orders, selected, strict=True)]
    additions = sum(acts.nnz for acts in selected) * d_model
    if W_gradient is not None:
        out, flat = _flat(W_gradient.tensor), _flat(x)

        def run(features: list[tuple[int, int]]) -> None:
            for s, (order, value) in enumerate(zip(orders, values, strict=True)):
                to = out, W_gradient.is_fresh, d_model, s * n_features * d_model
                rows_of_x = flat, d_model, s * batch * d_model, d_model
                loops.gather_rows(*to, *rows_of_x, order.starts, order.rows, value, *features[s])

        _over_features(run, orders, additions)
    if b_gradient is not None:
        for sums, order, value in zip(b_gradient.tensor, orders, values, strict=True):
            order_loops.sums_by_feature(_array(sums), b_gradient.is_fresh, order.starts, value)
    if not wants_x:
        return None
    dx = torch.zeros_like(x)
    to_x, table = _flat(dx), _flat(W_enc)

    def add(first: int, stop: int) -> None:
        for s in range(first, stop):
            to = d_model, s * batch * d_model
            strip = d_model, s * n_features * d_model, d_model
            loops.add_rows(to_x, *to, table, *strip, orders[s].starts, orders[s].rows, values[s])

    over_rows(add, n_layers, additions)
    return dx


def row_errors(
    y_hat: Float[Tensor, "layer batch d_model"], y: Float[Tensor, "layer batch d_model"]
) -> Float[Tensor, "layer batch"]:
    """See `plain.row_errors`."""
    sums = y_hat.new_empty(y_hat.shape[:2])
    given, out = (_flat(y_hat), _flat(y), y.shape[2]), _flat(sums)
    over_rows(lambda first, stop: loops.row_errors(*given, first, stop, out), sums.numel(), y.numel())
    return sums


def row_errors_backward(
    y_hat: Float[Tensor, "layer batch d_model"],
    y: Float[Tensor, "layer batch d_model"],
    grad: Float[Tensor, "layer batch"],
) -> Float[Tensor, "layer batch d_model"]:
    """See `plain.row_errors_backward`."""
    found = torch.empty_like(y_hat)
    given, out = (_flat(y_hat), _flat(y), y.shape[2], _flat(grad)), _flat(found)
    over_rows(
        lambda first, stop: loops.row_error_gradients(*given, first, stop, out), grad.numel(), y.numel()
    )
    return found
