"""The commit point of a store: manifest.json says which rows are durable, and is replaced atomically.

Order of a commit: the shard's files are written and made durable, then the manifest that lists the shard
replaces the old one. Whatever moment a run dies at, the manifest speaks only of rows that are on disk.

While several ranks write one store, each has a manifest of its own, `manifest.rank-K-of-N.json`, which lists
its shards; readers join them, and the last rank to finish replaces them by the one that a single process
would have written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from capture.open_files import REMEDY
from capture.schema import SCHEMA_VERSION
from mdlm_interp.errors import StoreError

MANIFEST = "manifest.json"
_RANK_NAME = re.compile(r"manifest\.rank-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where to begin again to make the rows after a shard: a place in the text and what it is numbered.

    The place is the start of the group of documents that holds the first sequence of a batch.
    """

    documents: int = 0
    """Documents before that group."""
    blocks: int = 0
    """Blocks of tokens before that group."""
    candidate: int = 0
    """Block number times the number of times of a block, plus which of them: what the batch begins with."""
    sequence: int = 0
    """The first sequence of the batch."""
    row: int = 0
    """The first row of that sequence."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One durable shard of every row array."""

    rows: tuple[int, int]
    """First row, and one past the last."""
    sequences: tuple[int, int]
    """First sequence that ends in this shard, and one past the last; the first may begin in an earlier one."""
    sha256: str
    """`shards.shard_digest` of all its files."""
    pending: int
    """crc32c of the shard's pending file, which is there until the store is complete."""
    not_finite: int
    """Activations that are infinite or no number."""
    resume: ResumePoint
    """Where the batch of the last row begins."""

    @cached_property
    def line(self) -> str:
        """Its line of the manifest, made once: a long capture commits thousands of times, each with one new shard."""
        return "    " + json.dumps(self, default=_as_object)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What of a store is committed."""

    length: int
    """Tokens of the longest sequence."""
    shard_rows: int
    """Rows of a full shard."""
    planned_rows: int
    """Rows expected when the capture began; of a complete store, those that there are."""
    complete: bool = False
    shards: tuple[Shard, ...] = ()
    """In order of their rows; the shards of one rank need not be adjacent."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by path: of a complete store every file but the shards' and this one, before that zarr.json alone."""

    @cached_property
    def committed_rows(self) -> int:
        """Rows from the first one on that readers may trust."""
        stop = 0
        for shard in self.shards:
            if shard.rows[0] != stop:
                break
            stop = shard.rows[1]
        return stop

    @cached_property
    def present_rows(self) -> int:
        """Rows of all shards, also of those that come after one that another rank has not committed yet."""
        return sum(shard.rows[1] - shard.rows[0] for shard in self.shards)

    @cached_property
    def n_sequences(self) -> int:
        """Sequences whose rows are all committed."""
        rows = self.committed_rows
        return max((shard.sequences[1] for shard in self.shards if shard.rows[1] <= rows), default=0)


def rank_manifest(rank: int, world_size: int) -> str:
    """Name of the manifest that a rank writes."""
    return MANIFEST if world_size == 1 else f"manifest.rank-{rank}-of-{world_size}.json"


def world_size_of(names: Iterable[str]) -> int | None:
    """Number of ranks that write a store, by the names of its manifests; None if none has begun."""
    sizes = {int(match[2]) for name in names if (match := _RANK_NAME.fullmatch(name))}
    return max(sizes, default=None)


def joined(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest of all ranks' shards."""
    shards = sorted(
        (shard for manifest in manifests for shard in manifest.shards), key=lambda shard: shard.rows
    )
    return replace(manifests[0], shards=tuple(shards))


def to_bytes(manifest: Manifest) -> bytes:
    """The file's content, with its own SHA-256 over the rest."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "complete": manifest.complete,
        "committed_rows": manifest.committed_rows,
        "n_sequences": manifest.n_sequences,
        "planned_rows": manifest.planned_rows,
        "length": manifest.length,
        "shard_rows": manifest.shard_rows,
        "files": dict(sorted(manifest.files.items())),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    entries = ",\n".join(shard.line for shard in manifest.shards)
    body = ",\n".join([*lines, f'  "shards": [\n{entries}\n  ]'])
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{\n{body},\n  "sha256": "{digest}"\n}}\n'.encode()


def _as_object(item: Any) -> dict[str, Any]:
    # In a third of the time of `asdict`, which copies what it finds.
    return {each.name: getattr(item, each.name) for each in fields(item)}


def from_bytes(data: bytes, name: str) -> Manifest:
    """Parse a manifest.

    Args:
        name: What an error calls it.
    Raises:
        StoreError: If it is damaged, or a later version of this package wrote it.
    """
    try:
        stored = json.loads(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{name} is damaged ({error}); {REMEDY}") from None
    if not isinstance(stored, dict):
        raise StoreError(f"{name} is damaged (no JSON object); {REMEDY}")
    check_version(stored.get("schema_version"), name)
    try:
        manifest = _parse(stored)
        intact = to_bytes(manifest) == data
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{name} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None
    if not intact:
        raise StoreError(f"{name} is damaged (its content does not match its own SHA-256); {REMEDY}")
    return manifest


def check_version(version: object, name: str) -> None:
    """Raise StoreError unless this package reads stores of that schema version."""
    if type(version) is not int or version < 1:
        raise StoreError(
            f"{name} has schema_version {version!r}, expected a whole number from 1; is it damaged?"
        )
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{name} has schema_version {version}, this package reads {SCHEMA_VERSION}; update mdlm-interp"
        )
    if version < SCHEMA_VERSION:
        raise StoreError(
            f"{name} has schema_version {version}, this package reads {SCHEMA_VERSION}; capture again"
        )


def _parse(stored: dict[str, Any]) -> Manifest:
    shards = [
        Shard(
            rows=(int(entry["rows"][0]), int(entry["rows"][1])),
            sequences=(int(entry["sequences"][0]), int(entry["sequences"][1])),
            sha256=str(entry["sha256"]),
            pending=int(entry["pending"]),
            not_finite=int(entry["not_finite"]),
            resume=ResumePoint(**{name: int(value) for name, value in entry["resume"].items()}),
        )
        for entry in stored["shards"]
    ]
    return Manifest(
        length=int(stored["length"]),
        shard_rows=int(stored["shard_rows"]),
        planned_rows=int(stored["planned_rows"]),
        complete=bool(stored["complete"]),
        shards=tuple(shards),
        files={str(name): str(value) for name, value in stored["files"].items()},
    )
