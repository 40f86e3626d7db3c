"""How far two forms of one transcoder may be apart, derived, and how far they are.

The written form is the exact one with each value rounded to float32 (u = 2^-24) once, and a threshold once more for
its logarithm. Evaluated in float64, with g the rounding of its sums, element by element and row by row:

    |dh|     <= (u + g) (|x| |W_enc|^T + |b_enc|)
    |da|     <= |dh|, or |h| + |dh| where the activation function may decide otherwise: |h - theta| <= |dh| + |dtheta|
                with |dtheta| <= u theta (|log theta| + 4); for topk, a value that the bounds let cross the k-th
    |dy[t]|  <= sum over s of (|da[s]| (1 + u) + (u + g) |a[s]|) |W_dec[s -> t]| + (u + g) (|b_dec| + |x| |W_skip|^T)

plus, everywhere, what float32 loses below its normal range. The measured difference has to be within the bound at
every element, so a file with a transposed, swapped or half-precision tensor has no certificate.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mdlm_interp.errors import CheckpointError
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Bool, Float64
from transcoder.interchange.form import LOG_TINY, Form
from transcoder.model import CrossLayerTranscoder

UNIT = 2.0**-24
"""Relative rounding error of float32."""

UNIT_64 = 2.0**-53
TINY = 2.0**-126
"""What is smaller than this may be lost entirely."""


@dataclass(frozen=True)
class Agreement:
    """The largest differences of one kind of output."""

    error: float
    """Largest absolute difference."""
    bound: float
    """Largest bound."""
    share: float
    """Largest difference as a share of the bound at the same element; at most 1."""
    rms: float
    """Root mean square of the output itself, to compare with."""


@dataclass(frozen=True)
class Certificate:
    """That two forms agree within the bound, and how closely."""

    rows: int
    rows_of: str
    """Where the rows come from."""
    features: Agreement
    reconstruction: Agreement
    undecided: int
    """Feature activations, of all, so close to their threshold that rounding could switch them."""
    activations: int
    """Feature activations looked at."""

    def mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        found = []
        for name, agreement in (("features", self.features), ("reconstruction", self.reconstruction)):
            found.append(
                f"{name}: differ by at most {agreement.error:.2g} (bound {agreement.bound:.2g}, at most "
                f"{100 * agreement.share:.0f} % of it used; rms {agreement.rms:.2g})"
            )
        found.append(
            f"on {self.rows} rows per layer {self.rows_of}; {self.undecided} of {self.activations:,} activations "
            f"lie so close to their threshold that rounding could switch them"
        )
        return found


def probe_rows(
    clt: CrossLayerTranscoder, count: int = 64, seed: int = 0
) -> Float64[Tensor, "layer batch d_model"]:
    """Rows with the mean and the spread that the transcoder's inputs have: a pure function of the seed."""
    shape = (clt.config.n_layers, count, clt.config.d_model)
    size = clt.config.d_model * count
    drawn = [torch.from_numpy(uniforms(seed, "interchange:probe", layer, size)) for layer in range(shape[0])]
    unit = 3.0**0.5 * (2.0 * torch.stack(drawn).view(shape) - 1.0)
    rows: Tensor = clt.in_mean.cpu().double()[:, None] + unit / clt.in_scale.cpu().double()[:, None, None]
    return rows


@torch.no_grad()
def certify(exact: Form, found: Form, x: Float64[Tensor, "layer batch d_model"], rows_of: str) -> Certificate:
    """Compare two forms on some rows.

    Args:
        exact: Before rounding.
        found: After, as read back.
        x: Inputs at the forms' own hook points.
        rows_of: Where they come from, for the reader.
    Raises:
        CheckpointError: If they are further apart somewhere than rounding allows.
    """
    h = exact.pre_acts(x)
    acts, found_acts = exact.activate(h), found.activate(found.pre_acts(x))
    acts_bound, undecided = _acts_bound(exact, x, h, acts)
    y, found_y = exact.decode(acts, x), found.decode(found_acts, x)
    y_bound = _output_bound(exact, x, acts, acts_bound)
    return Certificate(
        rows=x.shape[1],
        rows_of=rows_of,
        features=_agreement(acts, found_acts, acts_bound, "feature activations"),
        reconstruction=_agreement(y, found_y, y_bound, "reconstructions"),
        undecided=int(undecided.sum()),
        activations=acts.numel(),
    )


