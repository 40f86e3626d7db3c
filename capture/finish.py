"""Ends a capture: what all ranks wrote becomes one store, the one that a single process would have written.

1. Every rank that has committed its last shard calls `finish`; the last of them goes on.
2. The arrays get their exact shape; `seqs` and `stats` are made from the pending files, in order of shards.
3. The manifest of the complete store, with the hash of every file beside the shards, is committed.
4. What only an incomplete store needs is removed.

Each step can be done again from the start, so a kill between them loses nothing.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from capture import manifest as manifests
from capture import schema
from capture.manifest import MANIFEST
from capture.metadata import read_whole, set_rows
from capture.places import LOCK, Place
from capture.store_files import StoreFiles, read_manifest
from mdlm_interp.errors import StoreError

DONE = "done"
"""A rank's file that says how many rows the whole text gave; the rank has committed all its shards."""

AT_ONCE = 8
"""Small files that are written or read side by side: a service takes its time for each."""


def done_name(rank: int, world_size: int) -> str:
    """Name of the file by which a rank says that it has committed its last shard."""
    return f"{DONE}.rank-{rank}-of-{world_size}"


def finish(place: Place, layout: schema.Layout, *, world_size: int, rows: int) -> bool:
    """Complete the store if every rank is done; whether it is complete now."""
    names = place.names()
    if MANIFEST in names and read_manifest(place).complete:
        clean(place)
        return True
    if any(done_name(rank, world_size) not in names for rank in range(world_size)):
        return False
    whole = read_manifest(place)
    if whole.committed_rows != rows:
        raise StoreError(
            f"{place.name}: {rows} rows were made and {whole.committed_rows} are committed; run again"
        )
    place.sweep()
    group = zarr.open_group(place.zarr_store(), mode="r+")
    set_rows(place, layout, rows)
    for parent in ("seqs", "stats"):
        place.remove(parent)
        group.require_group(parent)
    files = StoreFiles(place)
    _write_sequences(files, group, layout.length)
    _write_statistics(files, group, layout)
    place.sync()
    whole = replace(
        whole,
        complete=True,
        planned_rows=rows,
        files={path: sha256 for path, (sha256, _) in file_hashes(place).items()},
    )
    place.replace(MANIFEST, manifests.to_bytes(whole))
    clean(place)
    return True


def file_hashes(place: Place) -> dict[str, tuple[str, int]]:
    """SHA-256 and bytes of every file of a complete store but shards and manifests, by path."""
    kept = [path for path in place.files() if not _temporary(path) and not _is_shard(path)]

    def digest(path: str) -> tuple[str, int]:
        content = read_whole(place, path)
        return hashlib.sha256(content).hexdigest(), len(content)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(kept, pool.map(digest, kept), strict=True))


def _is_shard(path: str) -> bool:
    top, _, name = path.partition("/")
    return top in ("acts", "rows") and name.rpartition("/")[2].startswith("c.")


def _temporary(path: str) -> bool:
    top = path.partition("/")[0]
    return top == schema.PENDING or top.startswith(("manifest.", DONE + ".")) or path.endswith(LOCK)


def _write_sequences(files: StoreFiles, group: zarr.Group, length: int) -> None:
    total = files.manifest.n_sequences
    arrays = {
        name: schema.create_sequence_array(group, name, total, length) for name in schema.SEQUENCE_COLUMNS
    }
    start = 0
    waiting: dict[str, list[NDArray[Any]]] = {name: [] for name in arrays}
    held = 0
    names = [f"seqs/{name}" for name in arrays]
    for shard in files.committed():
        tensors = files.pending(shard, names)
        if tensors:
            held += len(tensors["seqs/row"])
            for name, values in waiting.items():
                values.append(tensors[f"seqs/{name}"])
        # Whole chunks at a time: a part of one would be read again to be completed.
        ready = held - (start + held) % schema.SEQUENCE_CHUNK if start + held < total else held
        if ready > 0:
            for name, values in waiting.items():
                joined = np.concatenate(values)
                arrays[name][start : start + ready] = joined[:ready]
                waiting[name] = [joined[ready:]]
            start, held = start + ready, held - ready
    if start != total:
        raise StoreError(
            f"{files.place.name}: {total} sequences were planned and {start} are pending; run again"
        )


def _write_statistics(files: StoreFiles, group: zarr.Group, layout: schema.Layout) -> None:
    moments = files.moments(layout.shapes)

    def write(hook: str) -> None:
        schema.create_statistics(group, hook, moments[hook].arrays())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(write, moments):
            pass


def has_leftovers(place: Place) -> bool:
    """Whether a complete store still has something that only an incomplete one needs."""
    # What is pending goes first, so while it is there some of these files are too.
    return any(name != MANIFEST and _temporary(name) for name in place.names())


def clean(place: Place) -> None:
    """Remove what only an incomplete store needs; for the holder of the lock "finish", of a complete one."""
    for path in (schema.PENDING, *place.names()):
        if path != MANIFEST and _temporary(path):
            place.remove(path)
