"""Reconstructions of MLP outputs while a pass of the model brings the features up, layer by layer.

A layer's features are written to all its targets as soon as they are known, so no pass holds the features of more
than one layer.
"""

# Axes: layer, batch, pos, d_model, feature

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.nn import functional

from mdlm_interp.shapes import Float
from transcoder.model import CrossLayerTranscoder


class Reconstruction:
    """Reconstructions of some layers' outputs, summed while a pass brings the features up, layer by layer."""

    def __init__(self, clt: CrossLayerTranscoder, targets: Collection[int]) -> None:
        self._clt, self._targets = clt, targets
        self._sums: dict[int, Tensor] = {}
        self._skipped: dict[int, Tensor] = {}
        self.acts: dict[int, Tensor] = {}
        """Activations of the layer that was read last."""

    @property
    def sources(self) -> list[int]:
        """Layers whose features are needed."""
        return sorted({source for target in self._targets for source in self._clt.config.sources(target)})

    def read(self, layer: int, x: Float[Tensor, "batch pos d_model"]) -> None:
        """Encode a layer's input and add what its features write."""
        clt = self._clt
        acts = clt.encode_layer(x, layer)
        self.acts = {layer: acts}
        for target in clt.config.targets(layer):
            if target in self._targets:
                # A pass that was stopped half way may have left a sum: the first source starts anew.
                is_first = clt.config.sources(target)[0] == layer
                before = clt.b_dec[target] if is_first else self._sums[target]
                self._sums[target] = before + acts @ clt.W_dec[layer][:, target - layer]
        if clt.W_skip is not None and layer in self._targets:
            normalised = (x - clt.in_mean[layer]) * clt.in_scale[layer]
            self._skipped[layer] = functional.linear(normalised, clt.W_skip[layer])

    def take(self, target: int) -> Float[Tensor, "batch pos d_model"]:
        """The reconstruction of a layer's output, whose sources have all been read."""
        total = self._sums.pop(target)
        if target in self._skipped:
            total = total + self._skipped.pop(target)
        return total / self._clt.out_scale[target] + self._clt.out_mean[target]

    def clear(self) -> None:
        """Let go of all tensors."""
        for kept in (self._sums, self._skipped, self.acts):
            kept.clear()