def _acts_bound(
    form: Form,
    x: Float64[Tensor, "layer batch d_model"],
    h: Float64[Tensor, "layer batch feature"],
    acts: Float64[Tensor, "layer batch feature"],
) -> tuple[Float64[Tensor, "layer batch feature"], Bool[Tensor, "layer batch feature"]]:
    weights, config = form.weights, form.config
    size = torch.baddbmm(weights.b_enc.abs()[:, None], x.abs(), weights.W_enc.abs().mT)
    rounding = UNIT + 4 * (config.d_model + 2) * UNIT_64
    by_h = rounding * size + TINY * (1.0 + x.abs().sum(-1, keepdim=True))
    if config.activation == "topk":
        assert config.k is not None
        kept, undecided = _topk_decided(h, by_h, config.k)
        bound = torch.where(kept, by_h, 0.0)
    elif weights.threshold is None:
        undecided, bound = torch.zeros_like(h, dtype=torch.bool), by_h
    else:
        theta = weights.threshold.clamp(min=LOG_TINY)
        by_theta = UNIT * theta * (theta.log().abs() + 4.0) * 1.01 + TINY
        undecided = (h - weights.threshold[:, None]).abs() <= by_h + by_theta[:, None]
        bound = torch.where(acts != 0, by_h, 0.0)
    return torch.where(undecided, h.abs() + by_h, bound), undecided


def _topk_decided(
    h: Float64[Tensor, "layer batch feature"], by_h: Float64[Tensor, "layer batch feature"], k: int
) -> tuple[Bool[Tensor, "layer batch feature"], Bool[Tensor, "layer batch feature"]]:
    """Which values are among the k largest, and which of all could be on the other side of the k-th."""
    if k >= h.shape[-1]:
        return torch.ones_like(h, dtype=torch.bool), torch.zeros_like(h, dtype=torch.bool)
    highest, lowest = (h + by_h).topk(k + 1, -1).values, (h - by_h).topk(k, -1).values
    # Certainly kept: fewer than k others could exceed it. Certainly not: k others certainly do.
    kept = h - by_h > highest[..., k:]
    dropped = h + by_h < lowest[..., k - 1 :]
    return kept, ~(kept | dropped)


def _output_bound(
    form: Form,
    x: Float64[Tensor, "layer batch d_model"],
    acts: Float64[Tensor, "layer batch feature"],
    by_acts: Float64[Tensor, "layer batch feature"],
) -> Float64[Tensor, "layer batch d_model"]:
    weights, config = form.weights, form.config
    terms = config.n_layers * config.n_features + config.d_model + 2
    rounding = UNIT + 4 * terms * UNIT_64
    constant = weights.b_dec.abs()[:, None].expand_as(x)
    if weights.W_skip is not None:
        constant = constant + x.abs() @ weights.W_skip.abs().mT
    bound = rounding * constant + TINY * (1.0 + x.abs().sum(-1, keepdim=True))
    for source, weight in enumerate(weights.W_dec):
        moved = by_acts[source] * (1.0 + rounding) + rounding * acts[source].abs()
        reached = slice(source, source + weight.shape[1])
        written = (moved @ weight.abs().flatten(1)).view(-1, *weight.shape[1:]).transpose(0, 1)
        bound[reached] += written + TINY * (acts[source].abs() + by_acts[source]).sum(-1)[None, :, None]
    return bound


def _agreement(
    exact: Float64[Tensor, "layer batch size"],
    found: Float64[Tensor, "layer batch size"],
    bound: Float64[Tensor, "layer batch size"],
    name: str,
) -> Agreement:
    if exact.numel() == 0:
        return Agreement(0.0, 0.0, 0.0, 0.0)
    error = (exact - found).abs()
    # Where the bound is zero, so has to be the error.
    share = torch.where(error == 0, 0.0, error / bound)
    worst = int(share.nan_to_num(nan=torch.inf).argmax())
    if not float(share.flatten()[worst]) <= 1.0:
        layer = worst // share[0].numel()
        raise CheckpointError(
            f"{name} of layer {layer} differ by {float(error.flatten()[worst]):.3g} from the original's, rounding "
            f"allows {float(bound.flatten()[worst]):.3g}; the files do not hold this transcoder"
        )
    rms = float(exact.square().mean().sqrt())
    return Agreement(float(error.max()), float(bound.max()), float(share.max()), rms)
