"""A graph's claims against real ablations of its features.

Every feature is ablated by itself at its position, through `ReplacementModel.edited`, in one of four models:

    direct    patterns, scales and MLP outputs stay as they were: what is left is the feature's own edge to the logit,
              which this must equal but for rounding
    local     patterns and scales stay, features answer (the local replacement model, error terms added): equals the
              total effect as long as no feature starts or stops being active
    spliced   features answer, and attention and norms too
    model     the model itself: attention, norms and its own MLPs answer

In `model` a feature of a cross-layer transcoder may be taken away twice: what it writes to a later layer, which stands
for what MLPs on the way made of it, and that itself, when these MLPs miss it. `spliced` counts it once.

What is measured is the change of the logit nodes' values.
"""

# Axes: pos, vocab, node (ablated features), logit

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import ActivationCache, HookFunction, HookPoint
from mdlm_interp.shapes import Float64, Int64
from transcoder.attribution.graph import Graph
from transcoder.attribution.influence import total_effects
from transcoder.attribution.linear_pass import FROZEN
from transcoder.attribution.targets import Targets, choose
from transcoder.feature_edits import FeatureEdit
from transcoder.replacement import ReplacementModel

AblationMode: TypeAlias = Literal["direct", "local", "spliced", "model"]
Prediction: TypeAlias = Literal["direct", "total"]


@dataclass(frozen=True)
class Agreement:
    """How a prediction fits what was measured, over all ablated features and logits."""

    correlation: float
    """Pearson's; NaN where either side does not vary."""
    same_sign: float
    """Share of the changes with the predicted sign, of those that are not zero; NaN if all are."""
    count: int
    """Changes compared."""


@dataclass(frozen=True)
class Ablations:
    """Changes of the logit nodes' values, predicted and measured, one column for each ablated feature."""

    mode: AblationMode
    nodes: Int64[Tensor, " node"]
    direct: Float64[Tensor, "logit node"]
    """Minus the edge from the feature to the logit."""
    total: Float64[Tensor, "logit node"]
    """The same with all that goes through other features."""
    measured: Float64[Tensor, "logit node"]

    def agreement(self, prediction: Prediction = "total") -> Agreement:
        """Of one of the predictions with what was measured."""
        predicted = self.direct if prediction == "direct" else self.total
        x, y = predicted.flatten(), self.measured.flatten()
        varies = len(x) > 1 and bool(x.std() > 0) and bool(y.std() > 0)
        correlation = float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if varies else float("nan")
        moved = (x != 0) & (y != 0)
        same = (x.sign() == y.sign())[moved].double().mean()  # NaN of nothing
        return Agreement(correlation, float(same), len(x))


@torch.no_grad()
def ablate(
    replacement: ReplacementModel,
    graph: Graph,
    nodes: Sequence[int] | None = None,
    *,
    limit: int = 40,
    mode: AblationMode = "model",
    progress: bool = False,
) -> Ablations:
    """Ablate features one at a time, one forward pass each.

    Args:
        nodes: Feature nodes; those of the largest total effect on any logit if none.
        limit: How many, if no nodes are named.
    Raises:
        DataError: If a node is no feature, or the graph is of another model.
    """
    total = total_effects(graph)
    if nodes is None:
        sizes = total[:, : graph.n_features].abs().amax(0)
        nodes = sizes.argsort(descending=True, stable=True)[:limit].tolist()
    for node in nodes:
        if graph.kind(node) != "feature":
            raise DataError(f"only features can be ablated, got {graph.name(node)}, node {node}")
    input_ids, timesteps = state_of(graph, replacement)
    weights = _weights(replacement, graph, input_ids, timesteps)
    columns: list[Tensor] = []
    with _held(replacement, input_ids, timesteps, mode):

        def values() -> Tensor:
            logits: Tensor = replacement.model(input_ids, timesteps)[0, graph.logits[:, 0]]
            return (logits.double() * weights).sum(1).cpu()

        before = values()
        for node in tqdm(nodes, desc="ablate", unit="feature", disable=None if progress else True):
            layer, position, feature = graph.features[node].tolist()
            with replacement.edited([FeatureEdit(layer, feature, (position,))]):
                columns.append(values() - before)
    chosen = torch.tensor(list(nodes), dtype=torch.int64)
    measured = torch.stack(columns, 1) if columns else torch.empty(len(before), 0, dtype=torch.float64)
    direct = -graph.edges[graph.logit_start :][:, chosen].cpu().double()
    return Ablations(mode, chosen, direct, -total[:, chosen], measured)


def state_of(graph: Graph, replacement: ReplacementModel) -> tuple[Int64[Tensor, "1 pos"], Tensor | None]:
    """Tokens and sigma of a graph, as its model takes them.

    Raises:
        DataError: If the model has another vocabulary or number of layers.
    """
    config = replacement.model.config
    if (graph.mask_id, graph.n_layers) != (config.mask_id, config.n_blocks):
        raise DataError(
            f"the graph is of a model of {graph.n_layers} layers with mask {graph.mask_id}, this one has "
            f"{config.n_blocks} and {config.mask_id}; give the model that the graph was made with"
        )
    sigma = None if graph.sigma is None else torch.tensor([graph.sigma], dtype=torch.float64)
    if sigma is not None and replacement.model.dtype != torch.float64:
        sigma = sigma.float()
    device = replacement.model.device
    return graph.input_ids[None].to(device), None if sigma is None else sigma.to(device)


def _weights(
    replacement: ReplacementModel, graph: Graph, input_ids: Tensor, timesteps: Tensor | None
) -> Float64[Tensor, "logit vocab"]:
    """The linear combinations of logits that the logit nodes stand for."""
    tokens: dict[int, list[int]] = {}
    for position, token in graph.logits.tolist():
        tokens.setdefault(position, []).append(token)
    logits = replacement.model(input_ids, timesteps)[0].double()
    targets = Targets(tokens=tokens, centre=graph.centre)
    return choose(targets, logits, graph.input_ids, graph.mask_id).weights


@contextmanager
def _held(
    replacement: ReplacementModel, input_ids: Tensor, timesteps: Tensor | None, mode: AblationMode
) -> Iterator[None]:
    """Keep what a mode keeps as it is on this state."""
    model, outputs = replacement.model, list(replacement.clt.config.output_hooks)
    with ExitStack() as stack:
        if mode in ("direct", "local"):
            _, cache = model.run_with_cache(input_ids, [*FROZEN, *outputs], timesteps=timesteps)
            stack.enter_context(model.hooks(dict.fromkeys(FROZEN, _from(cache))))
            if mode == "direct":
                stack.enter_context(model.hooks(dict.fromkeys(outputs, _from(cache))))
        if mode in ("local", "spliced"):
            stack.enter_context(replacement.spliced(errors=replacement.error_terms(input_ids, timesteps)))
        yield


def _from(cache: ActivationCache) -> HookFunction:
    def keep(tensor: Tensor, hook: HookPoint) -> Tensor:
        return cache[hook.name]

    return keep
