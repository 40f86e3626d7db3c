"""Reads a store: activations and coordinates of any rows, as torch tensors.

Only committed rows exist for a reader; what an interrupted run left behind them is never read. A chunk
whose checksum does not match, or a file that is gone, is an error that names the file.
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.storage import LocalStore

from capture import schema
from capture.manifest import Manifest, check_version, read_manifest
from capture.statistics import HookStatistics, RunningMoments
from mdlm_interp.errors import StoreError, nearest
from mdlm_interp.shapes import Float64, Int64

LONG_RUN = 32
"""Consecutive rows, on average, from which slices are faster than zarr's selection by number."""

Rows: TypeAlias = "slice | Sequence[int] | NDArray[np.integer[Any]] | Tensor"


def open_store(path: str | Path) -> ActivationStore:
    """Open an activation store for reading, complete or not.

    Raises:
        StoreError: If there is no store, its metadata is damaged, or a later version wrote it.
    """
    root = Path(path)
    if not root.is_dir():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        what = "is a file, not a store" if root.exists() else "does not exist"
        raise StoreError(f"{root} {what}{nearest(root.name, siblings) if not root.exists() else ''}")
    manifest = read_manifest(root)
    try:
        group = zarr.open_group(LocalStore(root, read_only=True), mode="r")
        attributes = dict(group.attrs)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise StoreError(
            f"{root / 'zarr.json'} is missing or damaged ({error}); restore it from a copy"
        ) from None
    if attributes.get("format") != schema.FORMAT:
        raise StoreError(
            f"{root} is a Zarr group, but not one of {schema.FORMAT!r}; was another program's given?"
        )
    check_version(attributes.get("schema_version"), root / "zarr.json")
    for name in ("hooks", "config", "provenance"):
        if name not in attributes:
            raise StoreError(f"{root / 'zarr.json'} lacks the attribute {name!r}; restore it from a copy")
    return ActivationStore(root, group, attributes, manifest)


