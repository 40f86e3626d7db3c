"""Which format a file is in, by its name; and whether its first bytes agree, before anything is read.

Names are compared without case. Text, JSON lines and archives may be compressed as a whole.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdlm_interp.documents.failures import cut_off, explained, holds_no_text, missing
from mdlm_interp.errors import DataError, nearest

Format = Literal["text", "jsonl", "parquet", "arrow", "archive", "tokens"]
Compression = Literal["gz", "zst", "xz"]


@dataclass(frozen=True)
class Kind:
    """How a file is to be read."""

    format: Format
    compression: Compression | None = None


COMPRESSIONS: tuple[Compression, ...] = ("gz", "zst", "xz")
STREAMS: dict[str, Format] = {
    ".txt": "text",
    ".raw": "text",  # WikiText's wiki.valid.raw
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tar": "archive",
}
KINDS: dict[str, Kind] = {
    **{suffix: Kind(format) for suffix, format in STREAMS.items()},
    ".parquet": Kind("parquet"),
    ".arrow": Kind("arrow"),
    ".bin": Kind("tokens"),
    **{f"{suffix}.{c}": Kind(format, c) for suffix, format in STREAMS.items() for c in COMPRESSIONS},
    ".xz": Kind("archive", "xz"),  # OpenWebText's urlsf_subset00-1_data.xz, a tar
}
"""By the end of the name."""

MAGIC: dict[str, tuple[bytes, str]] = {
    "gz": (b"\x1f\x8b", "gzip data"),
    "zst": (b"\x28\xb5\x2f\xfd", "zstandard data"),
    "xz": (b"\xfd7zXZ\x00", "xz data"),
    "parquet": (b"PAR1", "a parquet file"),
}
"""First bytes, and what to call what begins with them."""

SKIPPABLE_ZST = b"\x2a\x4d\x18"
"""Second to fourth byte of a zstandard file that begins with a frame of no content."""

ZIP = b"PK\x03\x04"

LOOKED_AT_BYTES = 1 << 16
"""Of a file of token ids, what is looked at before it is read."""
FEWEST_IDS = 16
"""Ids from which on half of them cannot all be 0 by chance."""

UNPACKED_WITH = {".bz2": "bunzip2", ".zip": "unzip", ".7z": "7z x", ".lz4": "unlz4", ".br": "brotli -d"}
"""Suffixes of compressed files that are not read, and what unpacks them."""


def suffix_of(path: Path) -> str:
    """The end of a name that says its kind: the last suffix, or two where the last is a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes and suffixes[-1][1:] in COMPRESSIONS else suffixes[-1:])


def kind_of(path: Path) -> Kind:
    """How to read a file of that name.

    Raises:
        DataError: If the name ends like no kind that is known.
    """
    suffix = suffix_of(path)
    if suffix in UNPACKED_WITH:
        raise DataError(f"{path} is compressed; unpack it first, with {UNPACKED_WITH[suffix]} for instance")
    if suffix not in KINDS:
        raise DataError(f"{path}: unknown kind of text file {suffix!r}{nearest(suffix, KINDS)}")
    return KINDS[suffix]


def check_file(path: Path) -> Kind:
    """The kind of a file that is there, can be opened, has content and begins as its name says.

    Cheap, so that the last of many shards is looked at before the first is read.

    Raises:
        DataError: If any of that does not hold.
    """
    with explained(path):
        if path.is_dir():
            raise DataError(f"{path} is a directory, expected a file; name the files in it")
        if not path.exists():
            raise missing(path)
        kind = kind_of(path)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} is no regular file, and a resumed run reads it again; save it as a file")
        with path.open("rb") as stream:
            head = stream.read(LOOKED_AT_BYTES if kind.format == "tokens" else 8)
        if not head:
            raise holds_no_text(path)
        if kind.format == "tokens" and found.st_size % 2:
            raise DataError(
                f"{path} has {found.st_size} bytes, and token ids take two bytes each; is the file cut off?"
            )
        if kind.format == "tokens":
            _check_id_width(path, head)
    _check_head(path, kind, head)
    return kind


def _check_id_width(path: Path, head: bytes) -> None:
    # Ids of four or eight bytes have an empty upper half; read as uint16 it is the id 0, which every vocabulary has.
    ids = len(head) // 2
    if ids >= FEWEST_IDS and not any(head[2::4]) and not any(head[3::4]):
        raise DataError(
            f"{path}: every second of its first {ids:,} ids is 0, as where ids take four or eight bytes (uint32, "
            f"int64), and they must take two; write them as uint16: ids.astype('<u2').tofile(...)"
        )


def _check_head(path: Path, kind: Kind, head: bytes) -> None:
    expected = kind.compression or ("parquet" if kind.format == "parquet" else None)
    if expected is not None:
        magic, what = MAGIC[expected]
        if len(head) < len(magic) and magic.startswith(head):
            raise cut_off(path)
        if not head.startswith(magic) and not (expected == "zst" and head[1:4] == SKIPPABLE_ZST):
            raise DataError(
                f"{path} is named as {what} and starts with {head!r}, which is not; rename it to its kind"
            )
    elif kind.format in ("text", "jsonl"):
        for suffix, (magic, what) in MAGIC.items():
            if head.startswith(magic):
                name = path.name + f".{suffix}" if suffix in COMPRESSIONS else path.stem + f".{suffix}"
                raise DataError(f"{path} holds {what}, not plain text; rename it to {name}")
        if head.startswith(ZIP):
            raise DataError(f"{path} holds a zip archive, not plain text; unpack it")
