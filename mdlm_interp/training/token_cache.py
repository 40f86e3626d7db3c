"""The tokens of a training text as files that are mapped, not read: for text larger than memory, and to
tokenise once.

A directory holds train.bin and held_out.bin (uint16 ids, little-endian, no header, as nanoGPT's) and
tokens.json: what they were made of and their SHA-256. It appears when all of it is on disk, is never changed,
and is used only for the same text, tokenizer and share of held-out documents.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.atomic_files import replacing_directory, write_errors
from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.documents import expand_files
from mdlm_interp.errors import DataError
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.data import (
    TokenStreams,
    encoded_documents,
    refuse_empty_side,
    text_sources,
)

RECORD = "tokens.json"
SIDES = {False: "train", True: "held_out"}
"""Names of the files, by whether they are held out."""


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Let runs that start together wait for the one that makes the directory."""
    if directory.exists():
        yield
        return
    lock = directory.with_name(f".{directory.name}.lock")
    with write_errors(directory):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Whoever waits for it, or makes another one, finds the directory if all went well.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def mapped_streams(
    directory: Path, files: Sequence[Path], tokenizer: Tokenizer, held_out_share: float
) -> TokenStreams:
    """What `read_streams` returns, memory-mapped from a directory that is made if it is not there.

    Raises:
        DataError: If the directory holds other tokens or is damaged, or one of the two sides is empty.
        WriteError: If it cannot be written.
    """
    files = expand_files(files)
    sources = text_sources(files)
    made_of = {
        "sources": [asdict(source) for source in sources],
        "tokenizer_sha256": tokenizer.sha256,
        "held_out_share": held_out_share,
    }
    with _one_at_a_time(directory):
        if not directory.exists():
            _write(directory, files, tokenizer, held_out_share, made_of)
    record = _read_record(directory, made_of)
    train, held_out = (_mapped(directory, name, record) for name in SIDES.values())
    sizes = record["bytes"]
    return TokenStreams(train, held_out, sizes["train"], sizes["held_out"], sources)


def _write(
    directory: Path, files: Sequence[Path], tokenizer: Tokenizer, share: float, made_of: dict[str, Any]
) -> None:
    """Tokenise with memory for a few documents."""
    counts = {True: 0, False: 0}
    sizes = {True: 0, False: 0}
    with replacing_directory(directory) as partial:
        with ExitStack() as stack:
            streams = {
                held_out: stack.enter_context((partial / f"{name}.bin").open("wb"))
                for held_out, name in SIDES.items()
            }
            for document in encoded_documents(files, tokenizer, share):
                streams[document.held_out].write(document.ids.astype("<u2").tobytes())
                counts[document.held_out] += 1
                sizes[document.held_out] += document.bytes
        for held_out in (False, True):
            refuse_empty_side(counts[held_out], held_out)
        record = {
            **made_of,
            "bytes": {name: sizes[held_out] for held_out, name in SIDES.items()},
            "sha256": {name: sha256_of(partial / f"{name}.bin") for name in SIDES.values()},
        }
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_record(directory: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{directory} exists and has no {RECORD}, so it is no token cache; choose another"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(directory, f"{RECORD}: {error}") from None
    if not isinstance(record, dict) or not record.keys() >= {*made_of, "bytes", "sha256"}:
        raise _damaged(directory, f"{RECORD} lacks keys")
    for name, wanted in made_of.items():
        if _content(record[name]) != _content(wanted):
            raise DataError(
                f"token cache {directory} was made with another {name}: {_shown(record[name])}, the run asks for "
                f"{_shown(wanted)}; choose another token_cache or remove it"
            )
    return record


def _content(value: Any) -> Any:
    """A setting without the names of files, which may have moved."""
    if isinstance(value, list):
        return [(source["bytes"], source["sha256"]) for source in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{source['file']} {source['sha256'][:12]}..." for source in value)
    return str(value)


def _mapped(directory: Path, name: str, record: dict[str, Any]) -> NDArray[np.uint16]:
    path = directory / f"{name}.bin"
    if not path.is_file() or sha256_of(path) != record["sha256"].get(name):
        raise _damaged(directory, f"{path.name} is missing or does not have its SHA-256")
    return np.memmap(path, "<u2", mode="r")


def _damaged(directory: Path, what: str) -> DataError:
    return DataError(f"token cache {directory} is damaged ({what}); remove it, and it is made again")
