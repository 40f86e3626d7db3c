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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdlm_interp.atomic_files import replacing
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import CheckpointError, OutputExistsError
from mdlm_interp.training.config import RunConfig

STATE = "state.safetensors"
RECORD = "run.json"
LOG = "log.jsonl"
LOSS_CURVE = "loss.png"

BEFORE: dict[str, object] = {
    "recipe": "mdlm",
    "micro_batch_size": None,
    "order": "random",
}
"""What a run did whose record is older than these settings."""

SHOWN_HASH = 12
"""Digits of a SHA-256 that an error shows."""

Record = dict[str, Any]


def run_record(config: RunConfig, inputs: Mapping[str, Any]) -> Record:
    """What a run is made of, as JSON holds it: every setting, and what its text, tokenizer, ... were."""
    # Tuples and paths become what they are after a way through JSON.
    record: Record = json.loads(json.dumps({"config": to_mapping(config), "inputs": dict(inputs)}))
    return {**record, "resumable": list(config.RESUMABLE)}


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
    settings = wanted["config"]
    before = {name: value for name, value in BEFORE.items() if name in settings} | saved["config"]
    for name in dict.fromkeys([*settings, *before]):
        if name not in wanted["resumable"] and before.get(name) != settings.get(name):
            raise CheckpointError(
                f"{directory} holds a run that was trained with {name} = {before.get(name)!r}, "
                f"the run asks for {settings.get(name)!r}; restore the setting or choose another out directory"
            )
    _refuse_other_text(saved["inputs"], wanted, directory)
    for key, now in wanted["inputs"].items():
        was = saved["inputs"].get(key)
        if key != "sources" and was != now:
            name = key.removesuffix("_sha256")
            digest = "SHA-256 " if key.endswith("_sha256") else ""
            raise CheckpointError(
                f"{name} {settings.get(name, '')} is not what the run in {directory} was trained with: it has "
                f"{digest}{_short(now)}, that had {_short(was)}; restore it or choose another out directory"
            )


def _refuse_other_text(before: Record, wanted: Record, directory: Path) -> None:
    sources, files = wanted["inputs"].get("sources", []), wanted["config"].get("files", [])
    if len(before.get("sources", [])) != len(sources):
        raise CheckpointError(
            f"{directory} holds a run that was trained on {len(before.get('sources', []))} text files, the run "
            f"names {len(sources)}; name the same ones or choose another out directory"
        )
    named = files if len(files) == len(sources) else [source["file"] for source in sources]
    for file, was, now in zip(named, before.get("sources", []), sources, strict=True):
        if (was["bytes"], was["sha256"]) != (now["bytes"], now["sha256"]):
            raise CheckpointError(
                f"text file {file} is not what the run in {directory} was trained on: it has {_content(now)}, "
                f"{was['file']} had {_content(was)}; restore it or choose another out directory"
            )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:SHOWN_HASH]}..." if len(text) > SHOWN_HASH else text


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
