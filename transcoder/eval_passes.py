"""The model's logits under every condition of an evaluation, on one batch.

A pass in which only the MLP of block l is replaced or ablated is the original's up to there. If what is replaced is
what the MLP adds to the residual stream, such a pass begins at the end of block l, from the original's residual
stream: bit for bit the logits of a whole pass, for about half the work. Otherwise it is a whole pass.
"""

# Axes: batch, pos, d_model, vocab

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mdlm_interp.layers import Block
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float, Int64
from transcoder.eval_scores import Condition, Kind
from transcoder.replacement import Look, ReplacementModel

KINDS: tuple[Literal["replaced", "zero", "mean"], ...] = ("replaced", "zero", "mean")


def all_conditions(n_layers: int) -> list[Condition]:
    """Every condition besides the original: all MLPs, then each alone."""
    return [
        *(Condition(kind) for kind in KINDS),
        *(Condition(kind, layer) for layer in range(n_layers) for kind in KINDS),
    ]


class Passes:
    """Runs the conditions on one batch.

    Args:
        timesteps: sigma, as the model takes it.
        look: Called with every layer of the original pass; see `ReplacementModel.watched`.
    """

    def __init__(
        self,
        replacement: ReplacementModel,
        input_ids: Int64[Tensor, "batch pos"],
        timesteps: Tensor,
        look: Look,
    ) -> None:
        self._replacement, self._input_ids, self._timesteps = replacement, input_ids, timesteps
        model, config = replacement.model, replacement.clt.config
        n_layers = config.n_layers
        self._resumes = list(config.output_hooks) == [f"blocks.{i}.hook_mlp_out" for i in range(n_layers)]
        self._y_hat: list[Tensor] = []

        def keep(layer: int, acts: Tensor, y: Tensor, y_hat: Tensor) -> None:
            look(layer, acts, y, y_hat)
            if self._resumes:
                self._y_hat.append(y_hat)

        residuals = [f"blocks.{layer}.hook_resid_mid" for layer in range(n_layers)] if self._resumes else []
        with replacement.watched(keep):
            self.original, cache = model.run_with_cache(
                input_ids, ["hook_cond", *residuals], timesteps=timesteps, clone=False
            )
        self._cond = cache["hook_cond"]
        self._residuals = [cache[name] for name in residuals]

    def logits(self, condition: Condition) -> Float[Tensor, "batch pos vocab"]:
        """Raw logits under one condition."""
        if condition.layer is not None and self._resumes:
            return self._resumed(condition.layer, self._written(condition.kind, condition.layer))
        replacement = self._replacement
        layers = None if condition.layer is None else [condition.layer]
        context = (
            replacement.spliced(layers)
            if condition.kind == "replaced"
            else replacement.ablated("zero" if condition.kind == "zero" else "mean", layers)
        )
        with context:
            logits: Tensor = replacement.model(self._input_ids, self._timesteps)
        return logits

    def _written(self, kind: Kind, layer: int) -> Tensor:
        """What is added to the residual stream in the place of the MLP's output."""
        if kind == "replaced":
            return self._y_hat[layer]
        like = self._residuals[layer]
        if kind == "zero":
            return torch.zeros_like(like)
        return self._replacement.mean_output(layer).expand_as(like).to(like.dtype)

    def _resumed(self, layer: int, written: Float[Tensor, "batch pos d_model"]) -> Tensor:
        model: HookedMDLM = self._replacement.model
        arithmetic, backbone = model.arithmetic, model.backbone
        rotary = arithmetic.rotary_tables(backbone.rotary_emb.inv_freq, self._input_ids.shape[1])
        x = arithmetic.add(self._residuals[layer], written)
        for number, block in enumerate(backbone.blocks):
            if number == layer:
                assert isinstance(block, Block)
                x = block.at["hook_resid_post"](x)
            elif number > layer:
                x = block(x, self._cond, rotary, arithmetic)
        logits: Tensor = backbone.output_layer.forward(x, self._cond, arithmetic)
        return logits
