"""What all formats have in common: a transcoder in float64 that takes and gives raw activations.

A writer rounds a form to float32 once; a reader makes one from the file's values, which float64 holds exactly.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdlm_interp.errors import CheckpointError
from mdlm_interp.shapes import Float32, Float64
from transcoder.activations import topk
from transcoder.config import TranscoderConfig
from transcoder.folded import FoldedWeights
from transcoder.model import CrossLayerTranscoder

LOG_TINY = torch.finfo(torch.float32).tiny
"""The threshold that stands for 0, which has no logarithm: the smallest normal float32."""


@dataclass(frozen=True)
class Form:
    """A transcoder without normalisation."""

    config: TranscoderConfig
    weights: FoldedWeights

    @classmethod
    def of(cls, clt: CrossLayerTranscoder) -> Form:
        """A transcoder's, with its normalisation folded in, on the CPU."""
        folded = clt.folded()
        return cls(
            clt.config,
            FoldedWeights(
                W_enc=folded.W_enc.cpu(),
                b_enc=folded.b_enc.cpu(),
                W_dec=[weight.cpu() for weight in folded.W_dec],
                b_dec=folded.b_dec.cpu(),
                threshold=None if folded.threshold is None else folded.threshold.cpu(),
                W_skip=None if folded.W_skip is None else folded.W_skip.cpu(),
            ),
        )

    @torch.no_grad()
    def transcoder(self) -> CrossLayerTranscoder:
        """Our own module, without normalisation, each value rounded to float32 once.

        Raises:
            CheckpointError: If a value is beyond float32.
        """
        with torch.device("meta"):
            clt = CrossLayerTranscoder(self.config)
        weights, shape = self.weights, (self.config.n_layers, self.config.d_model)
        state = {
            "W_enc": single(weights.W_enc, "W_enc"),
            "b_enc": single(weights.b_enc, "b_enc"),
            **{f"W_dec.{i}": single(weight, f"W_dec[{i}]") for i, weight in enumerate(weights.W_dec)},
            "b_dec": single(weights.b_dec, "b_dec"),
        }
        if weights.threshold is not None:
            logs = weights.threshold.clamp(min=LOG_TINY).log()
            state["log_threshold"] = single(logs, "log_threshold")
        if weights.W_skip is not None:
            state["W_skip"] = single(weights.W_skip, "W_skip")
        for prefix in ("in", "out"):
            state[f"{prefix}_mean"] = torch.zeros(shape)
            state[f"{prefix}_scale"] = torch.ones(shape[0])
        clt.load_state_dict(state, assign=True)
        return clt.requires_grad_(True)

    def pre_acts(self, x: Float64[Tensor, "layer batch d_model"]) -> Float64[Tensor, "layer batch feature"]:
        """What features are before the activation function."""
        return torch.baddbmm(self.weights.b_enc[:, None], x, self.weights.W_enc.mT)

    def activate(
        self, pre_acts: Float64[Tensor, "layer batch feature"]
    ) -> Float64[Tensor, "layer batch feature"]:
        """The activation function."""
        if self.config.activation == "topk":
            assert self.config.k is not None
            return topk(pre_acts, self.config.k)
        if self.weights.threshold is None:
            return pre_acts.relu()
        threshold = self.weights.threshold[:, None]
        inclusive = self.config.ste == "crosslayer-coding"
        return torch.where(pre_acts >= threshold if inclusive else pre_acts > threshold, pre_acts, 0.0)

    def decode(
        self,
        feature_acts: Float64[Tensor, "layer batch feature"],
        x: Float64[Tensor, "layer batch d_model"],
    ) -> Float64[Tensor, "layer batch d_model"]:
        """The reconstruction."""
        y = self.weights.b_dec[:, None].repeat(1, x.shape[1], 1)
        for source, weight in enumerate(self.weights.W_dec):
            written = feature_acts[source] @ weight.flatten(1)
            y[source : source + weight.shape[1]] += written.view(-1, *weight.shape[1:]).transpose(0, 1)
        if self.weights.W_skip is not None:
            y += x @ self.weights.W_skip.mT
        return y

    def trimmed(self) -> Form:
        """The same function with the narrowest connectivity: decoders that are all zero are left out."""
        reach = max(
            (later + 1 for weight in self.weights.W_dec for later in _written(weight)),
            default=1,
        )
        if reach >= self.config.reach:
            return self
        narrow = (
            replace(self.config, connectivity="plt", band=None)
            if reach == 1
            else replace(self.config, connectivity="band", band=reach)
        )
        W_dec = [weight[:, :reach].contiguous() for weight in self.weights.W_dec]
        return Form(narrow, replace(self.weights, W_dec=W_dec))


def single(tensor: Float64[Tensor, "*shape"], name: str) -> Float32[Tensor, "*shape"]:
    """Rounded to float32, once.

    Raises:
        CheckpointError: If a value is beyond float32.
    """
    rounded = tensor.to(torch.float32)
    if not bool(torch.isfinite(rounded).all()):
        raise CheckpointError(
            f"{name} has values beyond float32, the largest {float(tensor.abs().max()):.3g}; "
            f"is the store's normalisation, or an adaLN gate that it is divided by, almost zero?"
        )
    return rounded


def _written(weight: Float64[Tensor, "feature later d_model"]) -> list[int]:
    """Which of a source's targets have a decoder that is not all zero."""
    return weight.flatten(2).abs().amax((0, 2)).nonzero()[:, 0].tolist()
