"""One pass of the model in which everything that attribution freezes is a constant.

1. The embedding and each layer's MLP output become leaves: what they are is taken from the pass, and no gradient
   goes on behind them. A transcoder's skip from input to output stays linear and keeps its gradient.
2. Attention patterns and the scales of the LayerNorms are detached; adaLN depends on sigma alone and is constant.
3. What is left between the leaves and what encoders and output layer read is affine. A pullback of it gives direct
   effects; a pass with all leaves zero and the same patterns and scales gives its constant part.

All of it runs in the model itself, through hooks, so that no second description of the network can differ from it.

Source:
    Ameisen et al. 2025, Circuit Tracing (the local replacement model).
"""

# Axes: pos, d_model, layer, feature, target (a row of a batch of pullbacks)

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import HookFunction, HookPoint
from mdlm_interp.shapes import Float, Int64
from transcoder.config import TranscoderConfig
from transcoder.replacement import ReplacementModel

INPUT_HOOKS = (
    "blocks.{layer}.mlp.hook_in",
    "blocks.{layer}.ln2.hook_normalized",
    "blocks.{layer}.hook_resid_mid",
)
OUTPUT_HOOKS = ("blocks.{layer}.hook_mlp_out", "blocks.{layer}.mlp.hook_out")
"""Where the path from one to the other is affine once patterns and scales are constant."""

FROZEN = (
    "blocks.*.attn.hook_pattern",
    "blocks.*.ln1.hook_scale",
    "blocks.*.ln2.hook_scale",
    "ln_final.hook_scale",
)
"""Hook points that attribution takes as constants."""


class LinearPass:
    """The model on one state, linear between features.

    Raises:
        DataError: If there is more than one sequence, or the transcoder's hook points leave the path nonlinear.
    """

    def __init__(
        self,
        replacement: ReplacementModel,
        input_ids: Int64[Tensor, "batch pos"],
        timesteps: Tensor | None = None,
    ) -> None:
        if input_ids.shape[0] != 1:
            raise DataError(
                f"a graph is of one sequence, got {input_ids.shape[0]}; give input_ids[i : i + 1]"
            )
        self.model, self.clt = replacement.model, replacement.clt
        check_hook_points(self.clt.config)
        self.input_ids, self._timesteps = input_ids, timesteps
        self._leaves: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        with torch.enable_grad():
            logits = self._run(self._as_leaf, self._freeze)
        read = self._inputs
        self.logits: Float[Tensor, "pos vocab"] = logits.detach()[0]
        """As the model gives them."""
        self.constants: dict[str, Tensor] = {}
        """What encoders and output layer would read if all leaves were zero; each [pos d_model]."""
        self._inputs = {}
        with torch.no_grad():
            self._run(
                lambda tensor, hook: torch.zeros_like(tensor), lambda tensor, hook: self._frozen[hook.name]
            )
        self.constants = {name: tensor[0] for name, tensor in self._inputs.items()}
        self._inputs = read

    @property
    def embedding(self) -> Float[Tensor, "pos d_model"]:
        """The token embeddings."""
        return self._leaves["hook_embed"].detach()[0]

    def output(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What a layer's MLP gave, less what the transcoder's skip gives for it."""
        return self._leaves[self.clt.config.output_hooks[layer]].detach()[0]

    def input_name(self, layer: int) -> str:
        """The hook point that a layer's encoder reads; behind the last layer, what the output layer reads."""
        hooks = self.clt.config.input_hooks
        return hooks[layer] if layer < len(hooks) else "hook_final_in"

    def input(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What is read there."""
        return self._inputs[self.input_name(layer)].detach()[0]

    def constant(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What would be read there if the leaves were zero."""
        return self.constants[self.input_name(layer)]

    def pull_back(
        self,
        layer: int,
        positions: Int64[Tensor, " target"],
        directions: Float[Tensor, "target d_model"],
    ) -> tuple[Float[Tensor, "target pos d_model"], list[Tensor]]:
        """Gradients of (direction . what is read at a layer and position), by the leaves.

        Args:
            layer: The number of layers means the output layer.
        Returns:
            By the embedding, and by the output of each layer before, [target pos d_model] each.
        """
        read = self._inputs[self.input_name(layer)]
        cotangents = directions.new_zeros(len(positions), *read.shape)
        cotangents[torch.arange(len(positions)), 0, positions] = directions
        names = ["hook_embed", *self.clt.config.output_hooks[:layer]]
        leaves = [self._leaves[name] for name in names]
        found = torch.autograd.grad(read, leaves, cotangents, retain_graph=True, is_grads_batched=True)
        embedding, *outputs = (gradient[:, 0] for gradient in found)
        return embedding, outputs

    def _run(self, leaf: HookFunction, frozen: HookFunction) -> Tensor:
        outputs = dict.fromkeys(["hook_embed", *self.clt.config.output_hooks], self._beside_skip(leaf))
        inputs = [*self.clt.config.input_hooks, "hook_final_in"]
        with (
            self.model.hooks({**outputs, **dict.fromkeys(FROZEN, frozen)}),
            self.model.hooks(dict.fromkeys(inputs, self._keep), read_only=True),
        ):
            logits: Tensor = self.model(self.input_ids, self._timesteps)
        return logits

    def _beside_skip(self, leaf: HookFunction) -> Callable[[Tensor, HookPoint], Tensor]:
        """The leaf, plus what a skip adds to it, which depends on other leaves."""
        layers = {name: layer for layer, name in enumerate(self.clt.config.output_hooks)}

        def replace(tensor: Tensor, hook: HookPoint) -> Tensor:
            skipped = self._skipped(layers[hook.name]) if hook.name in layers else None
            left = leaf(tensor if skipped is None else tensor - skipped, hook)
            assert left is not None
            return left if skipped is None else left + skipped

        return replace

    def _skipped(self, layer: int) -> Tensor | None:
        """The linear part of a skip; the mean that it takes off its input counts as the decoder's bias."""
        clt = self.clt
        if clt.W_skip is None:
            return None
        scale = clt.in_scale[layer] / clt.out_scale[layer]
        return functional.linear(
            self._inputs[clt.config.input_hooks[layer]], clt.W_skip[layer].detach() * scale
        )

    def _as_leaf(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        self._leaves[hook.name] = tensor.detach().requires_grad_(True)
        return self._leaves[hook.name]

    def _freeze(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        self._frozen[hook.name] = tensor.detach()
        return self._frozen[hook.name]

    def _keep(self, tensor: Tensor, hook: HookPoint) -> None:
        self._inputs[hook.name] = tensor


def check_hook_points(config: TranscoderConfig) -> None:
    """Raise DataError unless what a transcoder reads is affine in what it writes, patterns and scales given."""
    for what, found, known in (
        ("reads", config.input_hook, INPUT_HOOKS),
        ("writes", config.output_hook, OUTPUT_HOOKS),
    ):
        if found not in known:
            raise DataError(
                f"attribution is linear for a transcoder that {what} {' or '.join(known)}, got {found}; "
                f"train one with these hook points"
            )
