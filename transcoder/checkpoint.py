"""A transcoder as a directory.

    config.json                       format, shape and hook points, provenance (run, store and model by hash), and
                                      the SHA-256 of the other files
    clt.safetensors                   W_enc, b_enc, W_dec.0 ..., b_dec, log_threshold and W_skip where there are any,
                                      and the normalisation, float32
    training_sequences.safetensors    hashes of the text it was trained on, int64; absent if that is not known

Every file is complete and on disk before it gets its name, and config.json comes last: a directory
without it is no transcoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.atomic_files import replacing
from mdlm_interp.config_files import from_mapping, to_mapping
from mdlm_interp.errors import CheckpointError, ConfigError, OutputExistsError, nearest
from mdlm_interp.model import HookedMDLM
from transcoder.config import TranscoderConfig
from transcoder.identity import check_model, check_source
from transcoder.model import CrossLayerTranscoder

FORMAT = "mdlm-interp clt"
VERSION = 1
CONFIG = "config.json"
WEIGHTS = "clt.safetensors"
SEQUENCES = "training_sequences.safetensors"


def save_clt(clt: CrossLayerTranscoder, directory: str | Path) -> None:
    """Write a transcoder's files; never over an existing transcoder.

    Raises:
        OutputExistsError: If the directory holds one.
        WriteError: If the disk is full or failing; no transcoder is there then.
    """
    directory = Path(directory)
    if (directory / CONFIG).exists():
        raise OutputExistsError(f"{directory / CONFIG} exists; save to another directory or remove it first")
    write_tensors(directory / WEIGHTS, clt.state_dict())
    if clt.training_sequences is None:
        (directory / SEQUENCES).unlink(missing_ok=True)  # of a save that failed half-way
    else:
        write_tensors(directory / SEQUENCES, {"hashes": torch.from_numpy(clt.training_sequences)})
    stored = {
        "format": FORMAT,
        "version": VERSION,
        "transcoder": to_mapping(clt.config),
        "provenance": clt.provenance,
        "sha256": {
            name: file_sha256(directory / name)
            for name in (WEIGHTS, SEQUENCES)
            if (directory / name).exists()
        },
    }
    write_json(directory / CONFIG, stored)


def load_clt(
    directory: str | Path, model: HookedMDLM | str | Path | None = None, *, device: str | torch.device = "cpu"
) -> CrossLayerTranscoder:
    """Read a transcoder.

    Args:
        model: The model it will be used with, or its source; it must be the one whose activations the
            transcoder was trained on.
    Raises:
        CheckpointError: If a file is missing or damaged, a tensor is missing, unknown or of another
            shape, or the transcoder belongs to another model.
    """
    directory = Path(directory)
    config, provenance, hashes = _read_config(directory)
    with torch.device("meta"):
        clt = CrossLayerTranscoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in clt.state_dict().items()}
    state = read_tensors(directory / WEIGHTS)
    for name, tensor in state.items():
        _check_tensor(name, tensor, expected, directory)
    missing = [name for name in expected if name not in state]
    if missing:
        raise CheckpointError(
            f"{directory / WEIGHTS} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
            f"is n_layers in {CONFIG} right?"
        )
    sequences = _read_sequences(directory / SEQUENCES)
    _check_hashes(directory, hashes)
    clt.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    clt.requires_grad_(True)
    clt.provenance = provenance
    clt.training_sequences = sequences
    if isinstance(model, HookedMDLM):
        check_model(clt, model)
    elif model is not None:
        check_source(clt, model)
    return clt


def _read_config(directory: Path) -> tuple[TranscoderConfig, dict[str, Any], dict[str, str]]:
    path = directory / CONFIG
    stored = read_json(path)
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {stored.get('format')!r}, expected {FORMAT!r}; "
            f"is it another kind of directory?"
        )
    if stored.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {stored.get('version')!r}, this package reads {VERSION}; update the package"
        )
    try:
        config = from_mapping(TranscoderConfig, stored.get("transcoder", {}), source=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    provenance, hashes = stored.get("provenance"), stored.get("sha256")
    if not isinstance(provenance, dict) or not isinstance(hashes, dict) or WEIGHTS not in hashes:
        raise CheckpointError(
            f"{path} lacks provenance or sha256, which this package writes; restore it from a copy"
        )
    return config, provenance, hashes


def _check_tensor(
    name: str, tensor: Tensor, expected: Mapping[str, tuple[int, ...]], directory: Path
) -> None:
    file = directory / WEIGHTS
    if name not in expected:
        raise CheckpointError(
            f"{file} holds {name!r}, which the transcoder of {CONFIG} does not have{nearest(name, expected)}"
        )
    if tuple(tensor.shape) != expected[name]:
        raise CheckpointError(
            f"{name} in {file} has shape {tuple(tensor.shape)}, {CONFIG} implies {expected[name]}; "
            f"trained with another n_features?"
        )
    if tensor.dtype != torch.float32:
        raise CheckpointError(
            f"{name} in {file} is {str(tensor.dtype).removeprefix('torch.')}, expected float32"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} in {file} has values that are not finite; the file is damaged")


def _check_hashes(directory: Path, expected: Mapping[str, str]) -> None:
    for name in expected:
        if not (directory / name).is_file() or file_sha256(directory / name) != expected[name]:
            raise CheckpointError(
                f"{directory / name} is damaged or another's: its SHA-256 is not the one in {CONFIG}; restore it "
                f"from a copy"
            )


def _read_sequences(path: Path) -> NDArray[np.int64] | None:
    if not path.exists():
        return None
    hashes = read_tensors(path).get("hashes")
    if hashes is None or hashes.dtype != torch.int64 or hashes.ndim != 1:
        raise CheckpointError(f"{path} must hold one row of int64 'hashes'; restore it from a copy")
    return np.asarray(hashes.numpy())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file under its final name only when it is complete and on disk."""
    with replacing(path) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file under its final name only when it is complete and on disk."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a transcoder's directory?")
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a transcoder's directory?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(stored).__name__}")
    return stored
