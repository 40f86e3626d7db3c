"""crosslayer-coding's normalisation of rows, folded into the weights.

cfg.json says how rows were normalised: not at all, times sqrt(d), or by mean and standard deviation of every dimension,
which norm_stats.json has, a file that is beside its activations and not part of its checkpoint.

Source:
    curt-tigges/crosslayer-coding, July 2025, as decode-clt 0.0.1: training/data/manifest_activation_store.py.
"""

# Axes: layer, feature, d_model

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.errors import CheckpointError
from transcoder.checkpoint import read_json
from transcoder.folded import FoldedWeights

CONFIG, STATISTICS = "cfg.json", "norm_stats.json"
STD_EPS = 1e-6
"""Added to the standard deviations of norm_stats.json."""


def denormalised(weights: FoldedWeights, directory: Path, method: str) -> tuple[FoldedWeights, list[str]]:
    """The same transcoder of raw activations, and what to tell about that.

    Args:
        directory: Has cfg.json, and norm_stats.json if the method needs it.
        method: normalization_method in cfg.json.
    Raises:
        CheckpointError: If the method is unknown, or its statistics are missing or damaged.
    """
    if method == "none":
        return weights, []
    n_layers, _, d_model = weights.W_enc.shape
    if method == "sqrt_d_model":
        # Inputs and targets both times sqrt(d), without centring.
        root = torch.full((n_layers, d_model), 1.0 / math.sqrt(d_model), dtype=torch.float64)
        zero = torch.zeros_like(root)
        moments = {"inputs": (zero, root), "targets": (zero, root)}
    elif method == "mean_std":
        path = directory / STATISTICS
        if not path.is_file():
            raise CheckpointError(
                f"{directory / CONFIG} says that rows were normalised by mean and std, and {STATISTICS} is not "
                f"there; copy it from the activations that it was trained on"
            )
        moments = _moments(path, n_layers, d_model)
    else:
        raise CheckpointError(
            f"normalization_method in {directory / CONFIG} is {method!r}, known: none, mean_std, sqrt_d_model"
        )
    (in_mean, in_std), (out_mean, out_std) = moments["inputs"], moments["targets"]
    W_enc = weights.W_enc / in_std[:, None]
    skip, b_dec = weights.W_skip, weights.b_dec * out_std + out_mean
    if skip is not None:
        skip = skip * out_std[..., None] / in_std[:, None]
        b_dec = b_dec - torch.einsum("loi,li->lo", skip, in_mean)
    changed = replace(
        weights,
        W_enc=W_enc,
        b_enc=weights.b_enc - torch.einsum("lfd,ld->lf", W_enc, in_mean),
        W_dec=[
            weight * out_std[source : source + weight.shape[1]] for source, weight in enumerate(weights.W_dec)
        ],
        b_dec=b_dec,
        W_skip=skip,
    )
    return changed, [f"its normalisation ({method}) is folded into the weights"]


def _moments(path: Path, n_layers: int, d_model: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and std [layer d_model] of inputs and targets."""
    stored = read_json(path)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for side in ("inputs", "targets"):
        rows: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for layer in range(n_layers):
            for kind, of_layers in rows.items():
                of_layers.append(_vector(path, stored, (str(layer), side, kind), d_model))
        found[side] = torch.stack(rows["mean"]), torch.stack(rows["std"]) + STD_EPS
    return found


def _vector(path: Path, stored: dict[str, Any], keys: tuple[str, ...], d_model: int) -> Tensor:
    value: Any = stored
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    vector = torch.tensor(value if numbers else [], dtype=torch.float64)
    bad = vector.shape != (d_model,) or not bool(torch.isfinite(vector).all())
    if bad or (keys[-1] == "std" and bool((vector < 0).any())):
        raise CheckpointError(f"{'.'.join(keys)} in {path} must be {d_model} finite numbers, std from 0")
    return vector
