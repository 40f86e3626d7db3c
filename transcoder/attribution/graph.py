"""The attribution graph of one masked state: a plain dataclass.

Nodes are numbered features, then error terms (layer by layer, each by position), then embeddings (by position), then
logits. An edge is the direct effect of its source on its target's value, in the target's unit; edges and constants of
a target add up to its value:

    value[target] = sum over sources of edges[target, source] + sum of constants[target]

The value of a feature is its pre-activation, which an active feature passes on unchanged; that of a logit is the
centred logit that `targets.Centre` names. Error terms and embeddings are sources only.
"""

# Axes: node (target, then source), feature (node), logit (node), pos, constant

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float, Float64, Int64
from transcoder.attribution.targets import Centre

NodeKind: TypeAlias = Literal["feature", "error", "embedding", "logit"]

CONSTANTS = ("encoder", "adaln", "decoder", "left_out")
"""What adds to a target beside its edges: its own bias; shifts of adaLN on the way; the decoders' biases on the way;
and features that `max_features` left out of the graph."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Direct effects between everything in one state that its predictions at some masked positions depend on."""

    input_ids: Int64[Tensor, " pos"]
    """The state."""
    mask_id: int
    """Which token is the mask."""
    sigma: float | None
    """What the model was told of the noise; None for a model that is told nothing."""
    n_layers: int
    """Of the model."""
    features: Int64[Tensor, "feature 3"]
    """Layer, position and number of each active feature, in this order."""
    activations: Float[Tensor, " feature"]
    """Of the features."""
    logits: Int64[Tensor, "logit 2"]
    """Position and token."""
    probabilities: Float64[Tensor, " logit"]
    """Of the tokens, the mask left out."""
    values: Float[Tensor, " logit"]
    """The centred logits."""
    edges: Float[Tensor, "node node"]
    """Direct effect of each source (second axis) on each target (first)."""
    constants: Float[Tensor, "node constant"]
    """What else adds to each target; see CONSTANTS."""
    centre: Centre
    """What the logits are centred by."""
    about: dict[str, Any] = field(default_factory=dict)
    """How the graph was made, as plain values."""

    def __post_init__(self) -> None:
        n_nodes = self.logit_start + len(self.logits)
        if self.edges.shape != (n_nodes, n_nodes) or self.constants.shape != (n_nodes, len(CONSTANTS)):
            raise DataError(
                f"a graph of {n_nodes} nodes has edges [{n_nodes}, {n_nodes}] and constants [{n_nodes}, "
                f"{len(CONSTANTS)}], got {list(self.edges.shape)} and {list(self.constants.shape)}; build it again"
            )

    @property
    def n_positions(self) -> int:
        """Length of the state."""
        return len(self.input_ids)

    @property
    def n_features(self) -> int:
        """Feature nodes; they come first."""
        return len(self.features)

    @property
    def n_nodes(self) -> int:
        """All nodes."""
        return len(self.edges)

    @property
    def embedding_start(self) -> int:
        """Number of the first embedding node; error nodes stand between features and it."""
        return self.n_features + self.n_layers * self.n_positions

    @property
    def logit_start(self) -> int:
        """Number of the first logit node."""
        return self.embedding_start + self.n_positions

    def error_node(self, layer: int, position: int) -> int:
        """Number of an error term's node."""
        return self.n_features + layer * self.n_positions + position

    def embedding_node(self, position: int) -> int:
        """Number of a token embedding's node."""
        return self.embedding_start + position

    def feature_node(self, layer: int, position: int, feature: int) -> int:
        """Number of a feature's node.

        Raises:
            DataError: If it is not active there, or was left out of the graph.
        """
        wanted = torch.tensor([layer, position, feature])
        found = (self.features == wanted).all(1).nonzero()
        if not len(found):
            raise DataError(
                f"feature {feature} of layer {layer} is no node at position {position}: it is not active "
                f"there, or max_features left it out; graph.features lists the nodes"
            )
        return int(found[0, 0])

    def kind(self, node: int) -> NodeKind:
        """What a node is.

        Raises:
            DataError: If there is no such node.
        """
        if not 0 <= node < self.n_nodes:
            raise DataError(f"node must be in [0, {self.n_nodes}), got {node}; graph.n_nodes says how many")
        if node < self.n_features:
            return "feature"
        if node < self.embedding_start:
            return "error"
        return "embedding" if node < self.logit_start else "logit"

    def place(self, node: int) -> tuple[int, int]:
        """Layer and position of a node; an embedding is in layer -1, a logit behind the last."""
        kind = self.kind(node)
        if kind == "feature":
            layer, position = self.features[node, :2].tolist()
        elif kind == "error":
            layer, position = divmod(node - self.n_features, self.n_positions)
        elif kind == "embedding":
            layer, position = -1, node - self.embedding_start
        else:
            layer, position = self.n_layers, int(self.logits[node - self.logit_start, 0])
        return layer, position

    def name(self, node: int) -> str:
        """A node in words."""
        kind, (layer, position) = self.kind(node), self.place(node)
        if kind == "feature":
            return f"feature {layer}/{int(self.features[node, 2])} at {position}"
        if kind == "error":
            return f"error of layer {layer} at {position}"
        if kind == "embedding":
            return f"token {int(self.input_ids[position])} at {position}"
        return f"logit of {int(self.logits[node - self.logit_start, 1])} at {position}"

    @property
    def target_values(self) -> Float[Tensor, " node"]:
        """The value of each node that has one, features and logits; zero for the others."""
        between = self.logit_start - self.n_features
        return torch.cat([self.activations, self.activations.new_zeros(between), self.values])

    @property
    def residuals(self) -> Float[Tensor, " node"]:
        """What edges and constants miss of each target's value: rounding, and nothing else."""
        return self.target_values - self.edges.sum(1) - self.constants.sum(1)

    def save(self, directory: str | Path) -> None:
        """Write graph.safetensors and graph.json; see `storage.save_graph`."""
        from transcoder.attribution.storage import save_graph

        save_graph(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Graph:
        """Read what `save` wrote; see `storage.load_graph`."""
        from transcoder.attribution.storage import load_graph

        return load_graph(directory)
