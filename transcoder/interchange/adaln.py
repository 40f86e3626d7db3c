"""The constant adaLN of a model without time conditioning, folded into a transcoder.

A block computes

    mlp.hook_in  = ln2.hook_normalized * (1 + scale) + shift
    hook_mlp_out = mlp.hook_out * gate

With time conditioning off, the conditioning is that of sigma 0 for every input, so shift, scale and gate are
constants of the layer and both lines are affine maps of each dimension:

    input:  W_enc' = W_enc (1 + scale),  b_enc' = b_enc + W_enc shift,  W_skip' and b_dec' likewise
    output: W_dec[s -> t]' = W_dec[s -> t] / gate[t],  b_dec' and W_skip' likewise

so the features stay the same, and the reconstruction times the gate is the reconstruction before.

Source:
    kuleshov-group/mdlm, models/dit.py at commit c112c526 (DDiTBlock, and sigma in DIT.forward).
"""

# Axes: layer, d_model, feature

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float64
from transcoder.interchange.form import Form

Fold: TypeAlias = Literal["none", "input", "output", "both"]

MODULATED, NORMALISED = "blocks.{layer}.mlp.hook_in", "blocks.{layer}.ln2.hook_normalized"
GATED, UNGATED = "blocks.{layer}.hook_mlp_out", "blocks.{layer}.mlp.hook_out"


@dataclass(frozen=True)
class Modulation:
    """What adaLN does around the MLPs of a model."""

    shift: Float64[Tensor, "layer d_model"]
    scale: Float64[Tensor, "layer d_model"]
    gate: Float64[Tensor, "layer d_model"]


@torch.no_grad()
def constant_modulation(source: HookedMDLM | str | Path) -> Modulation:
    """A model's, computed in float64 from its weights.

    Raises:
        DataError: If it has time conditioning, so that there are no such constants.
    """
    if isinstance(source, HookedMDLM):
        model = copy.deepcopy(source).to("cpu", torch.float64)
    else:
        model = HookedMDLM.from_pretrained(source, dtype=torch.float64)
    if model.config.time_conditioning:
        raise DataError(
            "adaLN can be folded in only where it is constant, and this model has time_conditioning: its shift, "
            "scale and gate change with the noise level; export with fold none, whose hook points are inside "
            "the modulation"
        )
    parts = [
        f"blocks.{layer}.adaln.hook_{part}_mlp" for layer in range(model.config.n_blocks) for part in PARTS
    ]
    _, cache = model.run_with_cache(torch.zeros(1, 1, dtype=torch.int64), parts)
    found = torch.stack([cache[name][0, 0] for name in parts]).view(-1, len(PARTS), model.config.hidden_dim)
    return Modulation(*found.unbind(1))


PARTS = ("shift", "scale", "gate")


def folded(form: Form, modulation: Modulation, fold: Fold) -> Form:
    """The same features and reconstruction, read and written outside the modulation.

    Args:
        fold: Which side: the input is then the plain norm, the output the MLP's before its gate.
    Raises:
        DataError: If the transcoder has other hook points, or a gate is zero.
    """
    if fold in ("input", "both"):
        form = _with_input(form, modulation)
    if fold in ("output", "both"):
        form = _with_output(form, modulation)
    return form


def _with_input(form: Form, modulation: Modulation) -> Form:
    _require_hook(form.config.input_hook, MODULATED, "input")
    weights, scale = form.weights, 1.0 + modulation.scale
    b_enc = weights.b_enc + torch.einsum("lfd,ld->lf", weights.W_enc, modulation.shift)
    b_dec, skip = weights.b_dec, weights.W_skip
    if skip is not None:
        b_dec = b_dec + torch.einsum("loi,li->lo", skip, modulation.shift)
        skip = skip * scale[:, None]
    W_enc = weights.W_enc * scale[:, None]
    changed = replace(weights, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec, W_skip=skip)
    return Form(replace(form.config, input_hook=NORMALISED), changed)


def _with_output(form: Form, modulation: Modulation) -> Form:
    _require_hook(form.config.output_hook, GATED, "output")
    weights, gate = form.weights, modulation.gate
    zeros = int((gate == 0).sum())
    if zeros:
        raise DataError(
            f"{zeros} of {gate.numel()} adaLN gates are zero, so what the MLP writes there is lost and cannot be "
            f"reconstructed before the gate; export with fold input or none"
        )
    W_dec = [weight / gate[source : source + weight.shape[1]] for source, weight in enumerate(weights.W_dec)]
    skip = None if weights.W_skip is None else weights.W_skip / gate[..., None]
    changed = replace(weights, W_dec=W_dec, b_dec=weights.b_dec / gate, W_skip=skip)
    return Form(replace(form.config, output_hook=UNGATED), changed)


def _require_hook(hook: str, needed: str, side: str) -> None:
    if hook != needed:
        raise DataError(
            f"only {needed} has the adaLN in it that fold {side} takes out, this transcoder's {side} is {hook}; "
            f"export with fold none"
        )
