"""Write a transcoder for another tool.

1. Normalisation, and the constant adaLN if asked, are folded in in float64.
2. What the format cannot hold is refused; what is lost without changing the function is told.
3. The files are written to a temporary directory, read back from there and certified.
4. README.md and interchange.json say what it is, and the directory gets its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdlm_interp.atomic_files import refuse_existing, replacing, replacing_directory
from mdlm_interp.errors import DataError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float
from transcoder.checkpoint import SEQUENCES, write_json, write_tensors
from transcoder.identity import check_model, check_source
from transcoder.interchange.adaln import Fold, Modulation, constant_modulation, folded
from transcoder.interchange.certificate import Certificate, certify, probe_rows
from transcoder.interchange.exchanged import About, Hooks
from transcoder.interchange.form import Form
from transcoder.interchange.formats import READERS, WRITERS
from transcoder.interchange.limits import Format, notes
from transcoder.interchange.readme import readme
from transcoder.interchange.record import RECORD, record_of
from transcoder.model import CrossLayerTranscoder


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    form: Form
    certificate: Certificate
    notes: list[str]
    """What is lost or has to be watched, one sentence each."""


def export_clt(
    clt: CrossLayerTranscoder,
    directory: str | Path,
    to: Format,
    *,
    model: HookedMDLM | str | Path | None = None,
    fold: Fold = "none",
    model_name: str = "mdlm",
    rows: Float[Tensor, "layer batch d_model"] | None = None,
    rows_of: str = "given",
) -> Exported:
    """Write a new directory in another tool's format, with its certificate.

    Args:
        model: The model it belongs to, or its source: checked if given, and needed to fold.
        fold: Sides at which the constant adaLN is folded in; see `adaln`.
        model_name: What the other tool calls the model.
        rows: Inputs to certify on, as the model has them; none draws some with the inputs' mean and spread.
        rows_of: Where these come from, for the reader of the certificate.
    Raises:
        DataError: If the format cannot hold it, or adaLN is not constant.
        OutputExistsError: If something is at the path.
        CheckpointError: If the transcoder belongs to another model, or the files did not hold it.
        WriteError: If the disk is full or failing; nothing is at the path then.
    """
    directory = Path(directory)
    refuse_existing(directory)
    told = notes(clt.config, to)
    _check_belongs(clt, model)
    form = Form.of(clt)
    x = (probe_rows(clt) if rows is None else rows.cpu().double(), "drawn with the inputs' mean and spread")
    if fold != "none":
        if model is None:
            raise DataError(f"fold {fold} needs the model whose adaLN is folded in; hand it over as model")
        modulation = constant_modulation(model)
        form = folded(form, modulation, fold)
        x = (_at_input(x[0], modulation, fold), x[1])
    with replacing_directory(directory) as partial:
        WRITERS[to](form, partial, About(model_name, directory))
        found = Form.of(READERS[to](partial, Hooks()).form.transcoder())
        certificate = certify(form, found, x[0], x[1] if rows is None else rows_of)
        if clt.training_sequences is not None:
            write_tensors(partial / SEQUENCES, {"hashes": torch.from_numpy(clt.training_sequences)})
        write_json(partial / RECORD, record_of(clt, form, to, fold, certificate, told, partial))
        with replacing(partial / "README.md") as file:
            file.write_text(readme(form, to, fold, certificate, told), encoding="utf-8")
    return Exported(directory, form, certificate, told)


def _check_belongs(clt: CrossLayerTranscoder, model: HookedMDLM | str | Path | None) -> None:
    if isinstance(model, HookedMDLM):
        check_model(clt, model)
    elif model is not None:
        check_source(clt, model)


def _at_input(x: Tensor, modulation: Modulation, fold: Fold) -> Tensor:
    """The same rows at the plain norm."""
    if fold == "output":
        return x
    scale = 1.0 + modulation.scale[:, None]
    # A dimension that adaLN switches off can have any value there.
    return torch.where(scale == 0, 0.0, (x - modulation.shift[:, None]) / scale)
