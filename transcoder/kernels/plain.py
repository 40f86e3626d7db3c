"""The kernels as plain torch operations, on any device; `compiled.py` has the same functions for CPU tensors.

A decode is a bag of decoder rows for each row of the batch (`embedding_bag`), and the weights' gradient a bag of
rows of the output's gradient for each feature: no tensor is as large as entries times d_model.
"""

# Axes: layer (source), target, batch, d_model, feature, nnz

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mdlm_interp.shapes import Float
from transcoder.activations import topk_mask
from transcoder.kernels.buffers import Gradient
from transcoder.sparse import SparseActs, from_mask, offsets_of

CHUNK_ELEMENTS = 1 << 24
"""Largest temporary of a value gradient."""


def decode(
    entries: Sequence[SparseActs], W_dec: Sequence[Tensor], b_dec: Float[Tensor, "target d_model"]
) -> Float[Tensor, "target batch d_model"]:
    """Reconstruction of every target: b_dec plus the sum over sources, then over active features.

    Args:
        entries: Activations of each source layer, without gradient.
        W_dec: Of each source layer [feature, its targets, d_model]; layer s writes to s, s + 1 ...
    """
    out = b_dec.detach()[:, None].repeat(1, entries[0].n_rows, 1)
    for s, (acts, weight) in enumerate(zip(entries, W_dec, strict=True)):
        written = _bags(acts.values, acts.indices, acts.offsets, weight.detach().flatten(1))
        n_targets, d_model = weight.shape[1:]
        out[s : s + n_targets] += written.unflatten(1, (n_targets, d_model)).transpose(0, 1)  # type: ignore[no-untyped-call]
    return out


def decode_backward(
    entries: Sequence[SparseActs],
    W_dec: Sequence[Tensor],
    grad: Float[Tensor, "target batch d_model"],
    wants_values: bool,
    gradients: Sequence[Gradient | None],
) -> list[Tensor] | None:
    """Gradient of every value, or None if it is not wanted; of the weights, into `gradients`.

    Args:
        gradients: Where to write the gradient of each of W_dec; None if it is not wanted.
    """
    dots = []
    for s, (acts, weight, gradient) in enumerate(zip(entries, W_dec, gradients, strict=True)):
        to_targets = grad[s : s + weight.shape[1]].transpose(0, 1).flatten(1)
        if wants_values:
            dots.append(_dots(acts, weight.detach().flatten(1), to_targets))
        if gradient is not None:
            gradient.write(_by_feature(acts, len(weight), to_targets).view_as(weight))
    return dots if wants_values else None


def encode_backward(
    x: Float[Tensor, "layer batch d_model"],
    W_enc: Float[Tensor, "layer feature d_model"],
    selected: Sequence[SparseActs],
    W_gradient: Gradient | None,
    b_gradient: Gradient | None,
    wants_x: bool,
) -> Float[Tensor, "layer batch d_model"] | None:
    """Gradient of x, or None if it is not wanted; of W_enc and b_enc, into `W_gradient` and `b_gradient`.

    Args:
        selected: The entries that got a gradient; their values are the gradients.
    """
    n_features = W_enc.shape[1]
    if W_gradient is not None:
        for s, acts in enumerate(selected):
            W_gradient.write(_by_feature(acts, n_features, x[s].detach()), s)
    if b_gradient is not None:
        for s, acts in enumerate(selected):
            b_gradient.write(_by_feature(acts, n_features, x.new_ones(len(x[s]), 1))[:, 0], s)
    if not wants_x:
        return None
    tables = zip(selected, W_enc.detach(), strict=True)
    return torch.stack([_bags(acts.values, acts.indices, acts.offsets, table) for acts, table in tables])


def row_errors(
    y_hat: Float[Tensor, "layer batch d_model"], y: Float[Tensor, "layer batch d_model"]
) -> Float[Tensor, "layer batch"]:
    """Sum of squares of y_hat - y, of each row."""
    return (y_hat - y).square().sum(2)


def row_errors_backward(
    y_hat: Float[Tensor, "layer batch d_model"],
    y: Float[Tensor, "layer batch d_model"],
    grad: Float[Tensor, "layer batch"],
) -> Float[Tensor, "layer batch d_model"]:
    """Gradient of y_hat from that of `row_errors`."""
    return (y_hat - y).mul_(2 * grad[..., None])


def select_topk(pre_acts: Float[Tensor, "batch feature"], k: int) -> SparseActs:
    """The k largest of each row, those that are positive or NaN; ties go to the lowest feature.

    NaNs count as equal and larger than all.
    """
    pre_acts = pre_acts.detach()
    return from_mask(pre_acts, topk_mask(pre_acts, k) & ~(pre_acts <= 0))


def select_batch_topk(pre_acts: Float[Tensor, "batch feature"], n: int) -> SparseActs:
    """The n largest of all rows, those that are positive or NaN; ties go to the first row, then feature."""
    pre_acts = pre_acts.detach()
    mask = topk_mask(pre_acts.reshape(-1), n).view_as(pre_acts)
    return from_mask(pre_acts, mask & ~(pre_acts <= 0))


def _bags(
    weights: Float[Tensor, " nnz"], places: Tensor, offsets: Tensor, table: Float[Tensor, "rows width"]
) -> Float[Tensor, "bags width"]:
    """Sum of the table's rows at `places`, weighted, from each offset to the next."""
    if len(places) == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return functional.embedding_bag(
        places.long(), table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _by_feature(acts: SparseActs, n_features: int, table: Tensor) -> Tensor:
    """Sum over each feature's entries of value times the table's row for the batch row."""
    features, order = acts.indices.sort(stable=True)
    counts = torch.bincount(features, minlength=n_features)
    return _bags(acts.values[order], acts.rows()[order], offsets_of(counts), table)


def _dots(acts: SparseActs, table: Tensor, x: Tensor) -> Tensor:
    """For each entry, the dot product of the table's row for its feature and of x's for its batch row."""
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    places = zip(torch.split(acts.indices, step), torch.split(acts.rows(), step), strict=True)
    return torch.cat([(table[features] * x[rows]).sum(1) for features, rows in places])
