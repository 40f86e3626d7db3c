"""The shape of arrays, as their zarr.json tells other readers: a guess that grows, exact in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from capture import schema
from capture.places import Place
from mdlm_interp.errors import StoreError


def row_arrays(layout: schema.Layout) -> Iterator[str]:
    """Paths of every array with a row axis."""
    yield from (f"acts/{hook}" for hook in layout.shapes)
    yield from (f"rows/{name}" for name in layout.row_columns)


def grow(place: Place, layout: schema.Layout, rows: int) -> None:
    """Give the arrays at least this many rows."""
    with place.lock("shape", wait=True):
        for path in row_arrays(layout):
            metadata = _metadata(place, path)
            if metadata["shape"][0] < rows:
                _reshape(place, path, metadata, rows)


def set_rows(place: Place, layout: schema.Layout, rows: int) -> None:
    """Give the arrays exactly this many rows."""
    for path in row_arrays(layout):
        metadata = _metadata(place, path)
        if metadata["shape"][0] != rows:
            _reshape(place, path, metadata, rows)


def _metadata(place: Place, path: str) -> dict[str, Any]:
    content = place.read(f"{path}/zarr.json")
    if content is None:
        raise StoreError(f"{place.name}/{path}/zarr.json is missing; restore it from a copy")
    metadata: dict[str, Any] = json.loads(content)
    return metadata


def _reshape(place: Place, path: str, metadata: dict[str, Any], rows: int) -> None:
    # zarr's own resize is not atomic, and deletes chunks when an array shrinks.
    metadata["shape"][0] = rows
    place.replace(f"{path}/zarr.json", json.dumps(metadata, indent=2).encode())
