"""Text files to documents, and documents to token blocks.

Formats, by file name: `.txt` (documents are separated by blank lines, or by <|endoftext|> where the file
has that anywhere), `.jsonl` (an object with "text" a line) and `.parquet` (a column "text"). Blocks are
packed as upstream does: each document's tokens and an end-of-text, concatenated within groups of 1,000
documents, cut into equal blocks, the group's remainder dropped.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError, nearest
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer

GROUP_DOCUMENTS = 1000
"""Documents that upstream concatenates before cutting (its datasets.map batch)."""

PIECE = 1 << 20
"""Bytes or characters of a text file that are read at a time."""

_SURROGATE = re.compile("[\ud800-\udfff]")

BETWEEN = -1
"""Document number of a token that belongs to none: the end-of-text tokens around a wrapped block."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: int
    """Number of its file in the list of files."""
    number: int
    """Number of the document in that file."""


@dataclass(frozen=True)
class TokenBlock:
    """One sequence for the model."""

    ids: NDArray[np.int64]
    """Token ids [pos]."""
    documents: NDArray[np.int64]
    """Running number, over all files, of the document each token is of [pos]; -1 for added end-of-texts."""
    source: int
    """Number of the file that the block's first document came from."""
    offset: int
    """Number in that file of the block's first document."""


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Every non-empty document of the files, in order, with bounded memory.

    Raises:
        DataError: If a file is missing, unreadable, of an unknown kind, not UTF-8, or holds no text.
    """
    for source, path in enumerate(paths):
        number = 0
        for text in _texts(Path(path)):
            if text.strip():
                yield Document(text, source, number)
                number += 1
        if number == 0:
            raise DataError(f"{path} holds no text; remove it from the list or check how it was written")


def _texts(path: Path) -> Iterator[str]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.is_dir():
        raise DataError(f"{path} is a directory, expected a file; name the files in it")
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown kind of text file {path.suffix!r}{nearest(path.suffix, readers)}")
    try:
        yield from reader(path)
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {_undecodable_byte(path)}: {error.reason}); convert it first"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _undecodable_byte(path: Path) -> int:
    # A decoder's own error counts from the start of the piece that it was reading.
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = held = 0
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return offset - held + error.start
            offset += len(piece)
    return offset - len(decoder.getstate()[0])


def _read_text(path: Path) -> Iterator[str]:
    # A file that marks its documents has blank lines inside them, so the whole file decides on the rule.
    split = _marked_documents if _has_marker(path) else _paragraphs
    with path.open(encoding="utf-8") as stream:
        yield from (text.strip("\n") for text in split(stream))


def _has_marker(path: Path) -> bool:
    marker, tail = END_OF_TEXT.encode(), b""
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            if marker in tail + piece:
                return True
            tail = (tail + piece)[1 - len(marker) :]
    return False


def _marked_documents(stream: TextIO) -> Iterator[str]:
    pending = ""
    while piece := stream.read(PIECE):
        *complete, pending = (pending + piece).split(END_OF_TEXT)
        yield from complete
    yield pending


def _paragraphs(stream: TextIO) -> Iterator[str]:
    pending: list[str] = []
    for line in stream:
        if line.strip():
            pending.append(line)
        else:
            yield "".join(pending)
            pending = []
    yield "".join(pending)


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not JSON ({error.msg}); is the file cut off?"
                ) from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                known = nearest("text", record) if isinstance(record, dict) else ""
                raise DataError(f'{path}, line {number} has no "text" string{known}')
            if not record["text"].isascii() and _SURROGATE.search(record["text"]):
                raise DataError(
                    f"{path}, line {number}: the text has half a surrogate pair, which is no character"
                )
            yield record["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as stored:
            if "text" not in stored.schema_arrow.names:
                raise DataError(f'{path} has no column "text"{nearest("text", stored.schema_arrow.names)}')
            for batch in stored.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise DataError(
                            f'{path}: column "text" holds {type(text).__name__}, expected strings'
                        )
                    yield text or ""
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is truncated or no parquet file ({error})") from None


def token_blocks(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, *, wrap: bool = True
) -> Iterator[TokenBlock]:
    """Equal blocks of `length` tokens.

    Args:
        wrap: Put an end-of-text before and after the length - 2 tokens of each block, as upstream does.
    """
    inner = length - 2 if wrap else length
    if inner < 1:
        raise DataError(f"a block needs at least {length - inner + 1} tokens, got length {length}")
    running = 0
    for group in _groups(documents):
        ids: list[int] = []
        owners: list[int] = []
        for coded in tokenizer.encode_batch([document.text for document in group]):
            ids += [*coded, tokenizer.eos_id]
            owners += [running] * (len(coded) + 1)
            running += 1
        first = running - len(group)
        for start in range(0, len(ids) - inner + 1, inner):
            block = np.array(ids[start : start + inner], np.int64)
            owner = np.array(owners[start : start + inner], np.int64)
            origin = group[int(owner[0]) - first]
            if wrap:
                block = np.concatenate([[tokenizer.eos_id], block, [tokenizer.eos_id]])
                owner = np.concatenate([[BETWEEN], owner, [BETWEEN]])
            yield TokenBlock(block, owner, origin.source, origin.number)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == GROUP_DOCUMENTS:
            yield group
            group = []
    if group:
        yield group
