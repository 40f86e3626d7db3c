"""The same decode and gradients by matrix products over all features: faster once many are active.

Works on any device. A product runs in place on one target's block, so there are no temporaries but the dense
activations of one layer.
"""

# Axes: layer (source), target, batch, d_model, feature, nnz

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mdlm_interp.shapes import Float
from transcoder.kernels.buffers import Gradient
from transcoder.sparse import SparseActs


def decode(
    entries: Sequence[SparseActs], W_dec: Sequence[Tensor], b_dec: Float[Tensor, "target d_model"]
) -> Float[Tensor, "target batch d_model"]:
    """See `plain.decode`."""
    out = b_dec.detach()[:, None].repeat(1, entries[0].n_rows, 1)
    for s, (acts, weight) in enumerate(zip(entries, W_dec, strict=True)):
        feature_acts = acts.to_dense(len(weight))
        for later, part in enumerate(weight.detach().unbind(1)):
            out[s + later].addmm_(feature_acts, part)
    return out


def decode_backward(
    entries: Sequence[SparseActs],
    W_dec: Sequence[Tensor],
    grad: Float[Tensor, "target batch d_model"],
    wants_values: bool,
    gradients: Sequence[Gradient | None],
) -> list[Tensor] | None:
    """See `plain.decode_backward`."""
    dots = []
    for s, (acts, weight, gradient) in enumerate(zip(entries, W_dec, gradients, strict=True)):
        targets = grad[s : s + weight.shape[1]]
        if gradient is not None:
            feature_acts = acts.to_dense(len(weight))
            for part, target in zip(gradient.tensor.unbind(1), targets, strict=True):
                part.addmm_(feature_acts.T, target, beta=0 if gradient.is_fresh else 1)
        if wants_values:
            products = grad.new_zeros(acts.n_rows, len(weight))
            for part, target in zip(weight.detach().unbind(1), targets, strict=True):
                products.addmm_(target, part.T)
            dots.append(products[acts.rows(), acts.indices])
    return dots if wants_values else None


def encode_backward(
    x: Float[Tensor, "layer batch d_model"],
    W_enc: Float[Tensor, "layer feature d_model"],
    selected: Sequence[SparseActs],
    W_gradient: Gradient | None,
    b_gradient: Gradient | None,
    wants_x: bool,
) -> Float[Tensor, "layer batch d_model"] | None:
    """See `plain.encode_backward`."""
    dx = x.new_empty(x.shape) if wants_x else None
    for s, acts in enumerate(selected):
        pre_grads = acts.to_dense(W_enc.shape[1])
        if W_gradient is not None:
            W_gradient.tensor[s].addmm_(pre_grads.T, x[s].detach(), beta=0 if W_gradient.is_fresh else 1)
        if b_gradient is not None:
            b_gradient.write(pre_grads.sum(0), s)
        if dx is not None:
            dx[s] = pre_grads @ W_enc[s]
    return dx
