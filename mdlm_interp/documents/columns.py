"""Parquet files and Arrow files of a Hugging Face `datasets` directory: a document a row of the column "text".

Read in small batches through a buffer, so that memory does not grow with row groups or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdlm_interp.documents.failures import COPY_AGAIN, damaged
from mdlm_interp.errors import DataError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN = "text"

BATCH_ROWS = 256
"""Rows that are turned into strings at a time."""

BUFFER_BYTES = 1 << 20
"""Bytes of a parquet column that are fetched at a time."""

ARROW_FILE = b"ARROW1"
"""First and last bytes of an Arrow file with a footer; the `datasets` library writes streams without one."""

ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path) -> Iterator[str | None]:
    """The documents of a parquet file; None for a null."""
    with open_parquet(path) as stored:
        check_column(stored.schema_arrow, path)
        batches = stored.iter_batches(BATCH_ROWS, columns=[COLUMN], use_threads=False)
        yield from _texts(batches, path)


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile that fetches no more than it is asked for."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with (
            pa.OSFile(str(path)) as source,
            parquet.ParquetFile(
                source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as stored,
        ):
            yield stored
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is truncated or no parquet file ({_one_line(error)}); {COPY_AGAIN}"
        ) from None
    except pa.ArrowException as error:
        raise damaged(path, error) from None


def read_arrow(path: Path) -> Iterator[str | None]:
    """The documents of an Arrow file, with or without a footer; None for a null."""
    with _stored(path) as (_, stored):
        yield from _texts(_arrow_batches(stored), path)


@contextmanager
def _stored(path: Path) -> Iterator[tuple[pa.NativeFile, Any]]:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as source, _open_arrow(source, path) as stored:
            check_column(stored.schema, path)
            yield source, stored
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is truncated or no Arrow file ({_one_line(error)}); {COPY_AGAIN}") from None
    except pa.ArrowException as error:
        raise damaged(path, error) from None


def _open_arrow(source: pa.NativeFile, path: Path) -> Any:
    import pyarrow as pa

    if source.read(len(ARROW_FILE)) == ARROW_FILE:
        return pa.ipc.open_file(source)
    # A stream that stops between two batches reads as a whole one, so its end mark is looked at here.
    source.seek(max(0, source.size() - len(ARROW_STREAM_END)))
    if source.read() != ARROW_STREAM_END:
        raise DataError(f"{path} is cut off before its end mark, or no Arrow file; {COPY_AGAIN}")
    source.seek(0)
    return pa.ipc.open_stream(source)


def parquet_text_bytes(path: Path) -> int:
    """Bytes that the texts of a parquet file take as they are encoded, which is less if some repeat."""
    with open_parquet(path) as stored:
        check_column(stored.schema_arrow, path)
        metadata = stored.metadata
        at = metadata.schema.names.index(COLUMN)
        chunks = [metadata.row_group(group).column(at) for group in range(metadata.num_row_groups)]
    # Each value has its length before it, in four bytes.
    return sum(max(0, chunk.total_uncompressed_size - 4 * chunk.num_values) for chunk in chunks)


def sample_arrow(path: Path, limit: int) -> tuple[int, int]:
    """Bytes of text in the first batches of an Arrow file, and the bytes of the file that these take."""
    total = 0
    with _stored(path) as (source, stored):
        # With a footer, batches are fetched from anywhere, so they are counted instead.
        batches: int | None = getattr(stored, "num_record_batches", None)
        size: int = source.size()
        for number, batch in enumerate(_arrow_batches(stored), start=1):
            total += sum(len((text or "").encode()) for text in _texts(iter([batch]), path))
            if total >= limit:
                return total, source.tell() if batches is None else size * number // batches
    return total, size


def _arrow_batches(stored: Any) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if hasattr(stored, "get_batch"):
        batches = (stored.get_batch(number) for number in range(stored.num_record_batches))
    else:
        batches = iter(stored)
    for batch in batches:
        # Offsets are taken from the file as they are, and one that is damaged would be followed anywhere.
        try:
            batch.column(COLUMN).validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):  # of which `_strings` says where it is
                raise
        yield batch


def check_column(schema: pa.Schema, path: Path) -> None:
    """Raise DataError unless a table has a column of strings called "text"."""
    import pyarrow as pa

    if COLUMN not in schema.names:
        raise DataError(f'{path} has no column "{COLUMN}"{nearest(COLUMN, schema.names)}')
    kind = schema.field(COLUMN).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in strings):
        raise DataError(f'{path}: column "{COLUMN}" holds {kind}, expected strings; name a file of texts')


def _texts(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[str | None]:
    row = 0
    for batch in batches:
        column = batch.column(COLUMN)
        for start in range(0, len(column), BATCH_ROWS):
            piece = column.slice(start, BATCH_ROWS)
            yield from _strings(piece, path, row)
            row += len(piece)


def _strings(column: pa.Array, path: Path, first_row: int) -> list[str | None]:
    try:
        texts: list[str | None] = column.to_pylist()
        return texts
    except UnicodeDecodeError:
        for row, value in enumerate(column, start=first_row):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {row} (from 0) is not UTF-8 (byte {error.start} of its text: "
                    f"{error.reason}); convert it first"
                ) from None
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
