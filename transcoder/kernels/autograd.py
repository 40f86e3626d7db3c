"""Encode and decode with gradients through active features only; what the rest of the package calls.

The forward of an encoder is one dense product for each layer. All else goes by entries: of a step's arithmetic
k / n_features remains for the decoders, and for the encoders' gradient.
"""

# Axes: layer (source), target, batch, d_model, feature, nnz

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float
from transcoder.kernels import dense
from transcoder.kernels.buffers import Gradient, GradientBuffers
from transcoder.kernels.paths import kernels_for
from transcoder.sparse import SparseActs

DENSE_FROM = 0.1
"""Share of active features from which matrix products over all features are faster than entry by entry."""


def decode(
    acts: Sequence[SparseActs],
    W_dec: Sequence[Tensor],
    b_dec: Float[Tensor, "target d_model"],
    *,
    grads: GradientBuffers | None = None,
) -> Float[Tensor, "target batch d_model"]:
    """The reconstruction of every layer's output, in normalised units: b_dec plus all active decoder rows.

    Additions go by source layer, then by feature. Differentiable in the values, W_dec and b_dec; a value of zero
    gets its gradient too.

    Args:
        acts: Of each source layer.
        W_dec: Of each source layer [feature, its targets, d_model]; layer s writes to s, s + 1 ...
        grads: Memory for the gradients of W_dec, if it is to be kept from step to step.
    Raises:
        DataError: If shapes do not fit each other, or a feature or offset is out of range.
    """
    _check_decode(acts, W_dec, b_dec)
    values = [a.values for a in acts]
    result: Tensor = _Decode.apply([a.detach() for a in acts], grads, b_dec, *values, *W_dec)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def pre_activations(
    x: Float[Tensor, "layer batch d_model"],
    W_enc: Float[Tensor, "layer feature d_model"],
    b_enc: Float[Tensor, "layer feature"],
) -> Float[Tensor, "layer batch feature"]:
    """What every feature is before its activation function, without gradient; see `encode_selected`."""
    out = x.new_empty(*x.shape[:2], W_enc.shape[1])
    for parts in zip(b_enc, x, W_enc.mT, out, strict=True):
        torch.addmm(*parts[:3], out=parts[3])
    return out


def encode_selected(
    x: Float[Tensor, "layer batch d_model"],
    W_enc: Float[Tensor, "layer feature d_model"],
    b_enc: Float[Tensor, "layer feature"],
    selected: Sequence[SparseActs],
    *,
    grads: GradientBuffers | None = None,
) -> list[SparseActs]:
    """The same entries, with a gradient to W_enc and b_enc, and to x if x requires one.

    Args:
        selected: Of each layer; its values must be `pre_activations(x, W_enc, b_enc)` there.
        grads: Memory for the gradient of W_enc, if it is to be kept from step to step.
    """
    if not len(selected) == len(x) == len(W_enc) == len(b_enc):
        counts = f"{len(selected)}, {len(x)}, {len(W_enc)} and {len(b_enc)}"
        raise DataError(f"selected, x, W_enc and b_enc must have as many layers as each other, got {counts}")
    values = _Encode.apply(list(selected), grads, x, W_enc, b_enc, *(a.values.detach() for a in selected))  # type: ignore[no-untyped-call]
    return [acts.with_values(value) for acts, value in zip(selected, values, strict=True)]


def encode_topk(
    x: Float[Tensor, "layer batch d_model"],
    W_enc: Float[Tensor, "layer feature d_model"],
    b_enc: Float[Tensor, "layer feature"],
    k: int,
    *,
    keep_pre_acts: bool = False,
    grads: GradientBuffers | None = None,
) -> tuple[list[SparseActs], Float[Tensor, "layer batch feature"] | None]:
    """The k largest features of each row of each layer, those that are positive; ties go to the lowest feature.

    A NaN counts as larger than all, so it stays visible.

    Args:
        keep_pre_acts: Return all pre-activations too, without gradient; otherwise one layer's are held at a time.
        grads: As in `encode_selected`.
    """
    kernels = kernels_for(x)
    with torch.no_grad():
        kept = x.new_empty(*x.shape[:2], W_enc.shape[1]) if keep_pre_acts else None
        selected = []
        for s, parts in enumerate(zip(b_enc, x, W_enc.mT, strict=True)):
            out = torch.addmm(*parts) if kept is None else torch.addmm(*parts, out=kept[s])
            selected.append(kernels.select_topk(out, k))
    return encode_selected(x, W_enc, b_enc, selected, grads=grads), kept


def row_errors(
    y_hat: Float[Tensor, "layer batch d_model"], y: Float[Tensor, "layer batch d_model"]
) -> Float[Tensor, "layer batch"]:
    """Sum over d_model of the squared error of each row, differentiable in y_hat; no large temporary is kept."""
    result: Tensor = _RowErrors.apply(y_hat, y.detach())  # type: ignore[no-untyped-call]
    return result


def select_topk(pre_acts: Float[Tensor, "batch feature"], k: int) -> SparseActs:
    """The k largest of each row, those that are positive or NaN, without gradient; see `encode_topk`."""
    result: SparseActs = kernels_for(pre_acts).select_topk(pre_acts.detach(), k)
    return result


