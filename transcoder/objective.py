"""The training objective: one pass through the encoders feeds the loss, the terms against death, and the metrics.

    loss = mean over layers of the (row-weighted) nmse
         + sparsity weight of the step * penalty on active features
         + pre_act_coefficient * penalty on features below their threshold
         + auxk_alpha * share of the error that dead features leave over       (topk and batchtopk)

The fraction of variance unexplained is for the reader: it is of the variance of the batch's own rows, as
`metrics.fvu_of` has it for any rows, whatever the weights in the loss.

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

from torch import Tensor

from mdlm_interp.shapes import Bool, Float, Int64
from transcoder.block_terms import DataBlock, Terms
from transcoder.kernels import GradientBuffers, select_topk
from transcoder.losses import share_left
from transcoder.metrics import fvu_of
from transcoder.model import CrossLayerTranscoder
from transcoder.scale_out.processes import Processes
from transcoder.scale_out.selection import largest_of_batch, largest_of_rows
from transcoder.schedules import active_features, sparsity_weight
from transcoder.selection import selected_entries
from transcoder.sparse import SparseActs
from transcoder.train_config import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """The loss of a batch with its parts, those of all blocks together but where it says otherwise."""

    loss: Float[Tensor, ""]
    """With gradient, if one process has all blocks."""
    shares: list[Tensor]
    """What each of this process's data blocks gives to the loss through this process's features, with gradient."""
    nmse: Float[Tensor, " layer"]
    """Mean squared error in normalised units, of every row alike."""
    fvu: Float[Tensor, " layer"]
    """Of every row alike; nan where the rows hardly vary."""
    sparsity: Float[Tensor, ""]
    """The penalty on active features, before its weight."""
    pre_act: Float[Tensor, ""]
    """The penalty on features below their threshold, before its weight."""
    auxk: Float[Tensor, ""]
    active_counts: Int64[Tensor, "layer feature"]
    """Rows in which each of this process's features is active."""


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
    terms = [Terms(blocks, part, config, is_dead, processes) for part in rows]
    k = None if shape.k is None else active_features(config, shape.k, step)
    for term, entries in zip(terms, _chosen(terms, k, processes), strict=True):
        term.compute(entries)
    weight = sparsity_weight(config, step)

    def total(nmse: Tensor, penalties: Tensor, auxk: Tensor) -> Tensor:
        sparsity, pre_act = penalties.unbind()
        loss = nmse.mean() + weight * sparsity
        return loss + config.pre_act_coefficient * pre_act + config.auxk_alpha * auxk

    def mean(parts: list[Tensor]) -> Tensor:
        found = processes.added(parts, "data")
        return found if n_data == 1 else found / n_data

    error = mean([term.errors[1].detach() for term in terms])
    auxk = [share_left(term.errors[0], error) for term in terms]
    nmse = mean([term.nmse for term in terms])
    penalties = mean([processes.added(term.penalties, "feature") for term in terms])
    whole_auxk = mean(auxk)
    loss = total(nmse, penalties, whole_auxk)
    shares = [loss]
    if not processes.layout.is_one_block:
        pairs = zip(terms, auxk, strict=True)
        shares = [total(term.nmse, _sum(term.penalties), share) / n_data for term, share in pairs]
    unweighted = mean([term.unweighted_nmse() for term in terms])
    n_rows = rows[0].x.shape[1] * n_data
    moments = processes.added([term.target_moments() for term in terms], "data") / n_rows
    return Outcome(
        loss=loss,
        shares=shares,
        nmse=unweighted,
        fvu=fvu_of(unweighted.double(), moments[:, 0], moments[:, 1:]),
        sparsity=penalties[0].detach(),
        pre_act=penalties[1].detach(),
        auxk=whole_auxk.detach(),
        active_counts=processes.count(_sum([term.active_counts() for term in terms]), "data"),
    )


def _chosen(
    terms: Sequence[Terms], k: int | None, processes: Processes
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


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
