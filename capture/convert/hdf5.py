"""A store as one HDF5 file, which h5py opens without us, and its reader.

    attributes            those of `Selection.attributes`: numbers and text as they are, the rest as JSON text,
                          and attributes_sha256 over all of them
    acts/<hook>           [row, ...] float32, float16, or bfloat16 kept as uint16 (attribute logical_dtype)
    rows/<column>         [row]
    seqs/<column>         [sequence] or [sequence, pos]
    stats/<hook>/<what>   [is_masked, t_bin, ...] float64

Every array has chunks of 256 rows with HDF5's own Fletcher-32 checksum, so that a damaged chunk is an error
for every HDF5 reader; HDF5 checks its own structure in files of this kind (version 1.10 or later).
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capture import schema
from capture.convert.chunked import CheckedRows
from capture.convert.selection import Selection
from capture.convert.sink import Sink
from capture.open_files import REMEDY, FileCache, OpenFile
from mdlm_interp.errors import ConfigError, StoreError

if TYPE_CHECKING:
    import h5py

SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""The first bytes of an HDF5 file."""
_VERSION = ("v110", "v110")
"""Files that HDF5 1.10 (2016) and later read; older ones have no checksums in their structure."""
_HASH = "attributes_sha256"
_AS_JSON = ("hooks", "shapes", "config", "provenance", "source")
"""Attributes that are JSON text."""
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""What h5py raises for a damaged file."""


def h5py_module() -> Any:
    """The h5py package.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return import_module("h5py")
    except ImportError:
        raise ConfigError(
            "HDF5 files need h5py, which is not installed: pip install 'mdlm-interp[hdf5]'"
        ) from None


def write_hdf5(selection: Selection, path: Path, advance: Callable[[int], object]) -> None:
    """Write an HDF5 file, an array after the other; little is in memory at a time.

    Args:
        advance: Called with the number of bytes written since the last call.
    """
    with Hdf5Writer.open(path) as writer:
        writer.attributes(selection.attributes())
        layout = selection.layout
        lossy = {} if layout.dtype == "float32" else {"logical_dtype": layout.dtype, "lossy": True}
        for hook in selection.hooks:
            shape, axes = (selection.n_rows, *layout.shapes[hook]), ("row", *(schema.row_axes(hook) or ()))
            dtype = schema.ARRAY_TYPES[layout.dtype]
            writer.array(f"acts/{hook}", shape, dtype, axes, lossy)
            writer.fill(f"acts/{hook}", selection.act_blocks(hook), advance)
        for name, column in selection.store.row_columns.items():
            described = {"description": column.description}
            writer.array(f"rows/{name}", (selection.n_rows,), np.dtype(column.dtype), ("row",), described)
            writer.fill(f"rows/{name}", selection.column_blocks(name), advance)
        for name, column in schema.SEQUENCE_COLUMNS.items():
            shape, described = selection.sequence_shape(name), {"description": column.description}
            writer.array(f"seqs/{name}", shape, np.dtype(column.dtype), ("sequence", "pos"), described)
            writer.fill(f"seqs/{name}", selection.sequence_blocks(name), advance)
        for hook in selection.hooks:
            for name, values in selection.statistics(hook).items():
                axes = ("is_masked", "t_bin", *(schema.row_axes(hook) or ()))
                writer.array(f"stats/{hook}/{name}", values.shape, values.dtype, axes, {})
                writer.fill(f"stats/{hook}/{name}", [values])


