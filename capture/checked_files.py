"""The files of a store against their checksums and the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np

from capture import schema
from capture.finish import file_hashes
from capture.manifest import Manifest, Shard
from capture.metadata import check_arrays, read_whole
from capture.open_files import REMEDY
from capture.places import Place
from capture.reader import ActivationStore
from capture.shards import CRC_BYTES, ShardShape, index_bytes, shard_digest
from capture.store_files import StoreFiles
from mdlm_interp.errors import StoreError

READERS = 4
"""Files that are checked at a time."""


def verify_files(store: ActivationStore, *, progress: Any = None) -> tuple[int, int]:
    """Read the files of a store and compare them with the manifest.

    Of an incomplete store these are the files that are committed, and the metadata.

    Args:
        progress: Called with the number of rows of each shard that was found right.
    Returns:
        (files, bytes) read, the manifest not counted.
    Raises:
        StoreError: If a file is missing or any of its bits differs.
    """
    place, layout = store.place, store.layout
    files = size = 0
    with ThreadPoolExecutor(READERS) as pool:
        checked = pool.map(lambda shard: _verify_shard(store, layout, shard), store.manifest.shards)
        for (count, total), shard in zip(checked, store.manifest.shards, strict=True):
            files, size = files + count, size + total
            if progress is not None:
                progress(shard.rows[1] - shard.rows[0])
    if not store.complete:
        count, total = check_begun(place, store.manifest, layout)
        return files + count, size + total
    found = file_hashes(place)
    for path, expected in store.manifest.files.items():
        if path not in found or found[path][0] != expected:
            what = "differs from the manifest" if path in found else "is missing"
            raise StoreError(f"{place.name}/{path} {what}; {REMEDY}")
    strange = [path for path in found if path not in store.manifest.files]
    if strange:
        raise StoreError(f"{place.name}/{strange[0]} is no file of this store; remove it")
    files, size = files + len(found), size + sum(count for _, count in found.values())
    return files, size


def check_begun(place: Place, manifest: Manifest, layout: schema.Layout) -> tuple[int, int]:
    """Compare what the end of a capture needs of its beginning, but for the shards themselves.

    Args:
        manifest: Of all ranks, or of one for its share.
    Returns:
        (files, bytes) read.
    Raises:
        StoreError: If the metadata or a pending file is missing or damaged.
    """
    files = StoreFiles(place, manifest)
    files.metadata()
    count, size = check_arrays(place, layout, max(1, manifest.committed_rows))
    root = read_whole(place, "zarr.json")
    with ThreadPoolExecutor(READERS) as pool:
        pending = list(pool.map(lambda shard: len(files.pending_content(shard)), manifest.shards))
    return count + 1 + len(pending), size + len(root) + sum(pending)


def check_shards(place: Place, manifest: Manifest, layout: schema.Layout) -> None:
    """Compare which files of rows are there, and their sizes, with the manifest; their content is not read.

    Raises:
        StoreError: If one is missing or has another size.
    """
    expected = [file for shard in manifest.shards for file in _shard_files(layout, shard)]
    for (path, size), found in zip(expected, place.sizes([path for path, _ in expected]), strict=True):
        if found is None:
            raise StoreError(f"{place.name}/{path} is missing; {REMEDY}")
        if found != size:
            raise _damaged(place, path, f"it has {found} bytes, expected {size}")


def _shard_files(layout: schema.Layout, shard: Shard) -> Iterator[tuple[str, int]]:
    """Path and bytes of each file of a shard."""
    number = shard.rows[0] // layout.shard_rows
    chunks = -(-(shard.rows[1] - shard.rows[0]) // schema.CHUNK_ROWS)
    for hook, row in layout.shapes.items():
        shape = layout.shard_shape(hook)
        size = chunks * (shape.chunk_bytes + CRC_BYTES) + shape.index_bytes
        yield schema.file_of(f"acts/{hook}", 1 + len(row), number), size
    for name, column in layout.row_columns.items():
        size = layout.shard_rows * np.dtype(column.dtype).itemsize + CRC_BYTES
        yield schema.file_of(f"rows/{name}", 1, number), size


def _verify_shard(store: ActivationStore, layout: schema.Layout, shard: Shard) -> tuple[int, int]:
    place, number = store.place, shard.rows[0] // layout.shard_rows
    checksums: dict[str, Sequence[int]] = {}
    size = 0
    for hook, row in layout.shapes.items():
        path = schema.file_of(f"acts/{hook}", 1 + len(row), number)
        content = read_whole(place, path)
        chunks = -(-(shard.rows[1] - shard.rows[0]) // schema.CHUNK_ROWS)
        checksums[f"acts/{hook}"] = _chunks(place, path, content, layout.shard_shape(hook), chunks)
        size += len(content)
    for name, column in layout.row_columns.items():
        path = schema.file_of(f"rows/{name}", 1, number)
        content = read_whole(place, path)
        if len(content) != layout.shard_rows * np.dtype(column.dtype).itemsize + CRC_BYTES:
            raise _damaged(place, path, f"it has {len(content)} bytes")
        checksums[f"rows/{name}"] = [_checked(place, path, memoryview(content), "its only chunk")]
        size += len(content)
    if shard_digest(checksums) != shard.sha256:
        raise StoreError(
            f"{place.name}: the files of rows {shard.rows[0]} to {shard.rows[1]} are whole, but not the ones that "
            f"the manifest lists; restore them from a copy or capture again"
        )
    return len(checksums), size


def _chunks(place: Place, path: str, content: bytes, shape: ShardShape, present: int) -> list[int]:
    """Checksums of the chunks of a shard file, all of which hold."""
    index = index_bytes(shape, present)
    step = shape.chunk_bytes + CRC_BYTES
    if len(content) != present * step + len(index):
        raise _damaged(place, path, f"it has {len(content)} bytes, expected {present * step + len(index)}")
    if content[-len(index) :] != index:
        raise _damaged(place, path, "its index differs")
    view = memoryview(content)
    return [
        _checked(place, path, view[chunk * step : (chunk + 1) * step], f"chunk {chunk}")
        for chunk in range(present)
    ]


def _checked(place: Place, path: str, chunk: memoryview, which: str) -> int:
    computed = google_crc32c.value(np.frombuffer(chunk[:-CRC_BYTES], np.uint8))
    if computed != int.from_bytes(chunk[-CRC_BYTES:], "little"):
        raise _damaged(place, path, f"the checksum of {which} does not match")
    return int(computed)


def _damaged(place: Place, path: str, reason: str) -> StoreError:
    return StoreError(f"{place.name}/{path} is damaged ({reason}); {REMEDY}")
