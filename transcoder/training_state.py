"""The state of a training run on disk: everything that the next step depends on.

    checkpoints/run.json            whose run it is: config, store, versions; there from its start
    checkpoints/step-00000500/
        state.json                  step, metrics since the last line, where the schedules and the data order are,
                                    hashes of the store and of the normalisation, the transcoder's shape, the proof,
                                    and the SHA-256 of every file of tensors
        tensors/                    by torch.distributed.checkpoint, as safetensors: weights, normalisation, Adam's
                                    moments, counters of rows without activity, hashes of the training text

A state is written beside its place and renamed into it as a whole when it is on disk: there or not, never in part.
Several processes write it together, each the tensors or parts of tensors that it has, and any other number can read it.
torch.distributed.checkpoint's own format keeps its index as a pickle, which whoever gave the file could make run
anything; in safetensors there is none.
"""

# Axes: none; tensors are named

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mdlm_interp.atomic_files import PREFIX, replacing_directory, write_errors
from mdlm_interp.errors import CheckpointError
from transcoder.checkpoint import read_json, write_json
from transcoder.scale_out.processes import Processes
from transcoder.scale_out.shards import space_for

CHECKPOINTS = "checkpoints"
STATE = "state.json"
TENSORS = "tensors"
HASHES = "tensors_sha256"
DAMAGED = (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, SafetensorError)
"""What safetensors and torch raise on files that are not what was written."""


def save_training_state(
    out: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 1
) -> Path:
    """Write the state after state["step"] steps and remove all but the newest; returns its directory.

    Args:
        keep: States to have afterwards, this one included.
    Raises:
        WriteError: If the disk is full or failing; the older states are still there then.
    """
    return save_together(Processes(), out, tensors, state, keep=keep)


def save_together(
    processes: Processes,
    out: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int = 1,
) -> Path:
    """The same by all processes of a run: each writes its parts of the tensors, the first one all else.

    They must see the same directory.
    """
    final = out / CHECKPOINTS / f"step-{state['step']:08d}"
    with ExitStack() as stack:
        partial = processes.first(lambda: stack.enter_context(replacing_directory(final)))
        with write_errors(final):
            _write_tensors(partial, tensors)

        def complete() -> None:
            write_json(partial / STATE, {**state, HASHES: _sha256_of_files(partial / TENSORS)})
            stack.close()  # the directory gets its name
            for leftover in final.parent.glob(f"{PREFIX}step-*"):
                shutil.rmtree(leftover)
            for older in training_states(out)[:-keep]:
                shutil.rmtree(older)

        processes.first(complete)
    return final


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    with _plain_errors():
        state_dict_saver.save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(
                str(directory / TENSORS),
                # A file a tensor: torch serialises a file's tensors together in memory.
                fqn_to_index_mapping={name: number for number, name in enumerate(tensors, 1)},
                save_distributed=True,
            ),
        )


def training_states(out: Path) -> list[Path]:
    """Directories of the complete states, oldest first."""
    found = (out / CHECKPOINTS).glob("step-*")
    return sorted(path for path in found if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name))


def latest_training_state(out: Path) -> Path | None:
    """Directory of the newest complete state, or None."""
    return next(reversed(training_states(out)), None)


def load_training_state(
    directory: Path, processes: Processes | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of a saved state.

    Args:
        processes: That read it together: each gets its part of what goes by features, whatever the number of
            processes that wrote it; none for this one alone.
    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    state = read_json(directory / STATE)
    together = processes or Processes()
    try:
        found = _sha256_of_files(directory / TENSORS)
        wrong = sorted(
            name for name in {*found, *state[HASHES]} if found.get(name) != state[HASHES].get(name)
        )
        if wrong:
            raise ValueError(f"{TENSORS}/{wrong[0]} is not the file that was written")
        with _plain_errors():
            reader = HuggingFaceStorageReader(str(directory / TENSORS))
            metadata = reader.read_metadata().state_dict_metadata
            tensors = {
                name: space_for(name, entry.size, entry.properties.dtype, together)
                for name, entry in metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            state_dict_loader.load(tensors, storage_reader=reader)
    except DAMAGED as error:
        raise damaged_state(directory, error) from None
    return tensors, state


def _sha256_of_files(directory: Path) -> dict[str, str]:
    """SHA-256 of each file in a directory, by name."""
    hashes = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def damaged_state(directory: Path, error: Exception) -> CheckpointError:
    """The error for a state that does not read or does not fit."""
    reason = (str(error).splitlines() or [""])[0]
    return CheckpointError(
        f"{directory} is damaged ({type(error).__name__}: {reason}); restore it from a copy or remove "
        f"{directory.parents[1]} to start over"
    )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what was wrong itself, where torch.distributed.checkpoint raises a report of all ranks."""
    with warnings.catch_warnings():
        # Without a process group it says that it takes this for a single process, which is meant.
        warnings.filterwarnings("ignore", "torch.distributed is .*assuming the intent is to (save|load)")
        try:
            yield
        except CheckpointException as report:
            failure: BaseException = next(iter(report.failures.values()))[0]
            raise _disk_error_of(failure) or failure from None


def _disk_error_of(failure: BaseException | None) -> OSError | None:
    """The error of the disk in a chain of exceptions: torch's zip writer hides it behind one of its own."""
    while failure is not None and not isinstance(failure, OSError):
        failure = failure.__cause__ or failure.__context__
    return failure
