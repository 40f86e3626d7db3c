"""The original OpenWebText: a tar of `urlsf_subset00-1_data.xz`, each itself a tar of `.txt`, one document each.

Archives are read from front to back, one inside the other, and nothing is written to disk. As in the
Hugging Face loader, members other than `.xz` and `.txt` are passed over, and so are links and devices.

Source:
    huggingface.co/datasets/Skylion007/openwebtext, openwebtext.py: the order of the archive, runs of more
    than one blank line made one, outer white space removed. So the texts are those of its parquet shards.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from io import BufferedIOBase

from mdlm_interp.documents.compression import PIECE, PackedFile, decompressed
from mdlm_interp.documents.failures import COPY_AGAIN, explained
from mdlm_interp.errors import DataError

_BLANK_LINES = re.compile("\n\n\n+")

DEEPEST = 2
"""Archives inside one another: OpenWebText's own has two."""


class _Forward:
    """A stream as tarfile wants it, that only goes forward and never gives less than it is asked for."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.StreamError("a stream does not go back")
        while ahead := position - self._position:
            self.read(min(ahead, PIECE))

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        if len(data) < size:
            raise EOFError
        return data

    def check_rest(self, place: str) -> None:
        """Read on to the end, where a compressed stream keeps its checksum; only zeros may be there."""
        while piece := self._stream.read(PIECE):
            if piece.strip(b"\0"):
                raise DataError(
                    f"{place} goes on after its end mark; are these several archives in one file? Split them"
                )


class _StrictHeader(tarfile.TarInfo):
    """A member's header; tarfile takes a damaged one for the end of the archive, which would hide the rest."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictHeader:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end mark, a block of zeros
                raise
            raise tarfile.ReadError(str(error)) from None


def read_archive(file: PackedFile) -> Iterator[str]:
    """The documents of an archive file, in its order."""
    with file.open() as stream:
        yield from _members(stream, str(file), DEEPEST)


def _members(stream: BufferedIOBase, place: str, depth: int) -> Iterator[str]:
    forward = _Forward(stream)
    with tarfile.TarFile(fileobj=forward, tarinfo=_StrictHeader) as archive:  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or it remembers each of millions
            name = member.name.lower()
            content = archive.extractfile(member) if member.isreg() else None
            inside = f"{place}, member {member.name!r}"
            if content is None or not name.endswith((".txt", ".xz")):
                continue
            with explained(inside):
                if name.endswith(".txt"):
                    yield _document(content.read(), inside)
                elif depth == 1:
                    raise DataError(
                        f"{inside} is an archive in an archive in an archive; unpack the outer one"
                    )
                else:
                    with decompressed(content, "xz") as inner:  # type: ignore[arg-type]
                        yield from _members(inner, inside, depth - 1)
    forward.check_rest(place)


def _document(content: bytes, place: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start}: {error.reason}"
        raise DataError(f"{place} is not UTF-8 ({where}); convert or remove it, or {COPY_AGAIN}") from None
    return _BLANK_LINES.sub("\n\n", text).strip()
