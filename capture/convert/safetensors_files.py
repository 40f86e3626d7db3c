"""A store as a directory of safetensors files, which safetensors opens without us, and its reader.

    store.json                    `Selection.attributes`, sizes and SHA-256 of the files, and its own SHA-256
    shard-00000.safetensors       acts.<hook> and rows.<column> of the first rows, shard-00001 of the next
    sequences-00000.safetensors   seqs.<column> of the first sequences, and so on
    statistics.safetensors        stats.<hook>.<what>

Each file's own metadata has `crc32c`: JSON text with, for every tensor, the crc32c of each 256 rows. So a
reader can check what it reads without reading a whole file. bfloat16 is real bfloat16 here.
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from capture import schema
from capture.convert.chunked import CheckedRows
from capture.convert.selection import Selection, as_tensor, rechunked
from capture.open_files import REMEDY, FileCache, OpenFile
from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.errors import StoreError

INDEX = "store.json"
FILE_BYTES = 2**28
"""Of one file: what is in memory while it is written."""
_CHECKSUMS = "crc32c"
"""In a file's metadata; a single entry, as safetensors writes several in an order that differs each time."""
_MOST_HEADER = 10**8
"""Bytes of a header that safetensors itself still accepts."""
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint64": "U64",
    "bool": "BOOL",
    "uint16": "BF16",  # the only 16-bit integers of a store are bfloat16
}


def write_safetensors(selection: Selection, directory: Path, advance: Callable[[int], object]) -> None:
    """Fill an empty directory, a file after the other.

    Args:
        advance: Called with the number of bytes written since the last call.
    """
    layout = selection.layout
    sizes = {
        "rows_per_file": _rows_per_file(layout.row_bytes, selection.n_rows),
        "sequences_per_file": _rows_per_file(layout.sequence_bytes, selection.n_sequences),
    }
    hashes: list[tuple[str, int, Future[str]]] = []
    # A file is hashed while the next one is made.
    with ThreadPoolExecutor(1) as pool:
        for name, arrays in _contents(selection, sizes):
            size = _write(directory / name, arrays, selection.dtype)
            if hashes:
                hashes[-1][2].result()  # so that an error ends this
            hashes.append((name, size, pool.submit(sha256_of, directory / name)))
            advance(sum(values.nbytes for values in arrays.values()))
        files = [{"file": name, "bytes": size, "sha256": sha.result()} for name, size, sha in hashes]
    content = {**selection.attributes(), **sizes, "files": files}
    (directory / INDEX).write_text(_index_text(content), encoding="utf-8")


def _contents(
    selection: Selection, sizes: Mapping[str, int]
) -> Iterator[tuple[str, Mapping[str, NDArray[Any]]]]:
    """Each file's name and arrays."""
    step = sizes["rows_per_file"]
    memory = {hook: selection.memory(hook, min(step, selection.n_rows)) for hook in selection.hooks}
    for number, start in enumerate(range(0, selection.n_rows, step)):
        stop = min(start + step, selection.n_rows)
        acts = {f"acts.{hook}": selection.acts(hook, start, stop, memory[hook]) for hook in selection.hooks}
        rows = {f"rows.{name}": selection.column(name, start, stop) for name in selection.store.row_columns}
        yield f"shard-{number:05}.safetensors", {**acts, **rows}
    names = list(schema.SEQUENCE_COLUMNS)
    columns = [rechunked(selection.sequence_blocks(name), sizes["sequences_per_file"]) for name in names]
    for number, parts in enumerate(zip(*columns, strict=True)):
        arrays = {f"seqs.{name}": part for name, part in zip(names, parts, strict=True)}
        yield f"sequences-{number:05}.safetensors", arrays
    yield (
        "statistics.safetensors",
        {
            f"stats.{hook}.{what}": values
            for hook in selection.hooks
            for what, values in selection.statistics(hook).items()
        },
    )


def _rows_per_file(row_bytes: int, rows: int) -> int:
    """A multiple of a chunk; no more than there are."""
    wanted = min(FILE_BYTES // max(1, row_bytes), max(1, rows))
    return schema.CHUNK_ROWS * max(1, -(-wanted // schema.CHUNK_ROWS))


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], dtype: schema.StoredType) -> int:
    checksums = {name: " ".join(_checksums(values)) for name, values in arrays.items()}
    tensors = {
        name: as_tensor(values, dtype if name.startswith("acts.") else values.dtype.name)
        for name, values in arrays.items()
    }
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={_CHECKSUMS: json.dumps(checksums)})
    path.chmod(mode)  # safetensors makes its files private
    return path.stat().st_size


def _checksums(values: NDArray[Any]) -> Iterator[str]:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    for start in range(0, len(little), schema.CHUNK_ROWS):
        chunk = little[start : start + schema.CHUNK_ROWS].reshape(-1).view(np.uint8)
        yield f"{google_crc32c.value(chunk):08x}"


def _index_text(content: Mapping[str, Any]) -> str:
    """The JSON of the index, a line for each key, with its own SHA-256 at the end."""
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    return f'{{\n{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


