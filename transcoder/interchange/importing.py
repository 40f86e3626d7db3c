"""Read a transcoder of another tool as one of ours.

1. The files' values are read in float64, checked one by one, and normalisation that the tool keeps outside of them is
   folded in.
2. Each is rounded to float32 once, and the result certified against what was read.
3. If the files are an export of ours, which model, text and run they come from is taken over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mdlm_interp.errors import CheckpointError
from transcoder.checkpoint import SEQUENCES, read_tensors
from transcoder.interchange.certificate import Certificate, certify, probe_rows
from transcoder.interchange.exchanged import Hooks
from transcoder.interchange.form import Form
from transcoder.interchange.formats import READERS, recognised
from transcoder.interchange.limits import Format
from transcoder.interchange.record import origin_of
from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True)
class Imported:
    """What was read."""

    clt: CrossLayerTranscoder
    format: Format
    certificate: Certificate
    notes: list[str]
    """What to know about it, one sentence each."""


def import_clt(
    path: str | Path,
    format: Format | None = None,
    *,
    input_hook: str | None = None,
    output_hook: str | None = None,
) -> Imported:
    """Read another tool's files.

    Args:
        path: A directory, or with crosslayer-coding one of the checkpoints in it.
        format: None recognises it by the files.
        input_hook: Hook point that a layer's encoder reads, {layer} standing for its number; None takes the files'.
        output_hook: Likewise, that the decoders reconstruct.
    Raises:
        CheckpointError: If a file is missing, damaged or foreign, or does something that no transcoder here does.
        ConfigError: If a hook point has no {layer}.
    """
    path = Path(path)
    found = recognised(path) if format is None else format
    reading = READERS[found](path, Hooks(input_hook, output_hook))
    form = reading.form
    clt = form.transcoder()
    certificate = certify(form, Form.of(clt), probe_rows(clt), "drawn with mean 0 and variance 1")
    directory = path.parent if path.is_file() else path
    notes = list(reading.notes)
    clt.training_sequences = _sequences(directory / SEQUENCES)
    if clt.training_sequences is None:
        notes.append(
            "which text it was trained on is not known, so no sequences count as held out: evaluate() takes "
            "sequences, clt eval refuses"
        )
    clt.provenance = {
        **origin_of(directory, clt.config.output_hook),
        "imported": {"format": found, "certificate": certificate.mapping()},
    }
    return Imported(clt, found, certificate, notes)


def _sequences(path: Path) -> NDArray[np.int64] | None:
    if not path.is_file():
        return None
    hashes = read_tensors(path).get("hashes")
    if hashes is None or hashes.dtype != torch.int64 or hashes.ndim != 1:
        raise CheckpointError(f"{path} must hold one row of int64 'hashes'; fetch it again, or remove it")
    return np.asarray(hashes.numpy())
