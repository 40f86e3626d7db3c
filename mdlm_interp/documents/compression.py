"""Files as streams of their uncompressed bytes; one that is cut off or damaged never passes as a short one.

Three readers would let it pass: `lzma.open` ignores a second stream whose header is damaged, and
`zstandard`'s stream reader returns what there is of a frame without its end. The first is replaced below,
for the second pyarrow's decompressor is used, which refuses it. What no format can show is a file cut
exactly between two complete compressed streams.
"""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from mdlm_interp.documents.kinds import Compression
from mdlm_interp.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 1 << 16
"""Bytes that are read at a time."""

BUFFER_BYTES = 1 << 18
"""Uncompressed bytes that are kept ready."""


class _XzStream(io.RawIOBase):
    """Every stream of an xz file, one after the other, with zeros as padding between them and nothing else."""

    def __init__(self, source: io.BufferedIOBase) -> None:
        self._source = source
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._decoder.eof and not self._next_stream():
                return 0
            if self._decoder.needs_input and not self._waiting:
                self._waiting = self._source.read(PIECE)
                if not self._waiting:
                    raise EOFError
            data = self._decoder.decompress(self._waiting, len(view))
            self._waiting = b""
            if data:
                view[: len(data)] = data
                return len(data)

    def _next_stream(self) -> bool:
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest:
            piece = self._source.read(PIECE)
            if not piece:
                return False
            rest = piece.lstrip(b"\0")
        self._decoder, self._waiting = lzma.LZMADecompressor(lzma.FORMAT_XZ), rest
        return True


@contextmanager
def decompressed(source: io.BufferedIOBase, compression: Compression | None) -> Iterator[io.BufferedIOBase]:
    """A stream of the uncompressed bytes of a stream, which stays open."""
    with ExitStack() as stack:
        if compression is None:
            yield source
        elif compression == "gz":
            yield stack.enter_context(gzip.GzipFile(fileobj=source))
        elif compression == "xz":
            yield stack.enter_context(io.BufferedReader(_XzStream(source), BUFFER_BYTES))
        else:
            import pyarrow as pa

            raw = pa.CompressedInputStream(pa.PythonFile(_Unclosed(source), "r"), "zstd")
            yield stack.enter_context(io.BufferedReader(raw, BUFFER_BYTES))


class _Unclosed:
    """What pyarrow needs of a file, without the right to close it."""

    closed = False

    def __init__(self, source: io.BufferedIOBase) -> None:
        self.read = source.read

    def close(self) -> None:
        """Leave it to the owner."""


@dataclass
class PackedFile:
    """A file, compressed or not, to be read from front to back as often as needed."""

    path: Path
    compression: Compression | None = None
    _raw: io.BufferedIOBase = field(init=False, repr=False)

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def open(self) -> Iterator[io.BufferedIOBase]:
        """Its uncompressed bytes."""
        with self.path.open("rb") as raw, decompressed(raw, self.compression) as stream:
            self._raw = raw
            yield stream

    @contextmanager
    def open_text(self) -> Iterator[io.TextIOWrapper]:
        """Its text in UTF-8: any ending of a line reads as a newline, a mark at the start as nothing.

        Raises:
            DataError: If it is not UTF-8, with the place of the byte.
        """
        with self.open() as stream:
            text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig")
            try:
                yield text
            except UnicodeDecodeError as error:
                what = "byte" if self.compression is None else "uncompressed byte"
                where = f"{what} {self._undecodable_byte()}: {error.reason}"
                raise DataError(f"{self} is not UTF-8 ({where}); convert it first") from None
            finally:
                text.detach()

    def position(self) -> int:
        """Bytes of the file that were read so far, while it is open."""
        return self._raw.tell()

    def _undecodable_byte(self) -> int:
        # A decoder's own error counts from the start of the piece that it was reading.
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        with self.open() as stream:
            while piece := stream.read(PIECE):
                held = len(decoder.getstate()[0])
                try:
                    decoder.decode(piece)
                except UnicodeDecodeError as error:
                    return offset - held + error.start
                offset += len(piece)
        return offset - len(decoder.getstate()[0])