class ActivationStore:
    """Activations of a model over noised text, one row a token; `open_store` makes it."""

    def __init__(
        self, root: Path, group: zarr.Group, attributes: Mapping[str, Any], manifest: Manifest
    ) -> None:
        self.path = root
        """Directory of the store."""
        self.manifest = manifest
        """What is committed, and the shards."""
        self._group, self._attributes = group, attributes
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._times: Float64[Tensor, " sequence"] | None = None

    def __len__(self) -> int:
        """Committed rows."""
        return self.manifest.committed_rows

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        return f"ActivationStore({str(self.path)!r}, {len(self)} rows, {len(self.hooks)} hooks, {state})"

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the recorded hook points, in execution order."""
        return tuple(self._attributes["hooks"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved `CaptureConfig`, as plain values."""
        return dict(self._attributes["config"])

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the rows came from: hashes, versions, schedule, batch shape."""
        return dict(self._attributes["provenance"])

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.manifest.length

    @property
    def n_sequences(self) -> int:
        """Committed sequences."""
        return len(self) // self.length

    @property
    def complete(self) -> bool:
        """Whether the capture ran to its end."""
        return self.manifest.complete

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all the store's files."""
        return sum(
            os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(self.path) for name in names
        )

    def row_shape(self, hook: str) -> tuple[int, ...]:
        """Shape of one row of a hook: [d] for a residual stream, [head, d_head] for attention."""
        return tuple(self._acts(hook).shape[1:])

    def read(self, rows: Rows, hooks: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """Float32 activations [row, ...] by hook name, rows in the order asked for.

        Args:
            rows: A slice, which reads fastest, or row numbers in any order, also repeated.
            hooks: One name, several, or None for all.
        Raises:
            StoreError: If a row or hook is not in the store, or a chunk is damaged.
        """
        names = [hooks] if isinstance(hooks, str) else list(self.hooks if hooks is None else hooks)
        for name in names:
            self._acts(name)
        selection = self._selection(rows)
        return {name: torch.from_numpy(self._gather(f"acts/{name}", selection)) for name in names}

    def coords(self, rows: Rows) -> dict[str, Tensor]:
        """Every column of rows/ (seq, pos, x0, xt, is_masked, doc), and t, of the rows asked for."""
        selection = self._selection(rows)
        columns = {
            name: torch.from_numpy(self._gather(f"rows/{name}", selection)) for name in schema.ROW_COLUMNS
        }
        return {**columns, "t": self.times()[columns["seq"]]}

    def tokens(self) -> tuple[Int64[Tensor, "sequence pos"], Int64[Tensor, "sequence pos"]]:
        """Clean and noised token ids (x0, xt) of every committed sequence."""
        x0, xt = (torch.from_numpy(self._fetch(f"rows/{name}", slice(0, len(self)))) for name in ("x0", "xt"))
        return x0.view(-1, self.length), xt.view(-1, self.length)

    def times(self) -> Float64[Tensor, " sequence"]:
        """Diffusion time of every committed sequence, 0 clean to 1 all masked."""
        if self._times is None:
            self._times = torch.from_numpy(self._fetch("seqs/t", slice(0, self.n_sequences)))
        return self._times.clone()

    def statistics(self, hook: str) -> HookStatistics:
        """Count, mean and mean square by (masked, part of [0, 1] in t); of committed rows if incomplete."""
        array = self._acts(hook)
        if self.complete:
            stored = {name: self._fetch(f"stats/{hook}/{name}", slice(None)) for name in schema.STATISTICS}
            return HookStatistics.from_arrays(stored)
        moments = RunningMoments(tuple(array.shape[1:]))
        for rows in self._blocks():
            columns = self.coords(rows)
            acts = self._fetch(f"acts/{hook}", rows)
            moments.add(acts, columns["is_masked"].numpy(), columns["t"].numpy())
        return HookStatistics.from_arrays(moments.arrays())

    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of all committed acts, rows and seqs; reads them all."""
        content = schema.ContentHash()
        columns = {f"rows/{name}": column.dtype for name, column in schema.ROW_COLUMNS.items()}
        for name, dtype in {**{f"acts/{hook}": "float32" for hook in self.hooks}, **columns}.items():
            shape = (len(self), *self._array(name).shape[1:])
            content.add(name, dtype, shape, (self._fetch(name, rows) for rows in self._blocks()))
        for column_name, column in schema.SEQUENCE_COLUMNS.items():
            name = f"seqs/{column_name}"
            values = self._fetch(name, slice(0, self.n_sequences))
            content.add(name, column.dtype, values.shape, [values])
        return content.hexdigest()

    def _blocks(self) -> Iterator[slice]:
        """The committed rows, a shard at a time."""
        for shard in self.manifest.shards:
            start, stop = shard.rows
            if start < len(self):
                yield slice(start, min(stop, len(self)))

    def _selection(self, rows: Rows) -> slice | NDArray[np.int64]:
        """Rows as a checked slice with both ends, or as checked row numbers."""
        if isinstance(rows, slice):
            start, stop = rows.start or 0, len(self) if rows.stop is None else rows.stop
            if rows.step not in (None, 1):
                raise StoreError(
                    f"a slice of rows must have step 1, got {rows.step}; pass range(...) instead"
                )
            for end in (start, stop):
                if not 0 <= end <= len(self):
                    raise StoreError(self._out_of_range(end, f"a slice from {start} to {stop}"))
            return slice(start, max(start, stop))
        given = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        if given.size == 0:
            return slice(0, 0)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            hint = "; of a mask, pass mask.nonzero()" if given.dtype == np.bool_ else ""
            raise StoreError(
                f"rows must be a list of whole numbers, got {given.dtype} {list(given.shape)}{hint}"
            )
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= len(self):
            raise StoreError(self._out_of_range(low if low < 0 else high, "rows"))
        return given.astype(np.int64)

    def _out_of_range(self, row: int, what: str) -> str:
        planned = self.manifest.n_sequences * self.length
        state = (
            "" if self.complete else f"; the store is incomplete, {len(self)} of {planned} rows are committed"
        )
        return f"{what} must lie in [0, {len(self)}), got {row}{state}"

    def _gather(self, name: str, selection: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Values of rows in the order asked for."""
        if isinstance(selection, slice):
            return self._fetch(name, selection)
        if bool((np.diff(selection) > 0).all()):
            return self._fetch(name, selection)
        # Sorted, each chunk is decoded once.
        unique, inverse = np.unique(selection, return_inverse=True)
        return self._fetch(name, unique)[inverse]

    def _fetch(self, name: str, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Values of an array, each file checked; row numbers must ascend."""
        array = self._array(name)
        files = self._files(name, array, rows)
        for file in files.values():
            # Zarr reads a file that is not there as fill values.
            if not file.is_file():
                raise StoreError(f"{file} is missing; restore it from a copy or capture again")
        try:
            return np.asarray(array[rows] if isinstance(rows, slice) else _take(array, rows))
        except ValueError as error:  # what zarr raises for a checksum
            damaged = self._damaged(array, files) or self.path / name
            raise StoreError(
                f"{damaged} is damaged ({error}); restore it from a copy or capture again"
            ) from error

    def _files(self, name: str, array: zarr.Array[Any], rows: slice | NDArray[np.int64]) -> dict[int, Path]:
        """The files that hold these rows, by number."""
        per_file = (array.shards or array.chunks)[0]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(array.shape[0])
            numbers = range(start // per_file, -(-stop // per_file)) if stop > start else range(0)
        else:
            numbers = np.unique(rows // per_file).tolist()
        return {number: self.path / schema.file_of(name, array.ndim, number) for number in numbers}

    def _damaged(self, array: zarr.Array[Any], files: Mapping[int, Path]) -> Path | None:
        """The first of these files that does not read."""
        per_file = (array.shards or array.chunks)[0]
        for number, file in files.items():
            try:
                array[number * per_file : (number + 1) * per_file]
            except ValueError:
                return file
        return None

    def _acts(self, hook: str) -> zarr.Array[Any]:
        if hook not in self.hooks:
            raise StoreError(f"{self.path} holds no hook {hook!r}{nearest(hook, self.hooks)}")
        return self._array(f"acts/{hook}")

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            try:
                array = self._group[name]
            except (KeyError, ValueError, TypeError) as error:
                file = self.path / name / "zarr.json"
                raise StoreError(f"{file} is missing or damaged ({error}); restore it from a copy") from None
            if not isinstance(array, zarr.Array):
                raise StoreError(f"{self.path / name} is a group, expected an array; restore it from a copy")
            self._arrays[name] = array
        return self._arrays[name]


def _take(array: zarr.Array[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """Values of ascending rows: a slice for each run of them if the runs are long, else one by one."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1, [len(rows)]])
    if len(rows) < LONG_RUN * (len(starts) - 1):
        return np.asarray(array.oindex[rows])
    runs = [array[int(rows[start]) : int(rows[stop - 1]) + 1] for start, stop in pairwise(starts)]
    return np.asarray(runs[0]) if len(runs) == 1 else np.concatenate(runs)
