"""What a finished run looks like: FVU per layer and feature density on held-out rows, L0 over training.

fvu.png, density.png and l0.png beside the transcoder; `clt eval` draws more of them.
"""

# Axes: layer, feature

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mdlm_interp.atomic_files import replacing
from transcoder.batches import Batch
from transcoder.config import METRICS
from transcoder.metrics import STRATA, ReconstructionMetrics
from transcoder.model import CrossLayerTranscoder
from transcoder.plots import DOTS_PER_INCH, draw_density, draw_fvu, layer_colour, new_figure
from transcoder.training_log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def draw_run(clt: CrossLayerTranscoder, held_out: Sequence[Batch], out: Path) -> list[Path]:
    """Draw the plots; those of held-out rows only if there are any. Returns their files."""
    figures: dict[str, Figure] = {}
    if held_out:
        metrics = ReconstructionMetrics(clt)
        for batch in held_out:
            device = clt.b_enc.device
            metrics.update(batch.x.to(device), batch.y.to(device), batch.is_masked.to(device))
        n_rows = int(metrics.n_rows.sum())
        layers = {stratum: metrics.layers(stratum) for stratum in STRATA}
        figures["fvu.png"] = draw_fvu(layers, f"Reconstruction of MLP outputs on {n_rows:,} held-out rows")
        title = f"Feature density on {n_rows:,} held-out rows"
        figures["density.png"] = draw_density(metrics.density(), n_rows, title)
    log = read_log(out / METRICS)
    if log:
        figures["l0.png"] = draw_l0(log)
    for name, figure in figures.items():
        with replacing(out / name) as partial:
            figure.savefig(partial, dpi=DOTS_PER_INCH)
    return [out / name for name in figures]


def draw_l0(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Active features per row of each layer over the training run."""
    figure, axes = new_figure()
    rows = [entry["rows"] for entry in log]
    by_layer = np.array([entry["l0_by_layer"] for entry in log])
    for layer, values in enumerate(by_layer.T):
        axes.plot(
            rows, values, label=f"layer {layer}", color=layer_colour(layer, by_layer.shape[1]), linewidth=1.0
        )
    axes.plot(rows, by_layer.mean(1), color="black", linewidth=2.0, label="mean")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training rows (tokens)")
    axes.set_ylabel("active features per row")
    axes.set_title("Training: L0 of the batches")
    axes.legend(fontsize="small", ncols=1 + by_layer.shape[1] // 9)
    return figure
