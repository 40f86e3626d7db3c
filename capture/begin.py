"""Makes a store, or finds the one that the same request began; anything else is refused and left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import zarr

from capture import manifest as manifests
from capture import schema
from capture.manifest import Manifest
from capture.metadata import made_here, read_metadata, read_whole
from capture.places import Place
from capture.store_files import read_manifest
from mdlm_interp.errors import OutputExistsError, StoreError

SAME_STACK = ("device", "threads", "cpu", "versions.torch", "versions.numpy", "native_bits")
"""Of the provenance: what changes the rounding of native activations."""
SAME_ALWAYS = ("weights_sha256", "tokenizer_sha256", "sources", "packing", "schedule")


def begin(
    place: Place,
    layout: schema.Layout,
    attributes: Mapping[str, Any],
    planned_rows: int,
    rank: int,
    world_size: int,
) -> Manifest:
    """What this rank has committed of the store, which is made if there is none.

    Raises:
        OutputExistsError: If something else is there, or a store that another request began.
        StoreError: If its metadata is damaged, or other processes began it.
    """
    if not place.exists():
        with place.create(f"rank-{rank}") as made:
            _make(made, layout, attributes, planned_rows, world_size)
    return begun(place, attributes, rank, world_size)


def begun(place: Place, attributes: Mapping[str, Any], rank: int, world_size: int) -> Manifest:
    """The same of a place where something is; writes nothing."""
    try:
        whole = read_manifest(place)
    except StoreError:
        if made_here(place):
            raise
        raise OutputExistsError(
            f"{place.name} exists and is no activation store; choose another --out, or remove it first"
        ) from None
    header = read_metadata(place, files=whole.files).get("attributes")
    refuse_another(
        place.name, header if isinstance(header, dict) else {}, attributes, complete=whole.complete
    )
    if whole.complete:
        return whole
    own = place.read(manifests.rank_manifest(rank, world_size))
    if own is not None:
        return manifests.from_bytes(own, f"{place.name}/{manifests.rank_manifest(rank, world_size)}")
    # The last of the ranks may have completed the store meanwhile.
    whole = read_manifest(place)
    if whole.complete:
        return whole
    before = manifests.world_size_of(place.names()) or 1
    raise StoreError(
        f"{place.name} was begun by {before} process{'es' if before > 1 else ''} and is not complete; go on with "
        f"--world-size {before}, got {world_size}"
    )


def _make(
    place: Place, layout: schema.Layout, attributes: Mapping[str, Any], planned_rows: int, world_size: int
) -> None:
    header = {
        "format": schema.FORMAT,
        "schema_version": schema.SCHEMA_VERSION,
        "hooks": list(layout.shapes),
        "dtype": layout.dtype,
    }
    group = zarr.create_group(place.zarr_store(), attributes={**header, **attributes})
    schema.create_row_arrays(group, layout, planned_rows)
    root = read_whole(place, "zarr.json")
    empty = Manifest(
        length=layout.length,
        shard_rows=layout.shard_rows,
        planned_rows=planned_rows,
        files={"zarr.json": hashlib.sha256(root).hexdigest()},
    )
    for rank in range(world_size):
        place.replace(manifests.rank_manifest(rank, world_size), manifests.to_bytes(empty))


def refuse_another(
    name: str, header: Mapping[str, Any], attributes: Mapping[str, Any], *, complete: bool
) -> None:
    """Raise OutputExistsError unless a store's attributes are those of this request."""
    stored, asked = header.get("config"), attributes["config"]
    if not isinstance(stored, Mapping) or not isinstance(header.get("provenance"), Mapping):
        raise StoreError(f"{name}/zarr.json lacks config or provenance; restore it from a copy")
    for key in [*asked, *(key for key in stored if key not in asked)]:
        if stored.get(key) != asked.get(key):
            raise _another(name, key, stored.get(key), asked.get(key), "choose another --out")
    before, now = header["provenance"], attributes["provenance"]
    for key in SAME_ALWAYS:
        if before.get(key) != now.get(key):
            raise _another(name, key, before.get(key), now.get(key), _remedy(key, before.get(key)))
    if asked["arithmetic"] == "native" and not complete:
        for key in SAME_STACK:
            if item(before, key) != item(now, key):
                raise _another(name, key, item(before, key), item(now, key), _remedy(key, item(before, key)))


def item(record: Mapping[str, Any], key: str) -> Any:
    """A value of a nested record by its dotted name."""
    top, _, rest = key.partition(".")
    return item(record[top], rest) if rest else record.get(top)


def _remedy(key: str, before: Any) -> str:
    if before is None:
        return "an earlier version of this package began it; go on with that one, or choose another --out"
    if key in SAME_ALWAYS:
        return "choose another --out"
    if key == "native_bits":
        return (
            "this machine rounds otherwise, by its processor or by settings such as MKL_CBWR; go on where it was "
            "begun, or choose another --out"
        )
    remedy = "go on with that one, or the rows would differ in rounding"
    if key == "threads":
        remedy += f"; OMP_NUM_THREADS={before} and --forwards 1 give it anywhere"
    return remedy


def _another(name: str, key: str, before: Any, now: Any, remedy: str) -> OutputExistsError:
    return OutputExistsError(f"{name} was begun with {key} {before!r}, got {now!r}; {remedy}")
