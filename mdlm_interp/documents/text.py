"""Plain text and JSON lines, a document at a time.

A plain text's documents are separated by <|endoftext|> where the file has that anywhere, by blank lines
otherwise. JSON lines have an object with a string "text" on each line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any

from mdlm_interp.documents.compression import PackedFile
from mdlm_interp.errors import DataError, nearest
from mdlm_interp.tokenizers import END_OF_TEXT

PIECE = 1 << 20
"""Bytes or characters of a plain text that are read at a time."""

_SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
"""What JSON calls the values that Python reads."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD]")


def read_text(file: PackedFile) -> Iterator[str | None]:
    """The documents of a plain text; those between two marks may be empty, and None is a place without one."""
    # A file that marks its documents has blank lines inside them, so the whole file decides on the rule.
    split = _marked_documents if _has_marker(file) else _paragraphs
    with file.open_text() as stream:
        for text in split(stream):
            yield None if text is None else text.strip("\n")


def _has_marker(file: PackedFile) -> bool:
    marker, tail = END_OF_TEXT.encode(), b""
    with file.open() as stream:
        while piece := stream.read(PIECE):
            if marker in tail + piece:
                return True
            tail = (tail + piece)[1 - len(marker) :]
    return False


def _marked_documents(stream: TextIOWrapper) -> Iterator[str | None]:
    # Pieces are joined once a document, so that a long one does not cost the square of its length.
    pending: list[str] = []
    tail, first = "", True
    while piece := stream.read(PIECE):
        *complete, rest = (tail + piece).split(END_OF_TEXT)
        for text in complete:
            document = "".join([*pending, text])
            # A file may have the mark before each document.
            yield None if first and not document.strip() else document
            first = False
            pending.clear()
        kept = max(0, len(rest) - len(END_OF_TEXT) + 1)
        pending.append(rest[:kept])
        tail = rest[kept:]
    # What follows the last mark is no document if there is nothing.
    if (last := "".join([*pending, tail])) and not last.isspace():
        yield last


def _paragraphs(stream: TextIOWrapper) -> Iterator[str]:
    pending: list[str] = []
    for line in stream:
        if not line.isspace():
            pending.append(line)
        elif pending:
            yield "".join(pending)
            pending = []
    if pending:
        yield "".join(pending)


def read_jsonl(file: PackedFile) -> Iterator[str | None]:
    """The documents of a file of JSON lines; None for a blank line."""
    with file.open_text() as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                yield None  # so that documents are numbered as lines are
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}, line {number} is not JSON ({error.msg}); is the file cut off?"
                ) from None
            except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
                reason = str(error).partition(";")[0]
                raise DataError(f"{file}, line {number} cannot be read ({reason}); remove the line") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DataError(f"{file}, line {number} {_without_text(record)}")
            # The line itself was UTF-8, which has none, so only an escape can have made one.
            if _ESCAPED_SURROGATE.search(line) and _SURROGATE.search(record["text"]):
                raise DataError(
                    f"{file}, line {number}: the text has half a surrogate pair, which is no character"
                )
            yield record["text"]


def _without_text(record: Any) -> str:
    """What is wrong with a line of JSON that has no text."""
    if not isinstance(record, dict):
        return f'is {KINDS[type(record)]}, expected an object with a "text" string'
    if "text" in record:
        return f'has a "text" that is {KINDS[type(record["text"])]}, expected a string'
    return f'has no "text" string{nearest("text", record)}'
