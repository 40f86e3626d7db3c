"""What a finished run looks like: FVU per layer and feature density on held-out rows, L0 over training.

fvu.png, density.png and l0.png beside the transcoder; `clt eval` draws more of them.
"""

# Axes: layer, feature

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mdlm_interp.atomic_files import replacing
from transcoder.batches import Batch
from transcoder.config import METRICS
from transcoder.figures import DOTS_PER_INCH
from transcoder.metrics import STRATA, ReconstructionMetrics
from transcoder.model import CrossLayerTranscoder
from transcoder.plots import draw_density, draw_fvu
from transcoder.training_log import read_log
from transcoder.training_plots import draw_l0

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def draw_run(
    clt: CrossLayerTranscoder, held_out: Sequence[Batch], out: Path, k: int | None = None
) -> list[Path]:
    """Draw the plots; those of held-out rows only if there are any. Returns their files.

    Args:
        k: Features that the activation kept in training; none if it did not select.
    """
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
        figures["l0.png"] = draw_l0(log, k)
    for name, figure in figures.items():
        with replacing(out / name) as partial:
            figure.savefig(partial, dpi=DOTS_PER_INCH)
    return [out / name for name in figures]
