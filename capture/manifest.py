"""The commit point of a store: manifest.json says which rows are durable, and is replaced atomically.

Order of a commit: the data files are written and fsynced, then the manifest is written beside the old one,
fsynced, renamed over it, and the directory fsynced. Whatever moment a run dies at, the manifest speaks only
of rows that are on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capture.schema import SCHEMA_VERSION
from mdlm_interp.errors import StoreError

MANIFEST = "manifest.json"
SYNC_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One durable shard of every row array."""

    rows: tuple[int, int]
    """First row, and one past the last."""
    first_sequence: int
    """Number of the first sequence that ends in this shard; a sequence may begin in the one before."""
    n_sequences: int
    """Sequences that end in this shard."""
    sha256: str
    """`schema.ContentHash` of these rows in every array of acts and rows."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store will hold and what of it is committed."""

    n_sequences: int
    """Sequences of the complete store."""
    length: int
    """Tokens per sequence."""
    complete: bool = False
    committed_rows: int = 0
    """Rows that readers may trust, whole sequences only: up to length - 1 fewer than the shards hold."""
    shards: tuple[Shard, ...] = ()


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest; what it speaks of must be durable already."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(manifest)}, indent=1) + "\n"
    partial = root / (MANIFEST + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, root / MANIFEST)
    sync(root)


def read_manifest(root: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreError: If there is none, it is damaged, or a later version of this package wrote it.
    """
    path = root / MANIFEST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{root} has no {MANIFEST}: it is no activation store, or its capture died before the first row; "
            f"remove it and capture again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it from a copy or capture again") from None
    if not isinstance(stored, dict):
        raise StoreError(f"{path} is damaged (no JSON object); restore it from a copy or capture again")
    check_version(stored.get("schema_version"), path)
    try:
        return _parse(stored)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{path} is damaged ({reason}); restore it from a copy or capture again") from None


def _parse(stored: dict[str, Any]) -> Manifest:
    shards = []
    for entry in stored["shards"]:
        start, stop = (int(row) for row in entry["rows"])
        first, count = int(entry["first_sequence"]), int(entry["n_sequences"])
        shards.append(
            Shard(rows=(start, stop), first_sequence=first, n_sequences=count, sha256=str(entry["sha256"]))
        )
    return Manifest(
        n_sequences=int(stored["n_sequences"]),
        length=int(stored["length"]),
        complete=bool(stored["complete"]),
        committed_rows=int(stored["committed_rows"]),
        shards=tuple(shards),
    )


def check_version(version: object, path: Path) -> None:
    """Raise StoreError unless this package reads stores of that schema version."""
    if type(version) is not int or version < 1:
        raise StoreError(
            f"{path} has schema_version {version!r}, expected a whole number from 1; is it damaged?"
        )
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema_version {version}, this package reads up to {SCHEMA_VERSION}; "
            f"update mdlm-interp"
        )


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(paths: Iterable[Path]) -> None:
    """`sync` for several at once; the file system joins them in few commits of its journal."""
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        for _ in pool.map(sync, paths):
            pass


def sync_tree(root: Path) -> None:
    """`sync` for everything below a directory, and for the entry of the directory itself."""
    entries = [Path(top, name) for top, _, files in os.walk(root) for name in ["", *files]]
    sync_all([*entries, root.resolve().parent])
