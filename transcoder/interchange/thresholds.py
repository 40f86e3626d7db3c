"""A topk as a jumprelu, for tools that have no topk: another function, as close as thresholds can be.

Each layer gets the one threshold at which k features are active per row on average over held-out rows. A row keeps
what is above it, however many, so rows with many strong features keep more than k and others fewer.
"""

# Axes: layer, batch, d_model

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Float
from transcoder.activations import batch_topk_mask, topk_mask
from transcoder.calibration import calibrated
from transcoder.data import RowStore
from transcoder.held_out import held_out_sequences
from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True)
class Replaced:
    """A jumprelu in place of a topk, and how much of the topk's features it keeps."""

    clt: CrossLayerTranscoder
    kept: float
    """Share of the topk's active features that are active too."""
    extra: float
    """Share of its active features that are not active in the topk."""


@torch.no_grad()
def as_jumprelu(clt: CrossLayerTranscoder, x: Float[Tensor, "layer batch d_model"]) -> Replaced:
    """Calibrate thresholds on rows; of a batchtopk that is the same as training does at its end.

    Raises:
        DataError: If the activation needs no thresholds, or there are no rows.
    """
    config, x = clt.config, x.to(clt.b_enc.device)
    if not config.selects:
        raise DataError(
            f"only topk and batchtopk become a jumprelu, this transcoder is {config.activation} already"
        )
    assert config.k is not None
    with torch.device("meta"):
        by_batch = CrossLayerTranscoder(replace(config, activation="batchtopk"))
    by_batch.load_state_dict(clt.state_dict(), assign=True)
    by_batch.provenance, by_batch.training_sequences = clt.provenance, clt.training_sequences
    found = calibrated(by_batch, [x])
    pre_acts = clt.all_pre_acts(x)
    selected = (topk_mask if config.activation == "topk" else batch_topk_mask)(pre_acts, config.k)
    before, after = selected & (pre_acts > 0), found.encode(x) > 0
    both = float((before & after).sum())
    return Replaced(found, both / max(1, int(before.sum())), 1.0 - both / max(1, int(after.sum())))


def held_out_rows(
    clt: CrossLayerTranscoder, store: RowStore, count: int
) -> Float[Tensor, "layer batch d_model"]:
    """Inputs of rows spread evenly over the sequences of a store that the transcoder was not trained on.

    Raises:
        DataError: If there are none.
        CheckpointError: If the transcoder does not record what it was trained on.
    """
    spans = [store.sequence_rows(int(seq)) for seq in held_out_sequences(clt, store)]
    rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    if len(rows) == 0:
        raise DataError("the store's held-out sequences have no rows; capture more of their positions")
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))]
    read = store.read(chosen.tolist(), list(clt.config.input_hooks))
    return torch.stack([read[name] for name in clt.config.input_hooks])
