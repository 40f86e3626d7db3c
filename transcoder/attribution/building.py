"""Building an attribution graph: a forward pass, and pullbacks in batches.

1. A linearised pass of the model on the state (`linear_pass.py`) and what every source writes (`sources.py`).
2. The chosen logits (`targets.py`) are pulled back: their direct effects from everything.
3. So are the features: all of them, or, with `max_features`, the most influential ones, ranked again after every few
   batches by the influence that the rows so far give them.

Source:
    Ameisen et al. 2025, Circuit Tracing; circuit-tracer, attribution/attribute_transformerlens.py (the ranking).
"""

# Axes: pos, d_model, node, feature, logit, column (a possible source), target

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.errors import ConfigError
from mdlm_interp.shapes import Float, Int64
from transcoder.attribution.graph import CONSTANTS, Graph
from transcoder.attribution.influence import partial_influence
from transcoder.attribution.linear_pass import LinearPass
from transcoder.attribution.sources import Sources
from transcoder.attribution.targets import ChosenLogits, Targets, choose
from transcoder.replacement import ReplacementModel

BATCHES_A_RANKING = 4
"""Batches that are pulled back before features are ranked again."""


def attribute(
    replacement: ReplacementModel,
    input_ids: Int64[Tensor, "batch pos"],
    timesteps: Tensor | None = None,
    *,
    targets: Targets | None = None,
    max_features: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Graph:
    """The attribution graph of one masked state.

    Args:
        input_ids: One sequence.
        timesteps: sigma [1], as the model takes it.
        targets: The logits to explain; the likeliest at every masked position if none.
        max_features: Keep this many feature nodes, the most influential; all that are active if none. What the
            others add is the constant "left_out".
        batch_size: Pullbacks at once; memory grows with it, nothing else changes but the last bits.
    Raises:
        DataError: If a target is not masked, there is more than one sequence, or the transcoder's hook points leave
            its path nonlinear.
    """
    for name, value in (("max_features", max_features), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    targets = targets or Targets()
    model = replacement.model
    linear = LinearPass(replacement, input_ids, timesteps)
    chosen = choose(targets, linear.logits, input_ids[0].cpu(), model.config.mask_id)
    builder = _Builder(linear, Sources(linear), chosen, batch_size)
    limit = len(builder.sources.features)
    with tqdm(
        total=min(limit, max_features or limit), unit="feature", disable=None if progress else True
    ) as bar:
        for nodes in builder.order(max_features):
            builder.add_features(nodes)
            bar.update(len(nodes))
    return builder.graph(targets, None if timesteps is None else float(timesteps.flatten()[0]))


class _Builder:
    """Rows of the graph as they are found."""

    def __init__(self, linear: LinearPass, sources: Sources, chosen: ChosenLogits, batch_size: int) -> None:
        self.linear, self.sources, self.chosen, self._batch_size = linear, sources, chosen, batch_size
        self._n_layers = linear.clt.config.n_layers
        self._visited = torch.empty(0, dtype=torch.int64)
        self._rows: list[Tensor] = []
        self._constants: list[Tensor] = []
        self._logit_rows, self._logit_constants = self._pull_logits()

    def order(self, max_features: int | None) -> Iterable[Tensor]:
        """Features in batches."""
        n_features = len(self.sources.features)
        if max_features is None or max_features >= n_features:
            return self.by_layer(torch.arange(n_features))
        return _Ranked(self, max_features)

    def by_layer(self, nodes: Tensor) -> list[Tensor]:
        """Batches that can be pulled back at once."""
        layers = self.sources.features[nodes, 0]
        return [
            batch
            for layer in range(self._n_layers)
            for batch in nodes[layers == layer].tensor_split(self._cuts(int((layers == layer).sum())))
            if len(batch)
        ]

    def _cuts(self, count: int) -> list[int]:
        return list(range(self._batch_size, count, self._batch_size))

    def add_features(self, nodes: Int64[Tensor, " target"]) -> None:
        """Pull back features of one layer."""
        sources = self.sources
        layer, positions = int(sources.features[nodes[0], 0]), sources.features[nodes, 1]
        rows, constants = self._pull(layer, positions, sources.encoders(nodes), sources.encoder_biases(nodes))
        self._rows.append(rows)
        self._constants.append(constants)
        self._visited = torch.cat([self._visited, nodes])

    def influence(self) -> Float[Tensor, " column"]:
        """Of each source on the logits, through the features so far."""
        weights = self.chosen.probabilities
        return partial_influence(
            self._logit_rows, weights, torch.cat(self._rows or [self._logit_rows[:0]]), self._visited
        )

    def graph(self, targets: Targets, sigma: float | None) -> Graph:
        """All of it in order."""
        linear, sources, kept = self.linear, self.sources, self._visited.sort().values
        edges, constants = self._matrices(kept)
        return Graph(
            input_ids=linear.input_ids[0].cpu().clone(),
            mask_id=linear.model.config.mask_id,
            sigma=sigma,
            n_layers=self._n_layers,
            features=sources.features[kept],
            activations=sources.activations.cpu()[kept],
            logits=self.chosen.logits,
            probabilities=self.chosen.probabilities,
            values=(self.chosen.weights * linear.logits[self.chosen.logits[:, 0]]).sum(1).cpu(),
            edges=edges,
            constants=constants,
            centre=targets.centre,
            about={
                "connectivity": linear.clt.config.connectivity,
                "active_features": len(sources.features),
                "mass": targets.mass,
                "max_tokens": targets.max_tokens,
                "dtype": str(edges.dtype).removeprefix("torch."),
            },
        )

    def _matrices(
        self, kept: Int64[Tensor, " feature"]
    ) -> tuple[Float[Tensor, "node node"], Float[Tensor, "node constant"]]:
        """Edges and constants of all nodes, where features that are not kept count as constants."""
        n_features, n_all = len(kept), len(self.sources.features)
        n_sources = n_features + self.sources.n_columns - n_all
        n_nodes = n_sources + len(self.chosen.logits)
        rows = torch.cat([*self._rows, self._logit_rows])
        order = torch.cat([self._visited.argsort(), torch.arange(n_features, len(rows))])
        rows, constants = rows[order], torch.cat([*self._constants, self._logit_constants])[order]
        is_kept = torch.ones(self.sources.n_columns, dtype=torch.bool)
        is_kept[:n_all] = False
        is_kept[kept] = True
        constants[:, CONSTANTS.index("left_out")] = rows[:, ~is_kept].sum(1)
        edges, of_nodes = rows.new_zeros(n_nodes, n_nodes), rows.new_zeros(n_nodes, len(CONSTANTS))
        targets = torch.cat([torch.arange(n_features), torch.arange(n_sources, n_nodes)])
        edges[targets, :n_sources] = rows[:, is_kept]
        of_nodes[targets] = constants
        return edges, of_nodes

    def _pull_logits(self) -> tuple[Tensor, Tensor]:
        head, chosen = self.linear.model.backbone.output_layer.linear, self.chosen
        weight = head.weight.detach()
        assert head.bias is not None  # the output layer always has one
        bias = chosen.weights @ head.bias.detach()
        found = [
            self._pull(self._n_layers, chosen.logits[at, 0], chosen.weights[at] @ weight, bias[at])
            for at in torch.arange(len(bias)).tensor_split(self._cuts(len(bias)))
        ]
        rows, constants = zip(*found, strict=True)
        return torch.cat(rows), torch.cat(constants)

    def _pull(
        self, layer: int, positions: Tensor, directions: Tensor, biases: Tensor
    ) -> tuple[Float[Tensor, "target column"], Float[Tensor, "target constant"]]:
        """Direct effects on some targets at one layer, and what is constant in them."""
        rows, decoder = self.sources.direct_effects(*self.linear.pull_back(layer, positions, directions))
        adaln = (directions * self.linear.constant(layer)[positions]).sum(1)
        return rows.cpu(), torch.stack([biases, adaln, decoder, torch.zeros_like(decoder)], 1).cpu()


class _Ranked:
    """Features by influence, as far as it is known when they are asked for."""

    def __init__(self, builder: _Builder, limit: int) -> None:
        self._builder, self._limit = builder, limit

    def __iter__(self) -> Iterator[Tensor]:
        builder, left = self._builder, self._limit
        pending = torch.ones(len(builder.sources.features), dtype=torch.bool)
        while left:
            influence = builder.influence()[: len(pending)].masked_fill(~pending, -1.0)
            count = min(left, BATCHES_A_RANKING * builder._batch_size)
            best = influence.argsort(descending=True, stable=True)[:count]
            pending[best] = False
            left -= len(best)
            yield from builder.by_layer(best)
