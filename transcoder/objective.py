"""The training objective: one pass through the encoders feeds the loss, the terms against death, and the metrics.

    loss = mean over layers of the (row-weighted) FVU
         + sparsity weight of the step * penalty on active features
         + pre_act_coefficient * penalty on features below their threshold
         + auxk_alpha * share of the error that dead features leave over       (topk and batchtopk)

All pre-activations are computed once, without gradient. Every term then takes the entries that it needs, and only
through these does its gradient go: see `kernels`, which go over to dense products where many are active.

Source:
    reference/transcoders.md 2.2; the terms cite theirs.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mdlm_interp.shapes import Bool, Float, Int64
from transcoder.activations import jumprelu
from transcoder.kernels import GradientBuffers, decode, encode_selected, pre_activations
from transcoder.losses import auxk_loss, layer_fvu
from transcoder.model import CrossLayerTranscoder
from transcoder.penalties import l1_penalty, tanh_penalty, threshold_penalty, zero_penalty
from transcoder.schedules import active_features, sparsity_weight
from transcoder.selection import below, selected_entries, strongest_dead
from transcoder.sparse import SparseActs
from transcoder.train_config import TrainConfig


@dataclass(frozen=True)
class Outcome:
    """The loss of a batch with its parts."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, " layer"]
    """Of every row alike, whatever the weights in the loss."""
    sparsity: Float[Tensor, ""]
    """The penalty on active features, before its weight."""
    pre_act: Float[Tensor, ""]
    """The penalty on features below their threshold, before its weight."""
    auxk: Float[Tensor, ""]
    active_counts: Int64[Tensor, "layer feature"]
    """Rows in which each feature is active."""


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
    parts = _Parts(clt, clt.normalise_input(x), config, is_dead, grads)
    target = clt.normalise_output(y)
    acts = parts.feature_acts(step)
    y_hat = parts.reconstruction(acts)
    fvu = layer_fvu(y_hat, target, row_weights)
    sparsity, pre_act = parts.sparsity(acts), parts.pre_act()
    auxk = parts.auxk(target - y_hat, row_weights)
    loss = fvu.mean() + sparsity_weight(config, step) * sparsity
    loss = loss + config.pre_act_coefficient * pre_act + config.auxk_alpha * auxk
    unweighted = fvu if row_weights is None else layer_fvu(y_hat.detach(), target)
    counts = [(a.indices[a.values.detach() > 0]).bincount(minlength=clt.config.n_features) for a in acts]
    return Outcome(
        loss=loss,
        fvu=unweighted.detach(),
        sparsity=sparsity.detach(),
        pre_act=pre_act.detach(),
        auxk=auxk.detach(),
        active_counts=torch.stack(counts),
    )


class _Parts:
    """The terms of one step, which share the pre-activations."""

    def __init__(
        self,
        clt: CrossLayerTranscoder,
        x: Tensor,
        config: TrainConfig,
        is_dead: Tensor,
        grads: GradientBuffers | None,
    ) -> None:
        self.clt, self.x, self.config, self.is_dead, self.grads = clt, x, config, is_dead, grads
        self.pre_acts = pre_activations(x, clt.W_enc, clt.b_enc)
        self.zero = self.pre_acts.new_zeros(())

    def feature_acts(self, step: int) -> list[SparseActs]:
        """Activations as training has them: k of the step, and BatchTopK over the batch."""
        clt, shape = self.clt, self.clt.config
        k = None if shape.k is None else active_features(self.config, shape.k, step)
        chosen = self._encoded(selected_entries(shape, self.pre_acts, clt.thresholds(), k))
        if clt.log_threshold is None:
            return chosen
        return [
            h.with_values(
                jumprelu(h.values, log.index_select(0, h.indices.long()), shape.ste, shape.ste_width)
            )
            for h, log in zip(chosen, clt.log_threshold.unbind(), strict=True)
        ]

    def reconstruction(self, acts: Sequence[SparseActs]) -> Tensor:
        """In normalised units."""
        y_hat = decode(acts, list(self.clt.W_dec), self.clt.b_dec, grads=self.grads)
        if self.clt.W_skip is None:
            return y_hat
        skipped = [functional.linear(x, skip) for x, skip in zip(self.x, self.clt.W_skip, strict=True)]
        return y_hat + torch.stack(skipped)

    def sparsity(self, acts: Sequence[SparseActs]) -> Tensor:
        """The penalty on active features."""
        if self.config.sparsity == "none":
            return self.zero
        norms = self.clt.decoder_norms()
        if self.config.sparsity == "l1":
            return l1_penalty(acts, norms)
        return tanh_penalty(acts, norms, self.config.sparsity_scale)

    def pre_act(self) -> Tensor:
        """The penalty on features below their threshold."""
        clt, config = self.clt, self.config
        if config.pre_act == "none":
            return self.zero
        chosen = self.is_dead if config.pre_act_on == "dead" else None
        if chosen is not None and not bool(chosen.any()):
            return self.zero
        if config.pre_act == "zero":
            return zero_penalty(self._encoded(below(self.pre_acts, torch.zeros_like(clt.b_enc), chosen)))
        # Not clt.thresholds(), which has no gradient: the threshold of a feature may come down to it too.
        log_threshold = clt.log_threshold
        thresholds = torch.zeros_like(clt.b_enc) if log_threshold is None else log_threshold.exp()
        entries = self._encoded(below(self.pre_acts, thresholds.detach(), chosen))
        return threshold_penalty(entries, thresholds, clt.decoder_norms())

    def auxk(self, residual: Tensor, row_weights: Tensor | None) -> Tensor:
        """The loss that revives dead features; zero when nothing is dead, or it is off."""
        clt, k = self.clt, self.config.auxk
        if k is None or not clt.config.selects or not bool(self.is_dead.any()):
            return self.zero
        acts = self._encoded(strongest_dead(self.pre_acts, self.is_dead, k))
        revived = decode(acts, list(clt.W_dec), torch.zeros_like(clt.b_dec), grads=self.grads)
        return auxk_loss(residual, revived, row_weights)

    def _encoded(self, entries: Sequence[SparseActs]) -> list[SparseActs]:
        return encode_selected(self.x, self.clt.W_enc, self.clt.b_enc, entries, grads=self.grads)
