"""Which features a prediction depends on.

1. One pass with gradients: the derivative of the target's logit by each MLP output. The first-order effect
   of ablating a feature at a position is minus its activation times its decoders dotted with those.
2. The features ranked highest are ablated for real, one forward pass each, with the model's own errors
   kept (`ReplacementModel.edited`).

A logit here is the log-odds of the target, log(p / (1 - p)): its raw logit minus the log-sum-exp of all
others but the mask. Adding a constant to every raw logit changes no prediction, and does not change this.
"""

# Axes: pos, d_model, feature, layer, target (layers that a source writes to), vocab

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.errors import DataError
from mdlm_interp.hooks import HookPoint
from mdlm_interp.shapes import Float, Int64
from transcoder.evaluation import masked_log_probs
from transcoder.feature_edits import FeatureEdit
from transcoder.interventions.metrics import log_odds
from transcoder.replacement import ReplacementModel


@dataclass(frozen=True)
class FeatureAttribution:
    """A feature active at a position, and what ablating it there should do."""

    layer: int
    feature: int
    position: int
    activation: float
    attribution: float
    """First-order estimate of the change of the target's log-odds."""


@dataclass(frozen=True)
class FeatureEffect(FeatureAttribution):
    """A feature active at a position, and what ablating it there does."""

    logit_change: float
    """Of the target's log-odds, in nats."""
    probability_before: float
    probability_after: float


@dataclass(frozen=True)
class PredictionEffects:
    """The effects on one prediction."""

    position: int
    token: int
    effects: list[FeatureEffect]
    """Largest change of the logit first."""
    top_before: list[tuple[int, float]]
    """Likeliest tokens with their probabilities, as the model has them."""
    top_after: list[tuple[int, float]]
    """The same with the first of `effects` ablated."""


def attribute_features(
    replacement: ReplacementModel,
    input_ids: Int64[Tensor, "1 pos"],
    position: int,
    token: int,
    timesteps: Tensor | None = None,
    *,
    limit: int | None = None,
) -> list[FeatureAttribution]:
    """Active features by first-order effect on a token's log-odds, largest first.

    Args:
        position: Where the token is predicted.
        timesteps: sigma, as the model takes it.
        limit: Return this many; None returns all.
    Raises:
        DataError: If the position or token is not the model's.
    """
    clt = replacement.clt
    _check_target(replacement, input_ids, position, token)
    gradients = _output_gradients(replacement, input_ids, position, token, timesteps)
    rows: list[Tensor] = []
    values: list[Tensor] = []
    with torch.no_grad():
        acts = replacement.feature_acts(input_ids, timesteps)[:, 0]
        for layer in range(clt.config.n_layers):
            targets = clt.config.targets(layer)
            slopes = gradients[targets.start : targets.stop] / clt.target_scale(layer)[:, None, None]
            estimates = -acts[layer] * torch.einsum("tpd,ftd->pf", slopes, clt.W_dec[layer])
            active = (acts[layer] > 0).nonzero()
            rows.append(torch.cat([torch.full_like(active[:, :1], layer), active], 1))
            values.append(estimates[active[:, 0], active[:, 1]])
        order = torch.cat(values).abs().argsort(descending=True, stable=True)[:limit]
        chosen = zip(torch.cat(rows)[order].tolist(), torch.cat(values)[order].tolist(), strict=True)
        return [
            FeatureAttribution(layer, feature, pos, float(acts[layer, pos, feature]), value)
            for (layer, pos, feature), value in chosen
        ]


def feature_effects(
    replacement: ReplacementModel,
    input_ids: Int64[Tensor, "1 pos"],
    position: int,
    token: int,
    timesteps: Tensor | None = None,
    *,
    n_ablations: int = 20,
    n_top: int = 5,
    progress: bool = False,
) -> PredictionEffects:
    """Ablate the features that attribution ranks highest, one at a time.

    Args:
        n_ablations: Features to ablate for real.
        n_top: Likeliest tokens to list before and after.
    Raises:
        DataError: If the position or token is not the model's.
    """
    candidates = attribute_features(replacement, input_ids, position, token, timesteps, limit=n_ablations)
    model = replacement.model
    with torch.no_grad():
        before = model(input_ids, timesteps)[0, position]
        odds = log_odds(0, token)
        effects: list[FeatureEffect] = []
        for candidate in tqdm(candidates, desc="ablate", unit="feature", disable=None if progress else True):
            after = ablated_logits(replacement, input_ids, candidate, timesteps)[0, position]
            effects.append(
                FeatureEffect(
                    **vars(candidate),
                    logit_change=float(odds(after[None, None]) - odds(before[None, None])),
                    probability_before=float(_probabilities(before)[token]),
                    probability_after=float(_probabilities(after)[token]),
                )
            )
        effects.sort(key=lambda effect: -abs(effect.logit_change))
        top_after = (
            _top(ablated_logits(replacement, input_ids, effects[0], timesteps)[0, position], n_top)
            if effects
            else []
        )
        return PredictionEffects(position, token, effects, _top(before, n_top), top_after)


def ablated_logits(
    replacement: ReplacementModel,
    input_ids: Int64[Tensor, "batch pos"],
    feature: FeatureAttribution,
    timesteps: Tensor | None = None,
) -> Float[Tensor, "batch pos vocab"]:
    """Raw logits with one feature ablated at its position."""
    with replacement.edited([FeatureEdit(feature.layer, feature.feature, (feature.position,))]):
        logits: Tensor = replacement.model(input_ids, timesteps)
    return logits


def _output_gradients(
    replacement: ReplacementModel, input_ids: Tensor, position: int, token: int, timesteps: Tensor | None
) -> Float[Tensor, "layer pos d_model"]:
    """Derivative of the target's log-odds by what each MLP adds to the residual stream."""
    names = replacement.clt.config.output_hooks
    added: dict[str, Tensor] = {}

    def add_zero(tensor: Tensor, hook: HookPoint) -> Tensor:
        added[hook.name] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + added[hook.name]

    with torch.enable_grad(), replacement.model.hooks(dict.fromkeys(names, add_zero)):
        logits = replacement.model(input_ids, timesteps)
        gradients = torch.autograd.grad(
            log_odds(position, token)(logits).sum(), [added[name] for name in names]
        )
    return torch.stack([gradient[0] for gradient in gradients])


def _check_target(replacement: ReplacementModel, input_ids: Tensor, position: int, token: int) -> None:
    mask_id = replacement.model.config.mask_id
    if not 0 <= position < input_ids.shape[1]:
        raise DataError(f"position must be in [0, {input_ids.shape[1]}), got {position}")
    if not 0 <= token < mask_id:
        raise DataError(f"token must be in [0, {mask_id}), which leaves out the mask, got {token}")


def _probabilities(logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    return masked_log_probs(logits[None], logits.shape[-1] - 1)[0].exp()


def _top(logits: Float[Tensor, " vocab"], count: int) -> list[tuple[int, float]]:
    found = _probabilities(logits).topk(count)
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
