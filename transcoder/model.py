"""The cross-layer transcoder: an encoder for each layer, decoders to every layer from there on.

    a[s] = TopK(W_enc[s] x~[s] + b_enc[s])              s: source layer
    y~[t] = b_dec[t] + sum over s <= t of a[s] W_dec[s][:, t - s]

x~ and y~ are activations normalised by layer (`normalisation.py`); everything public takes and returns
activations as the model has them.

Source:
    Ameisen et al. 2025, Circuit Tracing; the initial weights are those of its re-implementations, uniform
    within 1 / sqrt(n_features) and 1 / sqrt(n_layers d_model).
"""

# Axes: layer, batch, d_model, feature, later (target layer minus source layer); rows are any leading axes

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Float, Float64
from transcoder.activations import topk
from transcoder.config import TranscoderConfig
from transcoder.normalisation import Normalisation


class CrossLayerTranscoder(nn.Module):
    """Sparse features that stand in for all MLPs of a model.

    Args:
        input_norm: Normalisation of what the encoders read; none by default.
        output_norm: Normalisation of what the decoders write; none by default.
        seed: Key of the initial weights; each tensor is a function of (seed, its name).
    """

    in_mean: Tensor
    in_scale: Tensor
    out_mean: Tensor
    out_scale: Tensor

    def __init__(
        self,
        config: TranscoderConfig,
        input_norm: Normalisation | None = None,
        output_norm: Normalisation | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = {}
        """Where the weights come from, as the saved config.json records it."""
        self.training_sequences: NDArray[np.int64] | None = None
        """`held_out.sequence_hashes` of the text it was trained on; None if that is not known."""
        n_layers, n_features, d_model = config.n_layers, config.n_features, config.d_model
        self.W_enc = nn.Parameter(torch.empty(n_layers, n_features, d_model))
        self.b_enc = nn.Parameter(torch.empty(n_layers, n_features))
        # Source-major: a feature's decoder to all its targets is one contiguous row.
        self.W_dec = nn.ParameterList(
            nn.Parameter(torch.empty(n_features, n_layers - source, d_model)) for source in range(n_layers)
        )
        self.b_dec = nn.Parameter(torch.empty(n_layers, d_model))
        for prefix, norm in (("in", input_norm), ("out", output_norm)):
            norm = norm or Normalisation.identity(n_layers, d_model)
            self.register_buffer(f"{prefix}_mean", norm.mean.to(torch.float32))
            self.register_buffer(f"{prefix}_scale", norm.scale.to(torch.float32))
        if self.W_enc.device.type != "meta":
            initialise(self, seed)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        model: HookedMDLM | str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> CrossLayerTranscoder:
        """Read a trained transcoder; see `checkpoint.load_clt`.

        Args:
            model: The model it will be used with, or its source: an error if it was trained on another.
        """
        from transcoder.checkpoint import load_clt

        return load_clt(directory, model, device=device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and clt.safetensors, never over others; see `checkpoint.save_clt`."""
        from transcoder.checkpoint import save_clt

        save_clt(self, directory)

    def pre_acts(self, x: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows feature"]:
        """What a layer's features are before the activation function."""
        normalised = (x - self.in_mean[layer]) * self.in_scale[layer]
        return functional.linear(normalised, self.W_enc[layer], self.b_enc[layer])

    def encode_layer(self, x: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows feature"]:
        """Feature activations of one layer."""
        return topk(self.pre_acts(x, layer), self.config.k)

    def all_pre_acts(self, x: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch feature"]:
        """`pre_acts` of every layer at once."""
        normalised = (x - self.in_mean[:, None]) * self.in_scale[:, None, None]
        return torch.baddbmm(self.b_enc[:, None], normalised, self.W_enc.mT)

    def encode(self, x: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch feature"]:
        """Feature activations of every layer."""
        return topk(self.all_pre_acts(x), self.config.k)

    def decode_normalised(
        self, feature_acts: Float[Tensor, "layer batch feature"]
    ) -> Float[Tensor, "layer batch d_model"]:
        """The reconstruction in normalised units, where the loss is taken."""
        targets = [[bias.expand(feature_acts.shape[1], -1)] for bias in self.b_dec.unbind()]
        for source, acts in enumerate(feature_acts.unbind()):
            written = acts @ self.W_dec[source].flatten(1)
            for later, part in enumerate(torch.split(written, self.config.d_model, dim=1)):
                targets[source + later].append(part)
        return torch.stack([_sum(parts) for parts in targets])

    def decode(
        self, feature_acts: Float[Tensor, "layer batch feature"]
    ) -> Float[Tensor, "layer batch d_model"]:
        """The reconstruction of every layer's output."""
        return self.decode_normalised(feature_acts) / self.out_scale[:, None, None] + self.out_mean[:, None]

    def decode_to(self, target: int, feature_acts: Sequence[Tensor]) -> Float[Tensor, "*rows d_model"]:
        """The reconstruction of one layer's output.

        Args:
            feature_acts: Activations [*rows feature] of the layers 0 to `target`, in order.
        """
        parts = [self.b_dec[target]]
        for source, acts in enumerate(feature_acts[: target + 1]):
            parts.append(acts @ self.W_dec[source][:, target - source])
        return _sum(parts) / self.out_scale[target] + self.out_mean[target]

    def decoder_rows(self, layer: int, feature: int) -> Float[Tensor, "later d_model"]:
        """What one unit of a feature adds to the output of its layer and of each later one."""
        row: Tensor = self.W_dec[layer][feature]
        return row / self.out_scale[layer:, None]

    def normalise_output(
        self, y: Float[Tensor, "layer batch d_model"]
    ) -> Float[Tensor, "layer batch d_model"]:
        """The model's outputs in normalised units."""
        return (y - self.out_mean[:, None]) * self.out_scale[:, None, None]

    def forward(self, x: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch d_model"]:
        """The reconstruction of every layer's output from every layer's input."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def folded(self) -> FoldedWeights:
        """The weights with normalisation folded in, in float64: they take and give raw activations."""
        w_enc, in_scale = self.W_enc.double(), self.in_scale.double()[:, None]
        shift = torch.einsum("lfd,ld->lf", w_enc, self.in_mean.double())
        return FoldedWeights(
            W_enc=w_enc * in_scale[..., None],
            b_enc=self.b_enc.double() - shift * in_scale,
            W_dec=[
                weight.double() / self.out_scale.double()[source:, None]
                for source, weight in enumerate(self.W_dec)
            ],
            b_dec=self.b_dec.double() / self.out_scale.double()[:, None] + self.out_mean.double(),
        )

    def extra_repr(self) -> str:
        """Shape, for printing."""
        shown = ("n_layers", "d_model", "n_features", "k")
        return ", ".join(f"{name}={getattr(self.config, name)}" for name in shown)


@dataclass(frozen=True)
class FoldedWeights:
    """A transcoder without normalisation: same features, same reconstruction."""

    W_enc: Float64[Tensor, "layer feature d_model"]
    b_enc: Float64[Tensor, "layer feature"]
    W_dec: list[Tensor]
    """Float64 [feature later d_model] of each source layer."""
    b_dec: Float64[Tensor, "layer d_model"]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Left to right: the order of additions is part of the result."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@torch.no_grad()
def initialise(clt: CrossLayerTranscoder, seed: int) -> None:
    """Draw the initial weights in place; each tensor is a pure function of (seed, its name)."""
    config = clt.config
    clt.b_enc.zero_()
    clt.b_dec.zero_()
    bounds = {
        "W_enc": 1.0 / math.sqrt(config.n_features),
        "W_dec": 1.0 / math.sqrt(config.n_layers * config.d_model),
    }
    for name, parameter in clt.named_parameters():
        bound = bounds.get(name.partition(".")[0])
        if bound is not None:
            draws = torch.from_numpy(uniforms(seed, f"clt:{name}", 0, parameter.numel()))
            parameter.copy_(((2.0 * draws - 1.0) * bound).reshape(parameter.shape))
