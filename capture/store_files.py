"""The files of a store for its reader: manifest, checked metadata, arrays, and what is pending.

What is committed comes from the manifest; while several ranks write, from all of theirs. Of a complete store
the manifest has the SHA-256 of every zarr.json, and the columns of `seqs` are arrays; until then the
`pending` file of each shard holds the sequences that end in it.
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from capture import manifest as manifests
from capture import schema
from capture.manifest import MANIFEST, Manifest, Shard
from capture.metadata import made_here, read_metadata
from capture.open_files import REMEDY, FileCache
from capture.places import Directory, Place
from capture.row_files import RowFiles, array_layout
from capture.statistics import MOMENTS, RunningMoments
from capture.zarr_rows import ZarrRows
from mdlm_interp.errors import StoreError, nearest

SEQUENCE_CHUNKS_READ = 8
"""Chunks of a column of sequences that are hashed together."""


@runtime_checkable
class RowArray(Protocol):
    """An array by rows, wherever it is. Values come as they are stored."""

    rows: int
    """Size of the first axis, which may be more than is committed."""
    dtype: np.dtype[Any]
    row: tuple[int, ...]
    """Sizes of the other axes."""

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Consecutive rows, checked."""
        ...

    def take(
        self,
        rows: NDArray[np.int64],
        out: NDArray[Any],
        positions: NDArray[np.int64] | None,
        *,
        check: bool = True,
    ) -> None:
        """Copy rows, which ascend, to these positions of `out`; to the first ones in order if none.

        Args:
            check: Compare checksums of chunks that were not checked before, which reads them whole.
        """
        ...

    def prefetch(self, rows: NDArray[np.int64], *, check: bool = True) -> None:
        """Begin to fetch what `take` of these rows would read; returns at once."""
        ...


def read_manifest(place: Place) -> Manifest:
    """What is committed, by all ranks.

    Raises:
        StoreError: If there is no manifest, or one is damaged.
    """
    # The last rank may be replacing the manifests of all by one.
    missing: list[str] = []
    for _ in range(3):
        names = place.names()
        world_size = 1 if MANIFEST in names else manifests.world_size_of(names) or 0
        if not world_size:
            raise _no_store(place)
        wanted = [manifests.rank_manifest(rank, world_size) for rank in range(world_size)]
        found = {name: place.read(name) for name in wanted}
        missing = [name for name, content in found.items() if content is None]
        if not missing:
            return manifests.joined(
                [
                    manifests.from_bytes(content, f"{place.name}/{name}")
                    for name, content in found.items()
                    if content is not None
                ]
            )
    raise StoreError(f"{place.name}/{missing[0]} is missing; {REMEDY}")


def _no_store(place: Place) -> StoreError:
    if made_here(place):
        return StoreError(f"{place.name}/{MANIFEST} is missing; {REMEDY}")
    if not isinstance(place, Directory):
        return StoreError(f"{place.name} has no {MANIFEST}: it is no activation store")
    root = place.root
    if not root.exists():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        return StoreError(f"{root} does not exist{nearest(root.name, siblings)}")
    if not root.is_dir():
        return StoreError(f"{root} is a file, not a store")
    inside = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}"))
    hint = f"; did you mean {str(root / inside[0])!r}?" if inside else ""
    return StoreError(f"{root} has no {MANIFEST}: it is no activation store{hint}")


