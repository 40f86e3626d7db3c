"""The training objective: one pass through the encoders feeds the loss, the terms against death, and the metrics.

    loss = mean over layers of the (row-weighted) FVU
         + sparsity weight of the step * penalty on active features
         + pre_act_coefficient * penalty on features below their threshold
         + auxk_alpha * share of the error that dead features leave over       (topk and batchtopk)

All pre-activations are computed once, without gradient. Every term then takes the entries that it needs, and only
through these does its gradient go: see `kernels`, which go over to dense products where many are active.

A step may be cut into blocks of rows and of features (`scale_out`), each with gradients of its own; one process
without blocks is the case of one of each. Blocks of rows share the reconstruction's loss, so what each gives to the
loss is known before its backward pass; blocks of features share reconstructions, whose gradient all of them have.

Source:
    reference/transcoders.md 2.2; the terms cite theirs.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mdlm_interp.shapes import Bool, Float, Int64
from transcoder.activations import jumprelu
from transcoder.kernels import GradientBuffers, decode, encode_selected, pre_activations, select_topk
from transcoder.losses import auxk_errors, layer_fvu, share_left
from transcoder.model import CrossLayerTranscoder
from transcoder.penalties import l1_penalty, tanh_penalty, threshold_penalty, zero_penalty
from transcoder.scale_out.processes import Processes
from transcoder.scale_out.selection import largest_of_batch, largest_of_rows
from transcoder.schedules import active_features, sparsity_weight
from transcoder.selection import below, selected_entries, strongest_dead
from transcoder.sparse import SparseActs
from transcoder.train_config import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """The loss of a batch with its parts, those of all blocks together but where it says otherwise."""

    loss: Float[Tensor, ""]
    """With gradient, if one process has all blocks."""
    shares: list[Tensor]
    """What each of this process's data blocks gives to the loss through this process's features, with gradient."""
    fvu: Float[Tensor, " layer"]
    """Of every row alike, whatever the weights in the loss."""
    sparsity: Float[Tensor, ""]
    """The penalty on active features, before its weight."""
    pre_act: Float[Tensor, ""]
    """The penalty on features below their threshold, before its weight."""
    auxk: Float[Tensor, ""]
    active_counts: Int64[Tensor, "layer feature"]
    """Rows in which each of this process's features is active."""


class DataBlock(NamedTuple):
    """Rows of a batch as the model has them."""

    x: Float[Tensor, "layer batch d_model"]
    y: Float[Tensor, "layer batch d_model"]
    row_weights: Float[Tensor, "layer batch"] | None = None
    grads: GradientBuffers | None = None
    """Memory for the gradients of W_enc and W_dec."""


def objective(
    clt: CrossLayerTranscoder,
    x: Float[Tensor, "layer batch d_model"],
    y: Float[Tensor, "layer batch d_model"],
    config: TrainConfig,
    *,
    step: int,
    is_dead: Bool[Tensor, "layer feature"],
    row_weights: Float[Tensor, "layer batch"] | None = None,
    grads: GradientBuffers | None = None,
) -> Outcome:
    """The loss of a step on the model's MLP inputs and outputs.

    Args:
        is_dead: Features that the terms against death act on.
        grads: Memory for the gradients of W_enc and W_dec.
    """
    rows = [DataBlock(x, y, row_weights, grads)]
    return objective_of_blocks([clt], rows, config, step=step, is_dead=[is_dead], processes=Processes())


def objective_of_blocks(
    blocks: Sequence[CrossLayerTranscoder],
    rows: Sequence[DataBlock],
    config: TrainConfig,
    *,
    step: int,
    is_dead: Sequence[Tensor],
    processes: Processes,
) -> Outcome:
    """The same, of this process's feature blocks and data blocks.

    Args:
        is_dead: Of each feature block.
    """
    shape, n_data = blocks[0].config, processes.layout.blocks[0]
    terms = [_Terms(blocks, part, config, is_dead, processes) for part in rows]
    k = None if shape.k is None else active_features(config, shape.k, step)
    for term, entries in zip(terms, _chosen(terms, k, processes), strict=True):
        term.compute(entries)
    weight = sparsity_weight(config, step)

    def total(fvu: Tensor, penalties: Tensor, auxk: Tensor) -> Tensor:
        sparsity, pre_act = penalties.unbind()
        loss = fvu.mean() + weight * sparsity
        return loss + config.pre_act_coefficient * pre_act + config.auxk_alpha * auxk

    def mean(parts: list[Tensor]) -> Tensor:
        found = processes.added(parts, "data")
        return found if n_data == 1 else found / n_data

    error = mean([term.errors[1].detach() for term in terms])
    auxk = [share_left(term.errors[0], error) for term in terms]
    fvu = mean([term.fvu for term in terms])
    penalties = mean([processes.added(term.penalties, "feature") for term in terms])
    whole_auxk = mean(auxk)
    loss = total(fvu, penalties, whole_auxk)
    shares = [loss]
    if not processes.layout.is_one_block:
        pairs = zip(terms, auxk, strict=True)
        shares = [total(term.fvu, _sum(term.penalties), share) / n_data for term, share in pairs]
    return Outcome(
        loss=loss,
        shares=shares,
        fvu=mean([term.unweighted_fvu() for term in terms]),
        sparsity=penalties[0].detach(),
        pre_act=penalties[1].detach(),
        auxk=whole_auxk.detach(),
        active_counts=processes.count(_sum([term.active_counts() for term in terms]), "data"),
    )


class _Terms:
    """The terms of one data block, which share the pre-activations."""

    fvu: Tensor
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
        self.fvu = layer_fvu(self.y_hat, self.target, self.rows.row_weights)
        self.penalties = [
            torch.stack([self._sparsity(number), self._pre_act(number)]) for number in range(len(self.blocks))
        ]
        self.errors = self._auxk(self.target - self.y_hat)

    def unweighted_fvu(self) -> Tensor:
        """Of each layer, every row alike."""
        if self.rows.row_weights is None:
            return self.fvu.detach()
        return layer_fvu(self.y_hat.detach(), self.target)

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


def _chosen(
    terms: Sequence[_Terms], k: int | None, processes: Processes
) -> Sequence[Sequence[Sequence[SparseActs]]]:
    """The entries that are or could be active, of each data block, of each feature block, of each layer.

    Args:
        k: Of this step; None for activations that do not select.
    """
    shape = terms[0].blocks[0].config
    if processes.layout.is_one_block or k is None:
        return [
            [
                selected_entries(shape, pre_acts, block.thresholds(), k)
                for pre_acts, block in zip(term.pre_acts, term.blocks, strict=True)
            ]
            for term in terms
        ]
    if shape.activation == "batchtopk":
        return largest_of_batch([term.pre_acts for term in terms], k, processes)
    offers = [
        [[select_topk(of_layer, k) for of_layer in pre_acts.unbind()] for pre_acts in term.pre_acts]
        for term in terms
    ]
    return [largest_of_rows(of_rows, k, processes) for of_rows in offers]


def _counts(acts: SparseActs, n_features: int) -> Tensor:
    return acts.indices[acts.values.detach() > 0].bincount(minlength=n_features)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