def select_batch_topk(pre_acts: Float[Tensor, "batch feature"], k: int) -> SparseActs:
    """The batch * k largest of a layer's rows together, those that are positive or NaN, without gradient.

    Ties go to the first row, then feature.
    """
    result: SparseActs = kernels_for(pre_acts).select_batch_topk(pre_acts.detach(), len(pre_acts) * k)
    return result


def _kernels(entries: Sequence[SparseActs], tables: Sequence[Tensor] | Tensor) -> ModuleType:
    """Dense products or entry by entry, by the share of features that are active."""
    places = sum(acts.n_rows * len(table) for acts, table in zip(entries, tables, strict=True))
    if sum(acts.nnz for acts in entries) > DENSE_FROM * places:
        return dense
    return kernels_for(tables[0])


class _Decode(torch.autograd.Function):
    """Arguments: entries without gradient, buffers, b_dec, the values of all layers, the decoders of all layers."""

    @staticmethod
    def forward(
        ctx: Any, entries: list[SparseActs], grads: GradientBuffers | None, b_dec: Tensor, *tensors: Tensor
    ) -> Tensor:
        W_dec = tensors[len(entries) :]
        ctx.entries, ctx.grads = entries, grads
        ctx.kernels = _kernels(entries, W_dec)
        ctx.save_for_backward(*W_dec)
        result: Tensor = ctx.kernels.decode(entries, [w.contiguous() for w in W_dec], b_dec)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        W_dec, n = ctx.saved_tensors, len(ctx.entries)
        needed = ctx.needs_input_grad[3:]
        gradients, returned = _destinations(W_dec, needed[n:], ctx.grads)
        weights = [w.contiguous() for w in W_dec]
        given = ctx.entries, weights, grad.contiguous(), any(needed[:n]), gradients
        values = ctx.kernels.decode_backward(*given) or [None] * n
        return None, None, grad.sum(1) if ctx.needs_input_grad[2] else None, *values, *returned


class _Encode(torch.autograd.Function):
    """Arguments: entries, buffers, x, W_enc, b_enc, the entries' values of all layers; returns the values."""

    @staticmethod
    def forward(
        ctx: Any,
        entries: list[SparseActs],
        grads: GradientBuffers | None,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.entries, ctx.grads = [a.detach() for a in entries], grads
        ctx.kernels = _kernels(entries, W_enc)
        ctx.save_for_backward(x, W_enc, b_enc)
        return tuple(value.detach() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *value_grads: Tensor) -> tuple[Any, ...]:
        x, W_enc, b_enc = ctx.saved_tensors
        wants_x, *needed = ctx.needs_input_grad[2:5]
        gradients, returned = _destinations((W_enc, b_enc), needed, ctx.grads)
        entries = [acts.with_values(v.contiguous()) for acts, v in zip(ctx.entries, value_grads, strict=True)]
        given = x.contiguous(), W_enc.contiguous(), entries, *gradients, wants_x
        dx = ctx.kernels.encode_backward(*given)
        return None, None, dx, *returned, *(None for _ in value_grads)


class _RowErrors(torch.autograd.Function):
    """Arguments: the reconstruction and what it should be."""

    @staticmethod
    def forward(ctx: Any, y_hat: Tensor, y: Tensor) -> Tensor:
        y_hat, y = y_hat.contiguous(), y.contiguous()
        ctx.kernels = kernels_for(y_hat)
        ctx.save_for_backward(y_hat, y)
        result: Tensor = ctx.kernels.row_errors(y_hat, y)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.kernels.row_errors_backward(*ctx.saved_tensors, grad.contiguous()), None


def _destinations(
    parameters: Sequence[Tensor], needed: Sequence[bool], grads: GradientBuffers | None
) -> tuple[list[Gradient | None], list[Tensor | None]]:
    """Where the gradient of each parameter goes, and what autograd is to be given of it."""
    gradients: list[Gradient | None] = []
    returned: list[Tensor | None] = []
    for parameter, is_needed in zip(parameters, needed, strict=True):
        kept = grads.take(parameter) if grads is not None and is_needed else None
        own = None
        if is_needed and kept is None:
            own = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        gradients.append(kept if own is None else Gradient(own, is_fresh=True))
        returned.append(own)
    return gradients, returned


def _check_decode(acts: Sequence[SparseActs], W_dec: Sequence[Tensor], b_dec: Tensor) -> None:
    if not len(acts) == len(W_dec) > 0:
        raise DataError(
            f"one decoder is needed for the activations of each layer, got {len(W_dec)} for {len(acts)}"
        )
    for s, (a, w) in enumerate(zip(acts, W_dec, strict=True)):
        if w.ndim != 3 or w.shape[2] != b_dec.shape[1] or s + w.shape[1] > len(b_dec):
            raise DataError(
                f"W_dec[{s}] has shape {tuple(w.shape)}, expected (n_features, up to {len(b_dec) - s}, "
                f"{b_dec.shape[1]}) from b_dec's {tuple(b_dec.shape)}; is it another transcoder's?"
            )
        if a.n_rows != acts[0].n_rows:
            raise DataError(
                f"the activations of layer {s} have {a.n_rows} rows, those of layer 0 {acts[0].n_rows}; "
                f"are they of one batch?"
            )
        if {a.values.dtype, w.dtype} != {b_dec.dtype}:
            raise DataError(
                f"layer {s} has activations of {a.values.dtype} and a decoder of {w.dtype}, b_dec is "
                f"{b_dec.dtype}; convert them to one type"
            )
