"""interchange.json: what an export was made from, for people and for the way back.

It is not needed to read the weights. An import takes from it only which model, text and run the transcoder comes
from, so that an imported one is checked and evaluated like the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdlm_interp import __version__
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import CheckpointError
from transcoder.checkpoint import file_sha256, read_json
from transcoder.interchange.adaln import Fold
from transcoder.interchange.certificate import Certificate
from transcoder.interchange.form import Form
from transcoder.interchange.limits import Format
from transcoder.model import CrossLayerTranscoder

RECORD = "interchange.json"
KIND = "mdlm-interp export"


def record_of(
    clt: CrossLayerTranscoder,
    form: Form,
    to: Format,
    fold: Fold,
    certificate: Certificate,
    notes: list[str],
    directory: Path,
) -> dict[str, Any]:
    """The file's content.

    Args:
        directory: Where the export's other files are.
    """
    origin = dict(clt.provenance)
    if form.config.output_hook != clt.config.output_hook:
        # It holds activations of the hook point before.
        origin.pop("probe", None)
    return {
        "kind": KIND,
        "format": to,
        "mdlm_interp": __version__,
        "transcoder": to_mapping(form.config),
        "fold": fold,
        "certificate": certificate.mapping(),
        "notes": notes,
        "provenance": origin,
        "sha256": {
            path.relative_to(directory).as_posix(): file_sha256(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }


def origin_of(directory: Path, output_hook: str) -> dict[str, Any]:
    """Provenance of an export's transcoder; empty if there is no such file.

    Args:
        output_hook: That it is imported with; the recorded probe is of the export's.
    Raises:
        CheckpointError: If another file of the export is not what was written: the record is not of these weights.
    """
    path = directory / RECORD
    if not path.is_file():
        return {}
    stored = read_json(path)
    found, shape = stored.get("provenance"), stored.get("transcoder")
    if stored.get("kind") != KIND or not isinstance(found, dict) or not isinstance(shape, dict):
        return {}
    hashes = stored.get("sha256")
    for name, expected in (hashes if isinstance(hashes, dict) else {}).items():
        file = directory / name
        if not file.is_file() or file_sha256(file) != expected:
            raise CheckpointError(
                f"{file} is not the file that {RECORD} was written with; restore the export from a copy, or remove "
                f"{RECORD} to import the files as another tool's"
            )
    kept = shape.get("output_hook") == output_hook
    return {name: value for name, value in found.items() if kept or name != "probe"}
