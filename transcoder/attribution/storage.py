"""A graph as a directory: graph.safetensors (the tensors) and graph.json (all else, and the SHA-256 of the tensors).

Nothing in it is code. Loading checks the format, the hash and that all parts fit together.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.atomic_files import replacing, replacing_directory
from mdlm_interp.errors import DataError
from mdlm_interp.saved_settings import read_settings
from transcoder.attribution.graph import Graph

FORMAT, VERSION = "mdlm-interp attribution graph", 1
TENSORS, SETTINGS = "graph.safetensors", "graph.json"
TENSOR_FIELDS = (
    "input_ids",
    "features",
    "activations",
    "logits",
    "probabilities",
    "values",
    "edges",
    "constants",
)
PLAIN_FIELDS: dict[str, tuple[type, ...]] = {
    "mask_id": (int,),
    "sigma": (float, type(None)),
    "n_layers": (int,),
    "centre": (str,),
    "about": (dict,),
}


def save_graph(graph: Graph, directory: str | Path) -> None:
    """Write the directory, whole or not at all.

    Raises:
        OutputExistsError: If something is there.
        WriteError: If the disk refuses.
    """
    settings: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    settings |= {name: getattr(graph, name) for name in PLAIN_FIELDS}
    with replacing_directory(directory) as partial:
        with replacing(partial / TENSORS) as file:
            save_file({name: getattr(graph, name).contiguous().cpu() for name in TENSOR_FIELDS}, file)
        settings["sha256"] = _sha256(partial / TENSORS)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_graph(directory: str | Path) -> Graph:
    """Read a directory that `save_graph` wrote.

    Raises:
        DataError: If it is no graph, incomplete, damaged or contradicts itself.
    """
    directory = Path(directory)
    settings = _read_settings(directory / SETTINGS)
    file = directory / TENSORS
    if not file.is_file():
        raise DataError(f"{directory} has no {TENSORS}; was it copied in part?")
    if _sha256(file) != settings["sha256"]:
        raise DataError(f"{file} is not what {SETTINGS} was written for: its SHA-256 differs; save it again")
    tensors = _read_tensors(file)
    if set(tensors) != set(TENSOR_FIELDS):
        odd = sorted(set(tensors) ^ set(TENSOR_FIELDS))
        raise DataError(f"{file} holds other tensors than a graph's, first {odd[0]!r}; save it again")
    fields: dict[str, Any] = {**tensors, **{name: settings[name] for name in PLAIN_FIELDS}}
    return Graph(**fields)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}; save it again") from None


def _read_settings(path: Path) -> dict[str, Any]:
    found = read_settings(path, form=FORMAT, version=VERSION, what="an attribution graph")
    for name, kinds in {**PLAIN_FIELDS, "sha256": (str,)}.items():
        if name not in found or type(found[name]) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise DataError(f"{path}: {name} must be {wanted}, got {found.get(name)!r}; save it again")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