class StoreFiles:
    """A store's files as of one manifest.

    Args:
        manifest: What is committed; none takes what the place says.
    """

    def __init__(self, place: Place, manifest: Manifest | None = None) -> None:
        self.place = place
        self.manifest = read_manifest(place) if manifest is None else manifest
        self._cache = FileCache()
        self._arrays: dict[str, RowArray] = {}
        self._columns: dict[str, NDArray[Any]] = {}

    def metadata(self, node: str = "") -> dict[str, Any]:
        """The zarr.json of an array, or of the store itself."""
        return read_metadata(self.place, node, self.manifest.files)

    def array(self, path: str) -> RowArray:
        """An array by its path in the store, opened once."""
        found = self._arrays.get(path)
        if found is None:
            found = self._arrays[path] = self._open(path)
        return found

    def _open(self, path: str) -> RowArray:
        metadata = self.metadata(path)
        try:
            layout = array_layout(metadata)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            message = f"{type(error).__name__}: {error}"
            raise StoreError(f"{self.place.name}/{path}/zarr.json is damaged ({message}); {REMEDY}") from None
        if path.partition("/")[0] in ("acts", "rows"):
            self._check_size(path, layout.rows, layout.shard.rows)
        if isinstance(self.place, Directory):
            return RowFiles(self.place.root / path, layout, self._cache)
        return ZarrRows(self.place, path)

    def _check_size(self, path: str, rows: int, shard_rows: int) -> None:
        committed = self.manifest.committed_rows
        if shard_rows != self.manifest.shard_rows or (self.manifest.complete and rows != committed):
            raise StoreError(
                f"{self.place.name}/{path}/zarr.json has {rows} rows in shards of {shard_rows}, {MANIFEST} has "
                f"{committed} in shards of {self.manifest.shard_rows}; {REMEDY}"
            )

    def committed(self) -> Iterator[Shard]:
        """The shards that readers may trust, in order."""
        committed = self.manifest.committed_rows
        return (shard for shard in self.manifest.shards if shard.rows[1] <= committed)

    def pending(self, shard: Shard, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Those of these arrays that are in the pending file of a shard of an incomplete store."""
        found = load(self.pending_content(shard))
        return {name: found[name] for name in names if name in found}

    def pending_content(self, shard: Shard) -> bytes:
        """That file, which is the one that the manifest lists.

        Raises:
            StoreError: If it is missing or damaged.
        """
        path = f"{schema.PENDING}/{shard.rows[0] // self.manifest.shard_rows}.safetensors"
        content = self.place.read(path)
        if content is None:
            raise StoreError(
                f"{self.place.name}/{path} is missing; if the capture went on since this store was opened, "
                f"open it again, otherwise {REMEDY}"
            )
        if google_crc32c.value(content) != shard.pending:
            raise StoreError(f"{self.place.name}/{path} is damaged (not the one in {MANIFEST}); {REMEDY}")
        return content

    def moments(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, RunningMoments]:
        """Of an incomplete store: the sums over all committed rows of each hook, by its row's shape.

        Every pending file is read once, whatever the number of hooks.
        """
        moments = {hook: RunningMoments(shape) for hook, shape in shapes.items()}
        names = [f"stats/{hook}/{part}" for hook in shapes for part in MOMENTS]
        for shard in self.committed():
            found = self.pending(shard, names)
            for hook, running in moments.items():
                later = RunningMoments(shapes[hook])
                for part in MOMENTS:
                    setattr(later, part, found[f"stats/{hook}/{part}"])
                running.merge(later)
        return moments

    def sequence_column(self, name: str) -> NDArray[Any]:
        """A column of all committed sequences [sequence] or [sequence, pos], read once; not to be changed."""
        found = self._columns.get(name)
        if found is None:
            blocks = list(self.sequence_blocks(name))
            empty = np.empty(self.sequence_shape(name, 0), schema.SEQUENCE_COLUMNS[name].dtype)
            found = self._columns[name] = np.concatenate([empty, *blocks])
        return found

    def sequence_shape(self, name: str, sequences: int) -> tuple[int, ...]:
        """Shape of a column of that many sequences."""
        per_position = schema.SEQUENCE_COLUMNS[name].per_position
        return (sequences, self.manifest.length) if per_position else (sequences,)

    def sequence_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The same in portions."""
        total, done = self.manifest.n_sequences, 0
        for block in self._stored_blocks(name) if self.manifest.complete else self._pending_blocks(name):
            if block.shape != self.sequence_shape(name, len(block)):
                raise StoreError(
                    f"{self.place.name}: {name} of sequences has shape {list(block.shape)}; {REMEDY}"
                )
            done += len(block)
            yield block
        if done != total:
            raise StoreError(f"{self.place.name} has {done} of {total} sequences; {REMEDY}")

    def _stored_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        array = self.array(f"seqs/{name}")
        step = SEQUENCE_CHUNKS_READ * schema.SEQUENCE_CHUNK
        for start in range(0, array.rows, step):
            yield array.read(start, min(start + step, array.rows))

    def _pending_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        for shard in self.committed():
            yield from self.pending(shard, [f"seqs/{name}"]).values()