class SafetensorsExport:
    """A directory that `write_safetensors` filled, for reading.

    Raises:
        StoreError: If it is damaged, or another program's.
    """

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._directory, self._cache = directory, FileCache()
        self.attributes = self._checked_index()
        self.paths = [directory / INDEX, *(directory / entry["file"] for entry in self.attributes["files"])]
        self._files = {path.name: TensorFile(path, self._cache) for path in self.paths[1:]}

    def array(self, path: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> CheckedRows:
        """An array that must have this type and shape."""
        kind = path.partition("/")[0]
        if kind == "stats":
            files, per_file = ["statistics.safetensors"], shape[0]
        else:
            stem, key = ("shard", "rows") if kind in ("acts", "rows") else ("sequences", "sequences")
            per_file = int(self.attributes[f"{key}_per_file"])
            files = [f"{stem}-{number:05}.safetensors" for number in range(-(-shape[0] // per_file))]
        missing = [file for file in files if file not in self._files]
        if missing:
            raise StoreError(f"{self.name}/{INDEX} does not list {missing[0]}; {REMEDY}")
        return TensorRows(
            [self._files[file] for file in files], path.replace("/", "."), dtype, shape, per_file
        )

    def verify(self, advance: Callable[[int], object]) -> None:
        """Compare each file with its SHA-256.

        Raises:
            StoreError: If one is missing or damaged.
        """
        for entry in self.attributes["files"]:
            path = self._directory / entry["file"]
            try:
                found = sha256_of(path)
            except OSError as error:
                raise StoreError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
            if found != entry["sha256"]:
                raise StoreError(f"{path} is damaged (its SHA-256 is not the one in {INDEX}); {REMEDY}")
            advance(entry["bytes"])

    def _checked_index(self) -> dict[str, Any]:
        name = f"{self.name}/{INDEX}"
        try:
            text = (self._directory / INDEX).read_text(encoding="utf-8")
            content = json.loads(text)
        except OSError as error:
            raise StoreError(f"{name} cannot be read ({error.strerror}); {REMEDY}") from None
        except ValueError as error:
            raise StoreError(f"{name} is damaged ({error}); {REMEDY}") from None
        if not isinstance(content, dict) or content.get("format") != schema.FORMAT:
            raise StoreError(f"{name} is not one that this package wrote")
        content.pop("sha256", None)
        if _index_text(content) != text:
            raise StoreError(f"{name} is damaged (it does not match its own SHA-256); {REMEDY}")
        return content


class TensorFile:
    """A safetensors file, whose header is read when it is first used."""

    def __init__(self, path: Path, cache: FileCache) -> None:
        self.path = path
        self._cache = cache

    def content(self) -> OpenFile:
        """The file's bytes."""
        found = self._cache.get(str(self.path))
        if found is None:
            found = OpenFile(str(self.path))
            self._cache.add(found)
        return found

    def tensor(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        """Where a tensor of this type and shape begins, and its checksums."""
        header, data = self._header
        try:
            entry = header[name]
            start, stop = (int(offset) for offset in entry["data_offsets"])
            checksums = [int(text, 16) for text in self._checksums[name].split()]
            described = entry["dtype"], list(entry["shape"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(f"{name}: {type(error).__name__}: {error}") from None
        expected = _TYPES[dtype.name], list(shape)
        if described != expected:
            raise self.damaged(
                f"{name} is {described[0]} {described[1]}, expected {expected[0]} {expected[1]}"
            )
        if start < 0 or stop - start != prod(shape) * dtype.itemsize:
            raise self.damaged(f"{name} has {stop - start} bytes, expected {prod(shape) * dtype.itemsize}")
        return data + start, checksums

    def damaged(self, reason: str) -> StoreError:
        """The error for a file that cannot be trusted."""
        return StoreError(f"{self.path} is damaged ({reason}); {REMEDY}")

    @cached_property
    def _checksums(self) -> dict[str, str]:
        """The crc32c of each 256 rows, by tensor."""
        found: dict[str, str] = json.loads(self._header[0]["__metadata__"][_CHECKSUMS])
        return found

    @cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        """The header, and where the data after it begin."""
        file = self.content()
        length = bytearray(8)
        file.read([length], 0, 8)
        size = int.from_bytes(length, "little")
        if size > min(_MOST_HEADER, file.identity()[2]):
            raise self.damaged("its header is longer than the file")
        text = bytearray(size)
        file.read([text], 8, size)
        try:
            header = json.loads(text.decode("utf-8"))
        except ValueError as error:
            raise self.damaged(f"header: {error}") from None
        if not isinstance(header, dict):
            raise self.damaged("its header is no JSON object")
        return header, 8 + size


class TensorRows(CheckedRows):
    """A tensor that is divided by rows over several files, `per_file` in each but the last."""

    def __init__(
        self,
        files: list[TensorFile],
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        per_file: int,
    ) -> None:
        super().__init__(rows=shape[0], row=shape[1:], dtype=dtype, chunk_rows=schema.CHUNK_ROWS)
        self._files, self._name, self._per_file = files, name, per_file
        self._tensors: dict[int, tuple[int, list[int]]] = {}

    def _place(self, chunk: int) -> tuple[OpenFile, int]:
        number, start = divmod(chunk * self._chunk_rows, self._per_file)
        offset, _ = self._tensor(number)
        return self._files[number].content(), offset + start * self._row_bytes

    def _read_checked(self, chunk: int, start: int, stop: int, out: NDArray[Any]) -> None:
        self._read(start, stop, out)
        number, first = divmod(start, self._per_file)
        checksums = self._tensor(number)[1]
        index = first // self._chunk_rows
        found = google_crc32c.value(out.reshape(-1).view(np.uint8))
        if index >= len(checksums) or checksums[index] != found:
            raise self._files[number].damaged(
                f"rows {start} to {stop} of {self._name} do not match their crc32c"
            )

    def _tensor(self, number: int) -> tuple[int, list[int]]:
        found = self._tensors.get(number)
        if found is None:
            rows = min(self._per_file, self.rows - number * self._per_file)
            found = self._files[number].tensor(self._name, self.dtype, (rows, *self.row))
            self._tensors[number] = found
        return found
