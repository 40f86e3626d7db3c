"""The objective's terms of one block of rows: what all of them need is computed once, and each has its own gradient.

A block of features writes a part of the reconstruction; the parts of all of them, on all processes, are added, and
every block has the gradient of the sum.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mdlm_interp.shapes import Float, Float64
from transcoder.activations import jumprelu
from transcoder.kernels import GradientBuffers, decode, encode_selected, pre_activations
from transcoder.losses import auxk_errors, layer_nmse
from transcoder.model import CrossLayerTranscoder
from transcoder.penalties import l1_penalty, tanh_penalty, threshold_penalty, zero_penalty
from transcoder.scale_out.processes import Processes
from transcoder.scale_out.selection import largest_of_rows
from transcoder.selection import below, strongest_dead
from transcoder.sparse import SparseActs
from transcoder.train_config import TrainConfig


class DataBlock(NamedTuple):
    """Rows of a batch as the model has them."""

    x: Float[Tensor, "layer batch d_model"]
    y: Float[Tensor, "layer batch d_model"]
    row_weights: Float[Tensor, "layer batch"] | None = None
    grads: GradientBuffers | None = None
    """Memory for the gradients of W_enc and W_dec."""


class Terms:
    """The terms of one data block, which share the pre-activations."""

    nmse: Tensor
    """Of each layer, with row weights."""
    penalties: list[Tensor]
    """On active features and on those below their threshold, of each feature block."""
    errors: tuple[Tensor, Tensor]
    """That dead features leave over, and all; (0, 0) when nothing is dead, or reviving is off."""

    def __init__(
        self,
        blocks: Sequence[CrossLayerTranscoder],
        rows: DataBlock,
        config: TrainConfig,
        is_dead: Sequence[Tensor],
        processes: Processes,
    ) -> None:
        self.blocks, self.config, self.is_dead, self.processes = blocks, config, is_dead, processes
        self.rows, self.x = rows, blocks[0].normalise_input(rows.x)
        self.pre_acts = [pre_activations(self.x, block.W_enc, block.b_enc) for block in blocks]
        self.zero = self.pre_acts[0].new_zeros(())

    def compute(self, chosen: Sequence[Sequence[SparseActs]]) -> None:
        """All terms.

        Args:
            chosen: Of each feature block, the entries of each layer that are or could be active.
        """
        self.acts = [self._feature_acts(number, entries) for number, entries in enumerate(chosen)]
        self.y_hat = self._reconstruction()
        self.target = self.blocks[0].normalise_output(self.rows.y)
        self.nmse = layer_nmse(self.y_hat, self.target, self.rows.row_weights)
        self.penalties = [
            torch.stack([self._sparsity(number), self._pre_act(number)]) for number in range(len(self.blocks))
        ]
        self.errors = self._auxk(self.target - self.y_hat)

    def unweighted_nmse(self) -> Tensor:
        """Of each layer, every row alike."""
        if self.rows.row_weights is None:
            return self.nmse.detach()
        return layer_nmse(self.y_hat.detach(), self.target)

    def target_moments(self) -> Float64[Tensor, "layer moment"]:
        """Sums over rows: of the targets' mean square over dimensions, then of each dimension."""
        squares = self.target.square().mean((1, 2), dtype=torch.float64) * self.target.shape[1]
        return torch.cat([squares[:, None], self.target.sum(1, dtype=torch.float64)], 1)

    def active_counts(self) -> Tensor:
        """Rows in which each of this process's features is active [layer feature]."""
        counts = [
            torch.stack([_counts(of_layer, block.b_enc.shape[1]) for of_layer in acts])
            for block, acts in zip(self.blocks, self.acts, strict=True)
        ]
        return counts[0] if len(counts) == 1 else torch.cat(counts, 1)

    def _feature_acts(self, number: int, entries: Sequence[SparseActs]) -> list[SparseActs]:
        """Activations of a feature block as training has them."""
        clt = self.blocks[number]
        chosen = self._encoded(number, entries)
        if clt.log_threshold is None:
            return chosen
        shape, logs = clt.config, clt.log_threshold.unbind()
        return [
            h.with_values(
                jumprelu(h.values, log.index_select(0, h.indices.long()), shape.ste, shape.ste_width)
            )
            for h, log in zip(chosen, logs, strict=True)
        ]

    def _reconstruction(self) -> Tensor:
        """In normalised units."""
        skip, x = self.blocks[0].W_skip, self.x
        y_hat = self._decoded(self.acts, self.blocks[0].b_dec)
        if skip is None:
            return y_hat
        return y_hat + torch.stack([functional.linear(*parts) for parts in zip(x, skip, strict=True)])

    def _decoded(self, acts: Sequence[Sequence[SparseActs]], b_dec: Tensor | None) -> Tensor:
        """What the activations of all feature blocks write, and b_dec.

        Args:
            acts: Of each of this process's feature blocks, of each layer.
        """
        processes, grads = self.processes, self.rows.grads
        none = torch.zeros_like(self.blocks[0].b_dec)
        if processes.layout.blocks[1] == 1:
            return decode(acts[0], list(self.blocks[0].W_dec), none if b_dec is None else b_dec, grads=grads)
        # The first block's part begins with b_dec, as one block would; its gradient is known everywhere.
        start = none if b_dec is None else b_dec.detach()
        parts = [
            decode(own, list(block.W_dec), none if number else start, grads=grads)
            for number, block, own in zip(processes.layout.feature_blocks, self.blocks, acts, strict=True)
        ]
        found: Tensor = _Reduced.apply(processes, none if b_dec is None else b_dec, *parts)  # type: ignore[no-untyped-call]
        return found

    def _sparsity(self, number: int) -> Tensor:
        """The penalty on active features of a block."""
        if self.config.sparsity == "none":
            return self.zero
        norms = self.blocks[number].decoder_norms()
        if self.config.sparsity == "l1":
            return l1_penalty(self.acts[number], norms)
        return tanh_penalty(self.acts[number], norms, self.config.sparsity_scale)

    def _pre_act(self, number: int) -> Tensor:
        """The penalty on features of a block that are below their threshold."""
        clt, config, pre_acts = self.blocks[number], self.config, self.pre_acts[number]
        if config.pre_act == "none":
            return self.zero
        chosen = self.is_dead[number] if config.pre_act_on == "dead" else None
        if chosen is not None and not bool(chosen.any()):
            return self.zero
        if config.pre_act == "zero":
            return zero_penalty(self._encoded(number, below(pre_acts, torch.zeros_like(clt.b_enc), chosen)))
        # Not clt.thresholds(), which has no gradient: the threshold of a feature may come down to it too.
        log_threshold = clt.log_threshold
        thresholds = torch.zeros_like(clt.b_enc) if log_threshold is None else log_threshold.exp()
        entries = self._encoded(number, below(pre_acts, thresholds.detach(), chosen))
        return threshold_penalty(entries, thresholds, clt.decoder_norms())

    def _auxk(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The errors of the loss that revives dead features."""
        k, processes = self.config.auxk, self.processes
        if k is None or not self.blocks[0].config.selects:
            return self.zero, self.zero
        n_dead = torch.stack([dead.count_nonzero() for dead in self.is_dead]).sum()
        if int(processes.count(n_dead, "feature")) == 0:
            return self.zero, self.zero
        pairs = zip(self.pre_acts, self.is_dead, strict=True)
        offers = [strongest_dead(pre_acts, dead, k) for pre_acts, dead in pairs]
        chosen = enumerate(largest_of_rows(offers, k, processes))
        acts = [self._encoded(number, entries) for number, entries in chosen]
        return auxk_errors(residual, self._decoded(acts, None), self.rows.row_weights)

    def _encoded(self, number: int, entries: Sequence[SparseActs]) -> list[SparseActs]:
        block = self.blocks[number]
        return encode_selected(self.x, block.W_enc, block.b_enc, entries, grads=self.rows.grads)


class _Reduced(torch.autograd.Function):
    """Arguments: the processes, b_dec, what each of this process's feature blocks writes; b_dec is in one of them."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, b_dec: Tensor, *parts: Tensor) -> Tensor:
        ctx.n_parts = len(parts)
        return processes.added(parts, "feature")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad.sum(1) if ctx.needs_input_grad[1] else None, *(grad for _ in range(ctx.n_parts))


def _counts(acts: SparseActs, n_features: int) -> Tensor:
    return acts.indices[acts.values.detach() > 0].bincount(minlength=n_features)
