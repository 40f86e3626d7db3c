"""What was written where: the vectors that features, error terms and biases add to each layer's output.

For one target layer and position these are the rows of a small matrix, so that the direct effects of everything
written there on a batch of targets are one product with the gradients at that place.
"""

# Axes: pos, d_model, feature (active ones, as nodes), slot (what is written at one place), target

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdlm_interp.shapes import Float, Int64
from transcoder.attribution.linear_pass import LinearPass
from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True)
class Place:
    """Everything written to one layer's output."""

    vectors: Float[Tensor, "pos slot d_model"]
    columns: Int64[Tensor, "pos slot"]
    """The node of each, or one of the two columns behind the nodes: a decoder's bias, or nothing."""


class Sources:
    """The active features of a state, and what all sources write."""

    def __init__(self, linear: LinearPass) -> None:
        self._linear, self._clt = linear, linear.clt
        config = self._clt.config
        acts = [
            self._clt.encode_layer(linear.input(layer), layer).detach() for layer in range(config.n_layers)
        ]
        found = [(layer_acts > 0).nonzero() for layer_acts in acts]
        self.features: Int64[Tensor, "feature 3"] = torch.cat(
            [torch.cat([torch.full_like(at[:, :1], layer), at], 1) for layer, at in enumerate(found)]
        ).cpu()
        """Layer, position and number; node numbers and all that counts them stay on the CPU."""
        self.activations: Float[Tensor, " feature"] = torch.cat(
            [layer_acts[at[:, 0], at[:, 1]] for layer_acts, at in zip(acts, found, strict=True)]
        )
        self.n_positions = linear.embedding.shape[0]
        y_hat = [
            self._clt.decode_to(layer, acts, linear.input(layer) if config.skip else None).detach()
            for layer in range(config.n_layers)
        ]
        self.errors: list[Tensor] = [
            linear.output(layer) + self._skipped(layer) - y_hat[layer] for layer in range(config.n_layers)
        ]
        """What the transcoder misses of each layer's output; each [pos d_model]."""
        self.places = [self._place(layer) for layer in range(config.n_layers)]

    @property
    def n_columns(self) -> int:
        """Features, error terms and embeddings."""
        return len(self.features) + (self._clt.config.n_layers + 1) * self.n_positions

    @property
    def embedding_start(self) -> int:
        """Column of the first embedding."""
        return len(self.features) + self._clt.config.n_layers * self.n_positions

    def direct_effects(
        self, by_embedding: Float[Tensor, "target pos d_model"], by_output: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "target column"], Float[Tensor, " target"]]:
        """Direct effects on a batch of targets, from their gradients.

        Returns:
            Those of each feature, error term and embedding, and that of all decoders' biases.
        """
        found = by_embedding.new_zeros(len(by_embedding), self.n_columns + 2)
        found[:, self.embedding_start : self.n_columns] = torch.einsum(
            "bpd,pd->bp", by_embedding, self._linear.embedding
        )
        for place, gradient in zip(self.places, by_output, strict=False):  # no gradient reaches later layers
            products = torch.bmm(gradient.transpose(0, 1), place.vectors.mT)
            found.index_add_(1, place.columns.flatten(), products.transpose(0, 1).flatten(1))
        return found[:, : self.n_columns], found[:, self.n_columns]

    def encoders(self, nodes: Int64[Tensor, " target"]) -> Float[Tensor, "target d_model"]:
        """Directions in what the encoders read, of some features."""
        layer, _, feature = self.features[nodes].unbind(1)
        return self._clt.W_enc.detach()[layer, feature] * self._clt.in_scale[layer, None]

    def encoder_biases(self, nodes: Int64[Tensor, " target"]) -> Float[Tensor, " target"]:
        """What is added behind these directions; the mean that is taken off the inputs is part of it."""
        layer, _, feature = self.features[nodes].unbind(1)
        off = (self.encoders(nodes) * self._clt.in_mean[layer]).sum(1)
        return self._clt.b_enc.detach()[layer, feature] - off

    def _skipped(self, layer: int) -> Tensor:
        """What the skip gave, which the pass keeps apart from a layer's output."""
        clt, nothing = self._clt, torch.zeros_like(self._linear.output(layer))
        if clt.W_skip is None:
            return nothing
        scale = clt.in_scale[layer] / clt.out_scale[layer]
        return self._linear.input(layer) @ (clt.W_skip[layer].detach() * scale).T

    def _place(self, target: int) -> Place:
        """Features by position, each at most once; then the error term and the bias."""
        layer, position, feature = self.features.unbind(1)
        error = self.errors[target]
        writers = torch.tensor(self._clt.config.sources(target))
        nodes = torch.isin(layer, writers).nonzero()[:, 0]
        nodes = nodes[position[nodes].argsort(stable=True)]
        counts = torch.bincount(position[nodes], minlength=self.n_positions)
        # The number of each node among those of its position.
        slot = torch.arange(len(nodes)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        width = int(counts.max()) + 2
        vectors = error.new_zeros(self.n_positions, width, error.shape[1])
        columns = torch.full((self.n_positions, width), self.n_columns + 1)
        for source in self._clt.config.sources(target):
            of = layer[nodes] == source
            rows = self._clt.W_dec[source].detach()[feature[nodes[of]], target - source]
            rows = rows / self._clt.out_scale[target] * self.activations[nodes[of], None]
            vectors[position[nodes[of]], slot[of]] = rows
        columns[position[nodes], slot] = nodes
        vectors[:, -2], columns[:, -2] = error, self._error_columns(target)
        vectors[:, -1], columns[:, -1] = decoder_bias(self._clt, target), self.n_columns
        return Place(vectors, columns.to(vectors.device))

    def _error_columns(self, layer: int) -> Tensor:
        start = len(self.features) + layer * self.n_positions
        return torch.arange(start, start + self.n_positions)


def decoder_bias(clt: CrossLayerTranscoder, target: int) -> Float[Tensor, " d_model"]:
    """What a transcoder writes to a layer without any feature, at an input of zero."""
    bias = clt.b_dec.detach()[target]
    if clt.W_skip is not None:
        bias = bias - clt.W_skip[target].detach() @ (clt.in_mean[target] * clt.in_scale[target])
    return bias / clt.out_scale[target] + clt.out_mean[target]
