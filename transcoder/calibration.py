"""A trained BatchTopK as the JumpReLU that keeps as many features, so that no row depends on its batch.

1. Over all given rows together, each layer's k * rows largest pre-activations are found, as in one huge batch.
2. The layer's threshold lies half way between the last that is kept and the first that is not, so the mean number
   of active features on these rows is k exactly, but for pre-activations that are equal or not positive.

Source:
    Bussmann et al. 2024, arXiv:2412.06410, section 3.2, which estimates the threshold as a mean over batches;
    here it is the exact quantile, by layer.
"""

# Axes: layer, batch, d_model, feature

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float
from transcoder.activations import log_of
from transcoder.model import CrossLayerTranscoder


@torch.no_grad()
def calibrated(clt: CrossLayerTranscoder, batches: Sequence[Tensor]) -> CrossLayerTranscoder:
    """The same transcoder with JumpReLU in place of BatchTopK; its tensors are shared.

    Args:
        batches: Inputs [layer batch d_model] of rows that it was not trained on, as the model has them.
    Raises:
        DataError: If its activation is another, or there are no rows.
    """
    if clt.config.activation != "batchtopk":
        raise DataError(
            f"only a batchtopk is calibrated, this transcoder has activation {clt.config.activation}"
        )
    thresholds = layer_thresholds(clt, batches)
    with torch.device("meta"):
        found = CrossLayerTranscoder(replace(clt.config, activation="jumprelu", k=None))
    logs = torch.tensor(
        [log_of(value) for value in thresholds], dtype=clt.b_enc.dtype, device=clt.b_enc.device
    )
    log_threshold = logs[:, None].expand(clt.b_enc.shape).clone()
    found.load_state_dict({**clt.state_dict(), "log_threshold": log_threshold}, assign=True)
    found.requires_grad_(True)
    found.provenance, found.training_sequences = clt.provenance, clt.training_sequences
    return found


def layer_thresholds(clt: CrossLayerTranscoder, batches: Sequence[Tensor]) -> list[float]:
    """The threshold of each layer at which k features are active per row, on average; 0 if fewer are positive.

    Raises:
        DataError: If there are no rows.
    """
    assert clt.config.k is not None
    budget = clt.config.k * sum(x.shape[1] for x in batches)
    if budget == 0:
        raise DataError("calibration needs held-out rows, and there are none; raise held_out_fraction")
    largest = [torch.empty(0, device=clt.b_enc.device)] * clt.config.n_layers
    for x in batches:
        for layer, pre_acts in enumerate(clt.all_pre_acts(x).unbind()):
            merged = torch.cat([largest[layer], pre_acts[pre_acts > 0]])
            largest[layer] = merged.topk(min(budget + 1, len(merged))).values
    return [_edge(values, budget) for values in largest]


def _edge(descending: Float[Tensor, " value"], budget: int) -> float:
    """What the `budget` largest of these values exceed and the next does not."""
    if len(descending) <= budget:
        return 0.0
    last, following = descending[budget - 1 : budget + 1].double().tolist()
    return float(last + following) / 2.0
