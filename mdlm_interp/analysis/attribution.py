"""Direct logit attribution: what the embedding, each head and each MLP add to a logit, through the adaLN gates.

The last residual stream is a sum: embedding + gated attention outputs + gated MLP outputs. With the final LayerNorm's
scale s frozen at what it is in this pass, the output layer is linear in it:

    logit = sum over components c of  s (c - mean c) . (weight (1 + scale_final) u)  +  shift_final . u  +  bias

where u is the token's row of the unembedding. The last two terms are the constant. In exact arithmetic the sum is the
logit; here it is computed in float64 from the activations as the model has them.
"""

# Axes: place (a position of a sequence of the batch), component, head, d, vocab

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from mdlm_interp.analysis.replay import check_pair, check_still, chosen, need_filled, replay
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError, nearest
from mdlm_interp.hooks import ActivationCache
from mdlm_interp.layers import Block
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float64, Int64

Against = Literal["nothing", "mean"]
"""What a logit is relative to: itself alone, or the mean over the vocabulary without the mask (softmax knows only
differences, so a part that all logits share says nothing)."""

AGAINST: tuple[Against, ...] = ("nothing", "mean")


@dataclass(frozen=True, kw_only=True)
class LogitAttribution:
    """Contributions to the logits of chosen tokens at chosen places."""

    components: tuple[str, ...]
    step: Int64[Tensor, " place"]
    """Of the trajectory; -1 for tokens that are not of one."""
    row: Int64[Tensor, " place"]
    position: Int64[Tensor, " place"]
    token: Int64[Tensor, " place"]
    against: Against
    contributions: Float64[Tensor, "place component"]
    constant: Float64[Tensor, " place"]
    """Of the final shift and the bias, which no activation changes."""
    logit: Float64[Tensor, " place"]
    """The model's own, as its forward pass gave it."""

    @property
    def error(self) -> Float64[Tensor, " place"]:
        """The model's logit minus the sum of the parts: rounding."""
        return self.logit - self.contributions.sum(1) - self.constant

    def table(self) -> list[dict[str, Any]]:
        """A mapping for each place and component, the constant among them."""
        found = []
        for place in range(len(self.token)):
            about = {
                "step": int(self.step[place]),
                "row": int(self.row[place]),
                "position": int(self.position[place]),
                "token": int(self.token[place]),
            }
            values = [*self.contributions[place].tolist(), float(self.constant[place])]
            for component, value in zip((*self.components, "constant"), values, strict=True):
                found.append({**about, "component": component, "contribution": value})
        return found

    def summary(self) -> list[dict[str, Any]]:
        """By component: mean and standard deviation of the contribution over places."""
        parts = torch.cat([self.contributions, self.constant[:, None]], 1)
        means, spread = parts.mean(0), parts.std(0, correction=0)
        return [
            {"component": name, "mean": float(means[i]), "std": float(spread[i])}
            for i, name in enumerate((*self.components, "constant"))
        ]


