"""Saving a training run so that continuing it gives the bits of never having stopped.

A checkpoint is one safetensors file (weights, averaged weights, both AdamW moments) whose metadata holds
the step and the run's record: its config, and hashes of its text and tokenizer. It is complete and on disk
before it replaces the last one. Batches, times and masks are pure functions of (seed, step), so nothing
else needs saving.

The same record stands in run.json from the first moment on, and tells this run's directory from another's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.atomic_files import replacing
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import CheckpointError, OutputExistsError
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.data import TokenStreams

STATE = "state.safetensors"
RECORD = "run.json"
LOG = "log.jsonl"
LOSS_CURVE = "loss.png"

RESUMABLE_CHANGES = (
    "steps",
    "validate_every",
    "checkpoint_every",
    "log_every",
    "validation_sequences",
    "out",
    "files",  # may have moved: their content is compared by hash
    "tokenizer",
)
"""Settings that may differ between the run that was stopped and the one that continues it."""

SHOWN_HASH = 12
"""Digits of a SHA-256 that an error shows."""

Record = dict[str, Any]


def run_record(config: TrainLMConfig, tokenizer: Tokenizer, streams: TokenStreams) -> Record:
    """What a run is made of, as JSON holds it: every setting, and what its text and tokenizer were."""
    inputs = {
        "sources": [asdict(source) for source in streams.sources],
        "tokenizer_sha256": tokenizer.sha256,
    }
    return {"config": to_mapping(config), "inputs": inputs}


def refuse_foreign(directory: Path) -> None:
    """Raise OutputExistsError if a file that a run would write is there and no run of train-lm made it."""
    if not (directory / RECORD).exists():
        for name in (STATE, LOG, LOSS_CURVE):
            if (directory / name).exists():
                raise OutputExistsError(
                    f"{directory / name} exists and was not made by train-lm (there is no {RECORD} beside it); "
                    f"choose another out directory or move it away"
                )
    else:
        _read_record(directory / RECORD)


def open_run(directory: Path, record: Record) -> tuple[int, dict[str, Tensor]] | None:
    """Make the directory this run's; what `load_state` found in it.

    Raises:
        OutputExistsError: If it holds files that would be lost.
        CheckpointError: If another run is in it: other settings, other text or another tokenizer.
        WriteError: If it cannot be written.
    """
    refuse_foreign(directory)
    saved = load_state(directory, record)
    path = directory / RECORD
    if saved is None and path.exists():
        refuse_another(_read_record(path), record, directory)
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return saved


def save_state(directory: Path, step: int, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint in one step; an interruption or a full disk leaves the old one."""
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "run": json.dumps(record), "sha256": tensors_sha256(kept)}
    with replacing(directory / STATE) as partial:
        save_file(kept, partial, metadata=metadata)


def load_state(directory: Path, record: Record) -> tuple[int, dict[str, Tensor]] | None:
    """The step to continue with and the saved tensors, or None if there is no checkpoint.

    Raises:
        CheckpointError: If the checkpoint is damaged, or another run's: other settings, text or tokenizer.
    """
    path = directory / STATE
    if not path.exists():
        return None
    step, saved = _read_metadata(path)
    refuse_another(saved, record, directory)
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            expected = stored.metadata()["sha256"]
    except SafetensorError as error:
        raise _damaged(path, error) from None
    if tensors_sha256(tensors) != expected:
        raise _damaged(path, "its tensors do not match their SHA-256")
    return step, tensors


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def saved_step(directory: Path) -> int | None:
    """The step of the checkpoint, or None if there is none."""
    path = directory / STATE
    return _read_metadata(path)[0] if path.exists() else None


def refuse_another(saved: Record, wanted: Record, directory: Path) -> None:
    """Raise CheckpointError unless the record saved in the directory and the one wanted are of one run."""
    # Tuples and paths become what they are after a way through JSON.
    settings = json.loads(json.dumps(wanted["config"]))
    for name, value in settings.items():
        if name not in RESUMABLE_CHANGES and saved["config"].get(name) != value:
            raise CheckpointError(
                f"{directory} holds a run that was trained with {name} = {saved['config'].get(name)!r}, "
                f"the run asks for {value!r}; restore the setting or choose another out directory"
            )
    before, after = saved["inputs"], wanted["inputs"]
    remedy = "restore it or choose another out directory"
    files = settings["files"]
    if len(before["sources"]) != len(files):
        raise CheckpointError(
            f"{directory} holds a run that was trained on {len(before['sources'])} text files, the run names "
            f"{len(files)}; name the same ones or choose another out directory"
        )
    for file, was, now in zip(files, before["sources"], after["sources"], strict=True):
        if (was["bytes"], was["sha256"]) != (now["bytes"], now["sha256"]):
            raise CheckpointError(
                f"text file {file} is not what the run in {directory} was trained on: it has {_content(now)}, "
                f"{was['file']} had {_content(was)}; {remedy}"
            )
    if before["tokenizer_sha256"] != after["tokenizer_sha256"]:
        raise CheckpointError(
            f"tokenizer {settings['tokenizer']} is not what the run in {directory} was trained with: it has "
            f"SHA-256 {after['tokenizer_sha256'][:SHOWN_HASH]}..., that had "
            f"{before['tokenizer_sha256'][:SHOWN_HASH]}...; {remedy}"
        )


def _content(source: Mapping[str, Any]) -> str:
    return f"{source['bytes']:,} bytes with SHA-256 {source['sha256'][:SHOWN_HASH]}..."


def _read_metadata(path: Path) -> tuple[int, Record]:
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from None
    if not metadata.keys() >= {"step", "run", "sha256"}:
        raise CheckpointError(
            f"{path} has no step, run and sha256 in its metadata, so it is no checkpoint of train-lm, or an earlier "
            f"version's; choose another out directory"
        )
    return int(metadata["step"]), json.loads(metadata["run"])


def _damaged(path: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({error}); remove it to start the run anew")


def _read_record(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        record = None
    if not isinstance(record, dict) or not record.keys() >= {"config", "inputs"}:
        raise OutputExistsError(
            f"{path} exists and was not made by train-lm; choose another out directory or move it away"
        )
    return record


def optimiser_tensors(optimiser: torch.optim.AdamW, names: list[str]) -> dict[str, Tensor]:
    """AdamW's moments under their parameters' names."""
    flat: dict[str, Tensor] = {}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in optimiser.state[parameter].items():
            flat[f"optimiser.{key}.{name}"] = value
    return flat


def restore_optimiser(optimiser: torch.optim.AdamW, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put saved moments back."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            optimiser.state[parameter][key] = tensors[f"optimiser.{key}.{name}"].clone()
