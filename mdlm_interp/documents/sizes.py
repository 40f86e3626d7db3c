"""How much text files hold, without reading them: for a forecast, not for a sum.

A plain text's size is its own, and a file of token ids says how many there are. A parquet file's metadata
has the encoded size of its column. Of other files, some megabytes at the beginning give the text for each
byte of the file; of many files of a kind, a few files do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdlm_interp.documents.columns import parquet_text_bytes, sample_arrow
from mdlm_interp.documents.compression import PackedFile
from mdlm_interp.documents.failures import explained
from mdlm_interp.documents.files import expand_files
from mdlm_interp.documents.kinds import Format, Kind, check_file
from mdlm_interp.documents.reading import STREAM_READERS
from mdlm_interp.documents.token_files import ID_BYTES

SAMPLE_BYTES = 1 << 22
"""Text that is read of a sampled file."""

PIECE_BYTES = 1 << 12
"""Of a compressed plain text, what is read at a time."""

SAMPLE_FILES = 8
"""Files of one kind that are sampled, evenly spread."""


@dataclass(frozen=True)
class TextSize:
    """What some files hold."""

    bytes: int
    """UTF-8 bytes of text; of plain text files, with what separates the documents."""
    exact: bool
    """Whether `bytes` was counted, and no part of it estimated."""
    tokens: int
    """Ids in files of token ids, end-of-texts included; always exact, and not in `bytes`."""


def text_bytes(paths: Sequence[str | Path]) -> TextSize:
    """The size of the text in files, as `expand_files` takes them; in well under a second for most.

    Raises:
        DataError: If a file is missing, unreadable, of an unknown kind, or damaged where it is looked at.
    """
    by_kind: defaultdict[Kind, list[Path]] = defaultdict(list)
    for path in expand_files(paths):
        by_kind[check_file(path)].append(path)
    total = tokens = 0
    exact = True
    for kind, files in by_kind.items():
        sizes = [file.stat().st_size for file in files]
        if kind.format == "tokens":
            tokens += sum(sizes) // ID_BYTES
        elif kind == Kind("text"):
            total += sum(sizes)
        elif kind.format == "parquet":
            exact = False
            for file in files:
                with explained(file):
                    total += parquet_text_bytes(file)
        else:
            step = -(-len(files) // SAMPLE_FILES)
            samples = [_sample(file, kind) for file in files[::step]]
            sampled_text, sampled_size = (sum(column) for column in zip(*samples, strict=True))
            exact = exact and sampled_size == sum(sizes)
            total += round(sampled_text * sum(sizes) / sampled_size)
    return TextSize(total, exact, tokens)


def _sample(path: Path, kind: Kind) -> tuple[int, int]:
    """Bytes of text in a part of a file, and the bytes of the file that this part takes."""
    with explained(path):
        if kind.format == "arrow":
            return sample_arrow(path, SAMPLE_BYTES)
        file = PackedFile(path, kind.compression)
        first = last = (0, 0)
        total = 0
        for size in _sizes(file, kind.format):
            total += size
            if (position := file.position()) != last[1]:
                last = (total, position)
            # Decompression runs ahead of the text, always by about as much: so from one place to another.
            first = last if first == (0, 0) else first
            if total >= SAMPLE_BYTES and last != first:
                return last[0] - first[0], last[1] - first[1]
    return total, path.stat().st_size


def _sizes(file: PackedFile, format: Format) -> Iterator[int]:
    if format != "text":
        yield from (len((text or "").encode()) for text in STREAM_READERS[format](file))
        return
    with file.open() as stream:  # where documents end is known only when all was looked at
        while piece := stream.read(PIECE_BYTES):
            yield len(piece)
