"""The writer and the reader of each format, and which one some files are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mdlm_interp.errors import CheckpointError
from transcoder.checkpoint import CONFIG, FORMAT, read_json
from transcoder.interchange import circuit_tracer, crosslayer_coding, crosslayer_statistics, saelens
from transcoder.interchange.exchanged import About, Hooks, Reading
from transcoder.interchange.form import Form
from transcoder.interchange.limits import Format

WRITERS: Mapping[Format, Callable[[Form, Path, About], None]] = {
    "circuit-tracer": circuit_tracer.write,
    "saelens": saelens.write,
    "crosslayer-coding": crosslayer_coding.write,
}

READERS: Mapping[Format, Callable[[Path, Hooks], Reading]] = {
    "circuit-tracer": circuit_tracer.read,
    "saelens": saelens.read,
    "crosslayer-coding": crosslayer_coding.read,
}


def recognised(path: Path) -> Format:
    """The format of a directory, or of a checkpoint file in it.

    Raises:
        CheckpointError: If it is of none of them.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a directory with a transcoder's files")
    if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt"):
        raise CheckpointError(f"{path} may run code when it is opened; save it as safetensors first")
    directory = path.parent if path.is_file() else path
    if (directory / circuit_tracer.CONFIG).is_file():
        return "circuit-tracer"
    if any(directory.glob(f"*/{saelens.CONFIG}")):
        return "saelens"
    if (directory / saelens.CONFIG).is_file():  # a layer of SAELens has a file of this name too
        return "saelens" if "architecture" in read_json(directory / saelens.CONFIG) else "crosslayer-coding"
    if (directory / CONFIG).is_file() and read_json(directory / CONFIG).get("format") == FORMAT:
        raise CheckpointError(f"{directory} is a transcoder of this package already; use it as it is")
    raise CheckpointError(
        f"{directory} has no {circuit_tracer.CONFIG} (circuit-tracer), no layer folders with {saelens.CONFIG} "
        f"(SAELens) and no {crosslayer_statistics.CONFIG} (crosslayer-coding); is it the right directory?"
    )
