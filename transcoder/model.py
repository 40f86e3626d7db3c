"""The cross-layer transcoder: an encoder for each layer, decoders to the layers that its features write to.

    a[s] = activation(W_enc[s] x~[s] + b_enc[s])                          s: source layer
    y~[t] = b_dec[t] + sum over sources s of a[s] W_dec[s][:, t - s]      t: target layer
            (+ W_skip[t] x~[t])

The sources of t are all layers up to it (clt), itself (plt), or itself and a few before (band). x~ and y~ are
activations normalised by layer (`normalisation.py`); everything public takes and returns activations as the model
has them, unless its name says otherwise.

Source:
    Ameisen et al. 2025, Circuit Tracing.
"""

# Axes: layer, batch, d_model, feature, later (target layer minus source layer); rows are any leading axes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float
from transcoder.activations import jumprelu, topk
from transcoder.config import InitConfig, TranscoderConfig
from transcoder.folded import FoldedWeights, folded_weights
from transcoder.initialisation import initialise
from transcoder.normalisation import Normalisation


class CrossLayerTranscoder(nn.Module):
    """Sparse features that stand in for all MLPs of a model.

    Args:
        input_norm: Normalisation of what the encoders read; none by default.
        output_norm: Normalisation of what the decoders write; none by default.
        seed: Key of the initial weights; each tensor is a function of (seed, its name).
        init: The kind of initial weights.
    """

    in_mean: Tensor
    in_scale: Tensor
    out_mean: Tensor
    out_scale: Tensor
    log_threshold: nn.Parameter | None
    W_skip: nn.Parameter | None

    def __init__(
        self,
        config: TranscoderConfig,
        input_norm: Normalisation | None = None,
        output_norm: Normalisation | None = None,
        *,
        seed: int = 0,
        init: InitConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = {}
        """Where the weights come from, as the saved config.json records it."""
        self.training_sequences: NDArray[np.int64] | None = None
        """`held_out.training_hashes` of the text it was trained on; None if that is not known."""
        n_layers, n_features, d_model = config.n_layers, config.n_features, config.d_model
        self.W_enc = nn.Parameter(torch.empty(n_layers, n_features, d_model))
        self.b_enc = nn.Parameter(torch.empty(n_layers, n_features))
        # Source-major: a feature's decoder to all its targets is one contiguous row.
        self.W_dec = nn.ParameterList(
            nn.Parameter(torch.empty(n_features, len(config.targets(source)), d_model))
            for source in range(n_layers)
        )
        self.b_dec = nn.Parameter(torch.empty(n_layers, d_model))
        has_threshold = config.activation == "jumprelu"
        self.log_threshold = nn.Parameter(torch.empty(n_layers, n_features)) if has_threshold else None
        # [layer out in], as nn.Linear has it.
        self.W_skip = nn.Parameter(torch.empty(n_layers, d_model, d_model)) if config.skip else None
        for prefix, norm in (("in", input_norm), ("out", output_norm)):
            norm = norm or Normalisation.identity(n_layers, d_model)
            self.register_buffer(f"{prefix}_mean", norm.mean.to(torch.float32))
            self.register_buffer(f"{prefix}_scale", norm.scale.to(torch.float32))
        if self.W_enc.device.type != "meta":
            initialise(self, init or InitConfig(), seed)

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

    def normalise_input(
        self, x: Float[Tensor, "layer batch d_model"]
    ) -> Float[Tensor, "layer batch d_model"]:
        """The model's MLP inputs in normalised units."""
        return (x - self.in_mean[:, None]) * self.in_scale[:, None, None]

    def pre_acts(self, x: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows feature"]:
        """What a layer's features are before the activation function."""
        return functional.linear(self._normalised(x, layer), self.W_enc[layer], self.b_enc[layer])

    def encode_layer(self, x: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows feature"]:
        """Feature activations of one layer."""
        thresholds = None if self.log_threshold is None else self.log_threshold[layer]
        return self.activate(self.pre_acts(x, layer), thresholds)

    def all_pre_acts(self, x: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch feature"]:
        """`pre_acts` of every layer at once."""
        return torch.baddbmm(self.b_enc[:, None], self.normalise_input(x), self.W_enc.mT)

    def encode(self, x: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch feature"]:
        """Feature activations of every layer."""
        thresholds = None if self.log_threshold is None else self.log_threshold[:, None]
        return self.activate(self.all_pre_acts(x), thresholds)

    def activate(
        self, pre_acts: Float[Tensor, "*rows feature"], log_threshold: Tensor | None
    ) -> Float[Tensor, "*rows feature"]:
        """The activation function, of each row by itself.

        Raises:
            DataError: If it is BatchTopK, which needs calibration first.
        """
        config = self.config
        if log_threshold is not None:
            return jumprelu(pre_acts, log_threshold, config.ste, config.ste_width)
        if config.activation == "relu":
            return pre_acts.relu()
        if config.activation == "batchtopk":
            raise DataError(
                "a batchtopk keeps what is large among the rows of its batch, so one row has no activations; "
                "make it a jumprelu with transcoder.calibration.calibrated, as training does at its end"
            )
        assert config.k is not None
        return topk(pre_acts, config.k)

    @torch.no_grad()
    def thresholds(self) -> Float[Tensor, "layer feature"]:
        """What a pre-activation has to exceed; zero for an activation without thresholds."""
        return torch.zeros_like(self.b_enc) if self.log_threshold is None else self.log_threshold.exp()

    def decode_normalised(
        self,
        feature_acts: Float[Tensor, "layer batch feature"],
        normalised_x: Float[Tensor, "layer batch d_model"] | None = None,
    ) -> Float[Tensor, "layer batch d_model"]:
        """The reconstruction in normalised units, where the loss is taken.

        Args:
            normalised_x: The encoders' inputs; needed for a transcoder with a skip.
        """
        targets = [[bias.expand(feature_acts.shape[1], -1)] for bias in self.b_dec.unbind()]
        for source, acts in enumerate(feature_acts.unbind()):
            written = acts @ self.W_dec[source].flatten(1)
            for later, part in enumerate(torch.split(written, self.config.d_model, dim=1)):
                targets[source + later].append(part)
        if self.W_skip is not None:
            for target, parts in enumerate(targets):
                x = self._need_input(normalised_x)[target]
                parts.append(functional.linear(x, self.W_skip[target]))
        return torch.stack([_sum(parts) for parts in targets])

    def decode(
        self,
        feature_acts: Float[Tensor, "layer batch feature"],
        x: Float[Tensor, "layer batch d_model"] | None = None,
    ) -> Float[Tensor, "layer batch d_model"]:
        """The reconstruction of every layer's output.

        Args:
            x: The encoders' inputs; needed for a transcoder with a skip.
        """
        y_hat = self.decode_normalised(feature_acts, None if x is None else self.normalise_input(x))
        return y_hat / self.out_scale[:, None, None] + self.out_mean[:, None]

    def decode_to(
        self,
        target: int,
        feature_acts: Mapping[int, Tensor] | Sequence[Tensor],
        x: Float[Tensor, "*rows d_model"] | None = None,
    ) -> Float[Tensor, "*rows d_model"]:
        """The reconstruction of one layer's output.

        Args:
            feature_acts: Activations [*rows feature] by layer, at least of those that write to the target.
            x: The target layer's input; needed for a transcoder with a skip.
        """
        parts = [self.b_dec[target]]
        for source in self.config.sources(target):
            parts.append(feature_acts[source] @ self.W_dec[source][:, target - source])
        if self.W_skip is not None:
            parts.append(
                functional.linear(self._normalised(self._need_input(x), target), self.W_skip[target])
            )
        return _sum(parts) / self.out_scale[target] + self.out_mean[target]

    @staticmethod
    def _need_input(x: Tensor | None) -> Tensor:
        if x is None:
            raise DataError(
                "this transcoder has a skip from input to output; hand the inputs to decode() too"
            )
        return x

    def _normalised(self, x: Tensor, layer: int) -> Tensor:
        return (x - self.in_mean[layer]) * self.in_scale[layer]

    def decoder_rows(self, layer: int, feature: int) -> Float[Tensor, "later d_model"]:
        """What one unit of a feature adds to the output of each layer that it writes to, its own first."""
        row: Tensor = self.W_dec[layer][feature]
        return row / self.target_scale(layer)[:, None]

    def target_scale(self, source: int) -> Float[Tensor, " later"]:
        """`out_scale` of the layers that a layer's features write to."""
        targets = self.config.targets(source)
        return self.out_scale[targets.start : targets.stop]

    def decoder_norms(self) -> Float[Tensor, "layer feature"]:
        """Norm of each feature's decoders to all its targets together, in normalised units."""
        return torch.stack([weight.flatten(1).norm(dim=1) for weight in self.W_dec])

    def normalise_output(
        self, y: Float[Tensor, "layer batch d_model"]
    ) -> Float[Tensor, "layer batch d_model"]:
        """The model's outputs in normalised units."""
        return (y - self.out_mean[:, None]) * self.out_scale[:, None, None]

    def forward(self, x: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "layer batch d_model"]:
        """The reconstruction of every layer's output from every layer's input."""
        return self.decode(self.encode(x), x)

    def folded(self) -> FoldedWeights:
        """The weights with normalisation folded in, in float64: they take and give raw activations."""
        return folded_weights(self)

    def extra_repr(self) -> str:
        """Shape, for printing."""
        config = self.config
        shown = ["n_layers", "d_model", "n_features", *(["k"] if config.k is not None else [])]
        shown += [
            name for name in ("connectivity", "activation") if getattr(config, name) not in ("clt", "topk")
        ]
        return ", ".join(f"{name}={getattr(config, name)}" for name in shown) + (
            ", skip" if config.skip else ""
        )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Left to right: the order of additions is part of the result."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
