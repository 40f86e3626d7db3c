"""Documents of any files, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.documents.archives import read_archive
from mdlm_interp.documents.columns import read_arrow, read_parquet
from mdlm_interp.documents.compression import PackedFile
from mdlm_interp.documents.failures import explained, holds_no_text
from mdlm_interp.documents.files import expand_files
from mdlm_interp.documents.kinds import Format, Kind, check_file
from mdlm_interp.documents.text import read_jsonl, read_text
from mdlm_interp.documents.token_files import read_tokens
from mdlm_interp.errors import DataError
from mdlm_interp.tokenizers import Tokenizer

STREAM_READERS: dict[Format, Callable[[PackedFile], Iterator[str | None]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "archive": read_archive,
}
"""Of the formats that are read from front to back and may be compressed."""


@dataclass(frozen=True)
class Document:
    """One text, or the ids of one, and where it came from."""

    text: str
    """The text; empty where the file holds ids."""
    source: int
    """Number of its file in the list of files."""
    number: int
    """Its position in that file, from 0, where places without one count too: line of JSON lines, row of a table,
    `.txt` of an archive; where <|endoftext|> separates, how many are before it; else its paragraph."""
    ids: NDArray[np.uint16] | None = field(default=None, compare=False)
    """Token ids, without an end-of-text; None where the file holds text."""
    before: int = 0
    """Places for a document in the files before its own."""

    @property
    def running(self) -> int:
        """Its position in all the files, one after the other."""
        return self.before + self.number


def read_documents(paths: Sequence[str | Path], tokenizer: Tokenizer | None = None) -> Iterator[Document]:
    """Every document of the files, in order, with memory for the longest one only.

    One may be empty, and upstream ends it with an end-of-text like any other. No documents are blank lines, nulls
    in a table, and nothing before the first <|endoftext|> or after the last.

    Args:
        paths: What `expand_files` takes. All are looked at before the first is read.
        tokenizer: The one that files of token ids were written with; none refuses such files.
    Raises:
        DataError: If a file is missing, unreadable, of an unknown kind, damaged, cut off, not UTF-8, of
            another vocabulary, or holds no text.
    """
    files = expand_files(paths)
    kinds = [check_file(path) for path in files]
    for path, kind in zip(files, kinds, strict=True):
        if kind.format == "tokens" and tokenizer is None:
            raise DataError(f"{path} holds token ids, and this needs text; name the text that they are of")
    before = 0
    for source, (path, kind) in enumerate(zip(files, kinds, strict=True)):
        count, empty = 0, True  # passed over and yet counted: the number leads back to the place in the file
        with explained(path):
            for text, ids in _contents(path, kind, tokenizer):
                if text is not None:
                    empty = empty and not (text.strip() if ids is None else len(ids))
                    yield Document(text, source, count, ids, before)
                count += 1
        if empty:
            raise holds_no_text(path)
        before += count


def read_texts(paths: Sequence[str | Path]) -> Iterator[str]:
    """The text of every document of the files; see `read_documents`."""
    return (document.text for document in read_documents(paths))


def _contents(
    path: Path, kind: Kind, tokenizer: Tokenizer | None
) -> Iterable[tuple[str | None, NDArray[np.uint16] | None]]:
    if kind.format == "tokens":
        assert tokenizer is not None
        return ((None if ids is None else "", ids) for ids in read_tokens(path, tokenizer))
    return ((text, None) for text in _texts(path, kind))


def _texts(path: Path, kind: Kind) -> Iterator[str | None]:
    if kind.format == "parquet":
        return read_parquet(path)
    if kind.format == "arrow":
        return read_arrow(path)
    return STREAM_READERS[kind.format](PackedFile(path, kind.compression))
