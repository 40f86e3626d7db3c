"""The shape of arrays, as their zarr.json tells other readers: a guess that grows, exact in the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import zarr
from zarr.storage import MemoryStore

from capture import schema
from capture.manifest import MANIFEST
from capture.open_files import REMEDY
from capture.places import Place
from mdlm_interp.errors import StoreError

READERS = 8
"""Small files that are read at a time: a service takes its time for each."""


def row_arrays(layout: schema.Layout) -> Iterator[str]:
    """Paths of every array with a row axis."""
    yield from (f"acts/{hook}" for hook in layout.shapes)
    yield from (f"rows/{name}" for name in layout.row_columns)


def grow(place: Place, layout: schema.Layout, rows: int) -> None:
    """Give the arrays at least this many rows."""
    with place.lock("shape", wait=True):
        for path in row_arrays(layout):
            metadata = read_metadata(place, path)
            if metadata["shape"][0] < rows:
                _reshape(place, path, metadata, rows)


def set_rows(place: Place, layout: schema.Layout, rows: int) -> None:
    """Give the arrays exactly this many rows."""
    for path in row_arrays(layout):
        metadata = read_metadata(place, path)
        if metadata["shape"][0] != rows:
            _reshape(place, path, metadata, rows)


def check_arrays(place: Place, layout: schema.Layout, rows: int) -> tuple[int, int]:
    """Compare the metadata of an incomplete store's arrays with what they were when they were made.

    Args:
        rows: Of every array at least.
    Returns:
        (files, bytes) compared.
    Raises:
        StoreError: If a file is missing or says anything else. Other versions may have made it so.
    """
    made: dict[str, Any] = {}
    schema.create_row_arrays(zarr.create_group(MemoryStore(made)), layout, rows)
    del made["zarr.json"]
    size = 0
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(partial(read_whole, place), made))
    for (path, buffer), content in zip(made.items(), contents, strict=True):
        expected, found = json.loads(buffer.to_bytes()), parsed(f"{place.name}/{path}", content)
        if "shape" in expected:
            given = found.get("shape")
            if isinstance(given, list) and given and type(given[0]) is int and given[0] > rows:
                expected["shape"][0] = given[0]
        if found != expected:
            wrong = next(key for key in {**expected, **found} if found.get(key) != expected.get(key))
            raise StoreError(
                f"{place.name}/{path} has another {wrong} than this version of zarr and of this package write; go on "
                f"with those that began the store, or {REMEDY}"
            )
        size += len(content)
    return len(made), size


def read_metadata(place: Place, node: str = "", files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The zarr.json of an array, or of the store itself.

    Args:
        files: SHA-256 by path, of those files that have not changed since the manifest recorded it.
    Raises:
        StoreError: If it is missing or damaged.
    """
    path = f"{node}/zarr.json" if node else "zarr.json"
    content = read_whole(place, path)
    recorded = (files or {}).get(path)
    if recorded is not None and hashlib.sha256(content).hexdigest() != recorded:
        raise StoreError(
            f"{place.name}/{path} is damaged (its SHA-256 is not the one in {MANIFEST}); {REMEDY}"
        )
    return parsed(f"{place.name}/{path}", content)


def made_here(place: Place) -> bool:
    """Whether the zarr.json there is that of a store of this package."""
    content = place.read("zarr.json")
    try:
        header = parsed(place.name, content or b"").get("attributes")
    except StoreError:
        return False
    return isinstance(header, dict) and header.get("format") == schema.FORMAT


def read_whole(place: Place, path: str) -> bytes:
    """A file of the store, which must be there.

    Raises:
        StoreError: If it is not, or cannot be read.
    """
    content = place.read(path)
    if content is None:
        raise StoreError(f"{place.name}/{path} is missing; {REMEDY}")
    return content


def parsed(name: str, content: bytes) -> dict[str, Any]:
    """The object that a zarr.json holds.

    Args:
        name: What an error calls the file.
    Raises:
        StoreError: If it holds none.
    """
    try:
        found = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise StoreError(f"{name} is damaged ({error}); {REMEDY}") from None
    if not isinstance(found, dict):
        raise StoreError(f"{name} is damaged (no JSON object); {REMEDY}")
    return found


def _reshape(place: Place, path: str, metadata: dict[str, Any], rows: int) -> None:
    # zarr's own resize is not atomic, and deletes chunks when an array shrinks.
    metadata["shape"][0] = rows
    place.replace(f"{path}/zarr.json", json.dumps(metadata, indent=2).encode())