class Hdf5Writer:
    """An HDF5 file in the making; `Hdf5Writer.open` makes it."""

    def __init__(self, file: h5py.File, sink: Sink) -> None:
        self._file, self._sink = file, sink

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Hdf5Writer]:
        """A file to write.

        Raises:
            OSError: If the disk is full or failing.
        """
        with Sink(path) as sink:
            with h5py_module().File(sink, "w", libver=_VERSION) as file:
                yield cls(file, sink)
            sink.check()

    def attributes(self, attributes: Mapping[str, Any]) -> None:
        """The file's own attributes, with their hash."""
        plain = {k: json.dumps(value) if k in _AS_JSON else value for k, value in attributes.items()}
        for name, value in {**plain, _HASH: _attributes_hash(plain)}.items():
            self._file.attrs[name] = _fixed(value) if isinstance(value, str) else value

    def array(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: Sequence[str] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Make an array.

        Args:
            axes: Names of its axes, from the first on; more than it has are left out.
        """
        options: dict[str, Any] = {}
        if 0 not in shape:
            options = {"chunks": (min(schema.CHUNK_ROWS, shape[0]), *shape[1:]), "fletcher32": True}
        data = self._file.create_dataset(path, shape, dtype.newbyteorder("<"), **options)
        for axis, name in zip(data.dims, axes, strict=False):
            axis.label = name
        data.attrs.update(attributes or {})

    def fill(
        self, path: str, blocks: Iterable[NDArray[Any]], advance: Callable[[int], object] = lambda _: None
    ) -> None:
        """Write an array's rows in order.

        Args:
            advance: Called with the bytes of each block once they are written.
        """
        data, at = self._file[path], 0
        for block in blocks:
            data[at : at + len(block)] = block
            self._sink.check()
            at += len(block)
            advance(block.nbytes)
        assert at == len(data), f"{path}: {at} of {len(data)} rows"


class Hdf5Export:
    """An HDF5 file that `write_hdf5` wrote, for reading.

    Raises:
        StoreError: If it is damaged, or another program's.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.paths = str(path), [path]
        self._cache = FileCache()
        module = h5py_module()
        try:
            # Without a cache, since it is asked for each chunk once, and whole.
            self.file: h5py.File = module.File(self.name, "r", locking="best-effort", rdcc_nbytes=0)
        except _DAMAGE as error:
            raise self.damaged(error) from None
        self.attributes = self._checked_attributes()

    def content(self) -> OpenFile:
        """The file's bytes."""
        found = self._cache.get(self.name)
        if found is None:
            found = OpenFile(self.name)
            self._cache.add(found)
        return found

    def array(self, path: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> CheckedRows:
        """An array that must have this type and shape."""
        try:
            data = self.file[path]
            found, sizes, chunks = np.dtype(data.dtype), tuple(data.shape), data.chunks
        except _DAMAGE as error:
            raise self.damaged(error, path) from None
        if (found, sizes) != (dtype, shape) or (0 not in shape and (chunks or ())[1:] != shape[1:]):
            raise self.damaged(f"{found} {list(sizes)}, expected {dtype} {list(shape)}", path)
        return Hdf5Rows(self, path, dtype, shape, chunks[0] if chunks else 1)

    def verify(self, advance: Callable[[int], object]) -> None:
        """Nothing of its own: all is in the arrays, and reading them checks it."""

    def damaged(self, reason: object, path: str = "") -> StoreError:
        """The error for a file that cannot be trusted."""
        where = f"{path}: " if path else ""
        return StoreError(f"{self.name} is damaged ({where}{str(reason).strip(chr(34))}); {REMEDY}")

    def _checked_attributes(self) -> dict[str, Any]:
        try:
            stored = {name: _native(value) for name, value in self.file.attrs.items()}
        except _DAMAGE as error:
            raise self.damaged(error) from None
        if stored.get("format") != schema.FORMAT or _HASH not in stored:
            raise StoreError(f"{self.name} is an HDF5 file, but no export of this package")
        expected = stored.pop(_HASH)
        if _attributes_hash(stored) != expected:
            raise self.damaged("its attributes do not match their hash")
        return {name: json.loads(value) if name in _AS_JSON else value for name, value in stored.items()}


class Hdf5Rows(CheckedRows):
    """An array of an HDF5 file: a chunk is checked by HDF5, and later read from where it lies in the file."""

    def __init__(
        self, export: Hdf5Export, path: str, dtype: np.dtype[Any], shape: tuple[int, ...], chunk_rows: int
    ) -> None:
        super().__init__(rows=shape[0], row=shape[1:], dtype=dtype, chunk_rows=chunk_rows)
        self._export, self._path = export, path
        self._offsets: NDArray[np.int64] | None = None

    def _place(self, chunk: int) -> tuple[OpenFile, int]:
        if self._offsets is None:
            offsets = np.full(len(self._checked), -1)

            def remember(info: Any) -> None:
                offsets[info.chunk_offset[0] // self._chunk_rows] = info.byte_offset

            try:
                self._export.file[self._path].id.chunk_iter(remember)
            except _DAMAGE as error:
                raise self._export.damaged(error, self._path) from None
            self._offsets = offsets
        if self._offsets[chunk] < 0:
            raise self._export.damaged(f"chunk {chunk} is missing", self._path)
        return self._export.content(), int(self._offsets[chunk])

    def _read_checked(self, chunk: int, start: int, stop: int, out: NDArray[Any]) -> None:
        self._place(chunk)  # HDF5 reads a chunk that is not there as zeros
        try:
            self._export.file[self._path].read_direct(out, np.s_[start:stop])
        except _DAMAGE as error:
            raise self._export.damaged(f"rows {start} to {stop}: {error}", self._path) from None


def _fixed(text: str) -> NDArray[Any]:
    """Text as a string of fixed length.

    HDF5 keeps those of variable length in a heap without checksums, and reads on for ever where that is damaged.
    """
    content = text.encode()
    return np.array(content, dtype=h5py_module().string_dtype("utf-8", max(1, len(content))))


def _native(value: Any) -> Any:
    found = value.item() if isinstance(value, np.generic) else value
    return found.decode() if isinstance(found, bytes) else found


def _attributes_hash(attributes: Mapping[str, str | int | bool]) -> str:
    return hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()
