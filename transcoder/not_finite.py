"""What is said, and kept, of a step whose loss or gradient is not finite: where it was, and who is to blame."""

# Axes: layer, row, d_model

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mdlm_interp.errors import DataError
from transcoder.batches import Batch
from transcoder.model import CrossLayerTranscoder
from transcoder.scale_out.processes import Processes


class NonFiniteError(DataError):
    """A loss or gradient that is not finite.

    Attributes:
        record: Where: step, place in the data, the batch's rows with their coordinates.
    """

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


def not_finite(
    step: int,
    loss: float,
    grad_norm: float,
    batch: Batch,
    cursor: Mapping[str, int],
    parameters: Sequence[str],
) -> NonFiniteError:
    """The error of a step: the store's rows are to blame if some of them are not finite, else the training.

    Args:
        cursor: Where in the data the step is.
        parameters: Names of those that are not finite.
    """
    bad = ~(batch.x.isfinite().all(2).all(0) & batch.y.isfinite().all(2).all(0)).numpy()
    if bad.any():
        cause = f"the store's rows {_listed(batch.rows[bad])} are not finite; capture them again"
    else:
        cause = f"its rows {_listed(batch.rows)} are finite, so training diverged; lower lr or set grad_clip"
    record = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(grad_norm),
        "cursor": dict(cursor),
        "rows": batch.rows.tolist(),
        "rows_not_finite": batch.rows[bad].tolist(),
        "t": batch.t.tolist(),
        **{name: values.tolist() for name, values in batch.where.items()},
        "parameters_not_finite": list(parameters),
    }
    figures = f"{loss} with a gradient of norm {grad_norm}"
    return NonFiniteError(f"the loss of step {step} is {figures}: {cause}", record)


def parameters_not_finite(blocks: Sequence[CrossLayerTranscoder], processes: Processes) -> list[str]:
    """Names of the parameters of which some process has values that are not finite."""
    names = [name for name, _ in blocks[0].named_parameters()]
    bad = [sum(not bool(block.get_parameter(name).isfinite().all()) for block in blocks) for name in names]
    counts = processes.count(torch.tensor(bad, device=blocks[0].b_enc.device), "feature").tolist()
    return [name for name, count in zip(names, counts, strict=True) if count]


def _listed(rows: NDArray[np.int64]) -> str:
    ordered = np.sort(rows)
    more = f", ... ({len(ordered)} in all)" if len(ordered) > 8 else ""
    return ", ".join(map(str, ordered[:8].tolist())) + more
