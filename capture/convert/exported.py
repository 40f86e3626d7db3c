"""Reads an HDF5 or safetensors export just as a store is read.

An export has the arrays of a store and what its metadata say, in another container. So its reader is the
store's, over other files.
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capture import schema
from capture.convert import hdf5, safetensors_files
from capture.convert.selection import EXPORT_VERSION
from capture.manifest import Manifest, ResumePoint, Shard, check_version
from capture.open_files import REMEDY
from capture.places import Directory
from capture.reader import ActivationStore, blocks
from capture.statistics import HookStatistics
from capture.store_files import RowArray, StoreFiles
from mdlm_interp.errors import StoreError


@runtime_checkable
class Container(Protocol):
    """What an export is in."""

    name: str
    attributes: dict[str, Any]
    """`Selection.attributes`, and what the container adds."""
    paths: list[Path]
    """Its files."""

    def array(self, path: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> RowArray:
        """An array that must have this type and shape.

        Raises:
            StoreError: If it has not, or is damaged.
        """
        ...

    def verify(self, advance: Callable[[int], object]) -> None:
        """Check what reading every array does not."""
        ...


def open_export(path: str | Path) -> ExportedStore | None:
    """The export at a path, or None if there is something else.

    Raises:
        StoreError: If it is damaged, or a later version wrote it.
        ConfigError: If it is an HDF5 file and h5py is not installed.
    """
    if "://" in str(path):
        return None
    path = Path(path)
    if path.is_file():
        try:
            with path.open("rb") as stream:
                start = stream.read(len(hdf5.SIGNATURE))
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
        return ExportedStore(path, hdf5.Hdf5Export(path)) if start == hdf5.SIGNATURE else None
    if (path / safetensors_files.INDEX).is_file():
        return ExportedStore(path, safetensors_files.SafetensorsExport(path))
    return None


class ExportedStore(ActivationStore):
    """An export, read as the store that it was made from; `open_store` makes it."""

    def __init__(self, path: Path, container: Container) -> None:
        _check_attributes(container)
        self._container, self._arrays = container, ExportFiles(path, container)
        super().__init__(Directory(path), self._arrays)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self._container.paths)

    @property
    def source(self) -> Mapping[str, Any]:
        """Which rows and sequences of a store these are, and the type that it kept them in."""
        return dict(self._container.attributes["source"])

    def statistics(self, hook: str) -> HookStatistics:
        """Count, mean and mean square by (masked, part of [0, 1] in t), of all its rows.

        They are sums of what the model gave, if all rows of the store were exported.
        """
        self.row_shape(hook)
        arrays = {name: self._arrays.array(f"stats/{hook}/{name}") for name in schema.STATISTICS}
        return HookStatistics.from_arrays({name: array.read(0, array.rows) for name, array in arrays.items()})

    def verify(self, advance: Callable[[int], object] = lambda _: None) -> tuple[int, int]:
        """Read everything and compare it with its checksums.

        Args:
            advance: Called with the number of bytes checked since the last call.
        Returns:
            (files, bytes) read.
        Raises:
            StoreError: If something is missing or any of its bits differs.
        """
        self._container.verify(lambda _: None)
        for path in self._arrays.paths():
            array = self._arrays.array(path)
            for block in blocks(array, array.rows):
                advance(block.nbytes)
        return len(self._container.paths), self.bytes_on_disk


class ExportFiles(StoreFiles):
    """The arrays of an export in the place of a store's files."""

    def __init__(self, path: Path, container: Container) -> None:
        super().__init__(Directory(path), _manifest(container.attributes))
        self._container = container

    def metadata(self, node: str = "") -> dict[str, Any]:
        """The attributes, as a store's zarr.json has them."""
        return {"attributes": self._container.attributes}

    def paths(self) -> Iterator[str]:
        """Paths of all arrays."""
        hooks = self._container.attributes["hooks"]
        yield from (f"acts/{hook}" for hook in hooks)
        yield from (f"rows/{name}" for name in self._row_columns())
        yield from (f"seqs/{name}" for name in schema.SEQUENCE_COLUMNS)
        yield from (f"stats/{hook}/{what}" for hook in hooks for what in schema.STATISTICS)

    def _open(self, path: str) -> RowArray:
        kind, _, name = path.partition("/")
        attributes = self._container.attributes
        shapes = {hook: tuple(shape) for hook, shape in attributes["shapes"].items()}
        if kind == "acts":
            dtype, shape = schema.ARRAY_TYPES[attributes["dtype"]], (attributes["rows"], *shapes[name])
        elif kind == "rows":
            dtype, shape = np.dtype(self._row_columns()[name].dtype), (attributes["rows"],)
        elif kind == "seqs":
            dtype = np.dtype(schema.SEQUENCE_COLUMNS[name].dtype)
            shape = self.sequence_shape(name, attributes["sequences"])
        else:
            hook, _, what = name.rpartition("/")
            row = shapes[hook] if what == "mean" else ()
            dtype, shape = np.dtype(np.float64), (2, schema.T_BINS, *row)
        return self._container.array(path, dtype, shape)

    def _row_columns(self) -> Mapping[str, schema.Column]:
        return schema.row_columns(sampled=self._container.attributes["config"].get("sampler") is not None)

    def _pending_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        # Of an incomplete store too, an export has the sequences that are whole.
        return self._stored_blocks(name)


def _check_attributes(container: Container) -> None:
    attributes, name = container.attributes, container.name
    check_version(attributes.get("schema_version"), name)
    version = attributes.get("export_version")
    if version != EXPORT_VERSION:
        raise StoreError(
            f"{name} has export_version {version!r}, this package reads {EXPORT_VERSION}; export again, or "
            f"update mdlm-interp"
        )


def _manifest(attributes: Mapping[str, Any]) -> Manifest:
    """One shard with everything."""
    rows = int(attributes["rows"])
    shard = Shard(
        rows=(0, rows),
        sequences=(0, int(attributes["sequences"])),
        sha256="",
        pending=0,
        not_finite=int(attributes["not_finite"]),
        resume=ResumePoint(),
    )
    return Manifest(
        length=int(attributes["length"]),
        shard_rows=schema.CHUNK_ROWS * -(-rows // schema.CHUNK_ROWS),
        planned_rows=int(attributes["planned_rows"]),
        complete=bool(attributes["complete"]),
        shards=(shard,),
    )
