"""What a store says about itself, before any of its rows is read: where it is, its hooks, how it was captured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zarr.core.sync import sync

from capture import schema
from capture.manifest import Manifest, check_version
from capture.open_files import REMEDY
from capture.places import Directory, Place
from capture.store_files import StoreFiles
from mdlm_interp.errors import StoreError


class StoreHeader:
    """The attributes and the manifest of a store.

    Raises:
        StoreError: If its attributes are not those of a store that this version reads.
    """

    def __init__(self, place: Place, files: StoreFiles | None = None) -> None:
        self._place, self._files = place, StoreFiles(place) if files is None else files
        self._rows = self._files.manifest.committed_rows
        attributes = self._files.metadata().get("attributes")
        if not isinstance(attributes, dict) or attributes.get("format") != schema.FORMAT:
            raise StoreError(
                f"{place.name} is a Zarr group, but not one of {schema.FORMAT!r}; was another program's given?"
            )
        check_version(attributes.get("schema_version"), f"{place.name}/zarr.json")
        for name in ("hooks", "dtype", "config", "provenance"):
            if name not in attributes:
                raise StoreError(f"{place.name}/zarr.json lacks the attribute {name!r}; {REMEDY}")
        if attributes["dtype"] not in schema.ARRAY_TYPES:
            raise StoreError(f"{place.name}/zarr.json has an unknown dtype {attributes['dtype']!r}; {REMEDY}")
        self._attributes: Mapping[str, Any] = attributes
        self._hooks = tuple(str(hook) for hook in attributes["hooks"])

    def __len__(self) -> int:
        """Committed rows."""
        return self._rows

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        return f"ActivationStore({self.name!r}, {len(self)} rows, {len(self.hooks)} hooks, {state})"

    @property
    def name(self) -> str:
        """The directory or URL."""
        return self._place.name

    @property
    def place(self) -> Place:
        """What holds the store's files."""
        return self._place

    @property
    def path(self) -> Path:
        """Directory of the store.

        Raises:
            StoreError: If it is not in a local directory.
        """
        if not isinstance(self._place, Directory):
            raise StoreError(f"{self.name} is no local directory; copy the store to one first")
        return self._place.root

    @property
    def files(self) -> StoreFiles:
        """The arrays as they are stored, for what copies them bit for bit."""
        return self._files

    @property
    def manifest(self) -> Manifest:
        """What is committed, and the shards."""
        return self._files.manifest

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the recorded hook points, in execution order."""
        return self._hooks

    @property
    def dtype(self) -> schema.StoredType:
        """Type that activations are stored in; they are read as float32."""
        dtype: schema.StoredType = self._attributes["dtype"]
        return dtype

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved `CaptureConfig` as plain values, but for how it was run."""
        return dict(self._attributes["config"])

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the rows came from: hashes, versions, schedule, batch shape."""
        return dict(self._attributes["provenance"])

    @property
    def sampled(self) -> bool:
        """Whether the rows come from a sampler, and not from text that was noised."""
        return self._attributes["config"].get("sampler") is not None

    @property
    def row_columns(self) -> Mapping[str, schema.Column]:
        """The columns of the rows: `schema.ROW_COLUMNS`, and of a sampler's store `schema.SAMPLER_COLUMNS`."""
        return schema.row_columns(sampled=self.sampled)

    @property
    def positions(self) -> str:
        """Which positions of a sequence were recorded: all, masked, unmasked, every or random."""
        return str(self._attributes["config"].get("positions", "all"))

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.manifest.length

    @property
    def n_sequences(self) -> int:
        """Sequences whose rows are all committed."""
        return self.manifest.n_sequences

    @property
    def planned_rows(self) -> int:
        """Rows expected when the capture began; of a complete store, those that there are."""
        return self.manifest.planned_rows

    @property
    def complete(self) -> bool:
        """Whether the capture ran to its end."""
        return self.manifest.complete

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all the store's files."""
        if not isinstance(self._place, Directory):
            return int(sync(self._place.zarr_store().getsize_prefix("")))
        total = 0
        for top, _, names in os.walk(self._place.root):
            for name in names:
                with suppress(FileNotFoundError):  # of a capture that goes on
                    total += os.path.getsize(os.path.join(top, name))
        return total