def attribute_logits(
    model: HookedMDLM,
    input_ids: Int64[Tensor, "batch pos"],
    timesteps: Tensor | None,
    places: Int64[Tensor, "place 2"],
    tokens: Int64[Tensor, " place"],
    *,
    heads: bool = False,
    against: Against = "nothing",
) -> LogitAttribution:
    """Contributions to the logits of some tokens, each at a (sequence, position) of the batch.

    Args:
        timesteps: sigma, as the model takes it.
        heads: Tell the heads of each attention apart.
    Raises:
        DataError: If a place or a token does not exist.
    """
    _check(model, input_ids, places, tokens)
    check_still(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(
            input_ids, _hooks(model, heads), timesteps=timesteps, clone=False
        )
    return _from_cache(model, logits, cache, places, tokens, heads=heads, against=against)


def attribute_commits(
    model: HookedMDLM,
    trajectory: Trajectory,
    *,
    rows: Sequence[int] | None = None,
    heads: bool = False,
    against: Against = "mean",
) -> LogitAttribution:
    """Contributions to the logit of every token that the trajectory committed, in the state it was drawn from.

    Raises:
        DataError: If a row is outside the trajectory, nothing was filled, or the model is not the one sampled from.
    """
    check_pair(model, trajectory)
    at_rows = chosen("rows", rows, trajectory.states.shape[1])
    commit = trajectory.revealed_at[list(at_rows)].masked_fill(~need_filled(trajectory, at_rows), -1)
    found: list[LogitAttribution] = []
    steps = sorted(set(commit[commit >= 0].tolist()))
    for seen in replay(model, trajectory, steps=steps, rows=at_rows, hooks=_hooks(model, heads)):
        places = (commit == seen.step).nonzero()
        tokens = trajectory.final[list(at_rows)][places[:, 0], places[:, 1]]
        cache = ActivationCache(seen.cache)
        one = _from_cache(model, seen.logits, cache, places, tokens, heads=heads, against=against)
        named = torch.tensor(at_rows)[places[:, 0]]
        found.append(_changed(one, row=named, step=torch.full_like(named, seen.step)))
    return _joined(found)


def _hooks(model: HookedMDLM, heads: bool) -> list[str]:
    per_block = ["hook_mlp_out", *(("attn.hook_z", "adaln.hook_gate_attn") if heads else ("hook_attn_out",))]
    blocks = [f"blocks.{i}.{name}" for i in range(model.config.n_blocks) for name in per_block]
    return ["blocks.0.hook_resid_pre", *blocks, "adaln_final.*", "ln_final.hook_scale"]


def _from_cache(
    model: HookedMDLM,
    logits: Tensor,
    cache: ActivationCache,
    places: Tensor,
    tokens: Tensor,
    *,
    heads: bool,
    against: Against,
) -> LogitAttribution:
    batch, pos = places.to(model.device).T
    layer = model.backbone.output_layer
    weight, bias = _relative(model, layer.linear.weight, tokens.to(model.device), against)
    shift, scale = (cache[f"adaln_final.hook_{part}"].double()[batch, 0] for part in ("shift", "scale"))
    frozen = cache["ln_final.hook_scale"].double()[batch, pos]
    direction = frozen * layer.norm_final.weight.detach().double() * (1 + scale) * weight
    # The norm takes each component's mean away; as well it can be taken from the direction.
    direction = direction - direction.mean(1, keepdim=True)
    names, parts = ["embedding"], [_dot(cache["blocks.0.hook_resid_pre"][batch, pos], direction)[:, None]]
    for i in range(model.config.n_blocks):
        if heads:
            parts.append(_heads(model, cache, i, batch, pos, direction))
            names += [f"attn {i} head {head}" for head in range(model.config.n_heads)]
        else:
            parts.append(_dot(cache[f"blocks.{i}.hook_attn_out"][batch, pos], direction)[:, None])
            names.append(f"attn {i}")
        parts.append(_dot(cache[f"blocks.{i}.hook_mlp_out"][batch, pos], direction)[:, None])
        names.append(f"mlp {i}")
    own = logits[batch, pos].double()
    logit = own.gather(1, tokens.to(own.device)[:, None])[:, 0]
    if against == "mean":
        logit = logit - own[:, : model.config.mask_id].mean(1)
    return LogitAttribution(
        components=tuple(names),
        step=torch.full_like(tokens, -1),
        row=places[:, 0],
        position=places[:, 1],
        token=tokens,
        against=against,
        contributions=torch.cat(parts, 1).cpu(),
        constant=(_dot(shift, weight) + bias).cpu(),
        logit=logit.cpu(),
    )


def _relative(model: HookedMDLM, weight: Tensor, tokens: Tensor, against: Against) -> tuple[Tensor, Tensor]:
    """Rows [place d] of the unembedding and biases [place] in float64, relative to what was asked for."""
    if against not in AGAINST:
        raise DataError(f"against must be nothing or mean, got {against!r}{nearest(against, AGAINST)}")
    bias = model.backbone.output_layer.linear.bias
    assert bias is not None
    rows, own = weight[tokens].double(), bias[tokens].double()
    if against == "mean":
        mask_id = model.config.mask_id  # the last token
        rows, own = rows - weight[:mask_id].double().mean(0), own - bias[:mask_id].double().mean()
    return rows.detach(), own.detach()


def _dot(a: Tensor, b: Tensor) -> Float64[Tensor, "*rows"]:
    return (a.double() * b).sum(-1)


def _heads(
    model: HookedMDLM, cache: ActivationCache, block: int, batch: Tensor, pos: Tensor, direction: Tensor
) -> Float64[Tensor, "place head"]:
    """The output projection has no bias, so an attention's output is the sum of its heads'."""
    gate = cache[f"blocks.{block}.adaln.hook_gate_attn"].double()[batch, 0]
    layer = model.backbone.blocks[block]
    assert isinstance(layer, Block)
    projection = layer.attn_out.weight.detach().double()
    read = (gate * direction) @ projection
    z = cache[f"blocks.{block}.attn.hook_z"].double()[batch, pos]
    return _dot(z, read.reshape(z.shape))


def _check(model: HookedMDLM, input_ids: Tensor, places: Tensor, tokens: Tensor) -> None:
    if len(places) != len(tokens) or not len(places):
        raise DataError(f"each place has one token, got {len(places)} places and {len(tokens)} tokens")
    limits = (
        ("places' sequences", places[:, 0], input_ids.shape[0]),
        ("places' positions", places[:, 1], input_ids.shape[1]),
        ("tokens", tokens, model.config.vocab_size),
    )
    for name, values, end in limits:
        wrong = values[(values < 0) | (values >= end)]
        if len(wrong):
            raise DataError(f"{name} must be in [0, {end}), got {int(wrong[0])}")


def _changed(one: LogitAttribution, **values: Any) -> LogitAttribution:
    return LogitAttribution(**{each.name: getattr(one, each.name) for each in fields(one)} | values)


def _joined(parts: Sequence[LogitAttribution]) -> LogitAttribution:
    tensors = ("step", "row", "position", "token", "contributions", "constant", "logit")
    return _changed(parts[0], **{name: torch.cat([getattr(one, name) for one in parts]) for name in tensors})
