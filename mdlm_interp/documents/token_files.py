"""nanoGPT's token files: uint16 ids, little-endian, without a header; <|endoftext|> separates documents.

Each id is checked against the tokenizer, since ids of another vocabulary read as well as the right ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import DataError
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer

ID_BYTES = 2

PIECE_TOKENS = 1 << 19
"""Ids that are read at a time."""

LONGEST = 1 << 24
"""Ids in a document, at most: some sixty megabytes of text. So memory stays bounded without the right mark."""

LLM_C_HEADER = np.array([20240520, 1], "<i4").tobytes()
"""First bytes of llm.c's token files, which have 1,024 bytes of header and then the same ids."""


def read_tokens(path: Path, tokenizer: Tokenizer) -> Iterator[NDArray[np.uint16] | None]:
    """Ids of each document, without the <|endoftext|>; some may be empty, and None is what a first mark ends.

    A file whose documents end with <|endoftext|> must end with it too. One that starts with it has
    the mark before each document, and one without any is a single document.

    Raises:
        DataError: If an id is not a text token of the tokenizer, the last document has no end, or one has
            more than LONGEST ids.
    """
    pending: list[NDArray[np.uint16]] = []
    position = 0
    marks_ends = marks_any = False
    with path.open("rb") as stream:
        while data := stream.read(PIECE_TOKENS * ID_BYTES):
            if position == 0 and data.startswith(LLM_C_HEADER):
                raise DataError(f"{path} has the header of llm.c's files; remove its first 1,024 bytes")
            piece = np.frombuffer(data, "<u2")
            _check_vocabulary(piece, path, position, tokenizer)
            ends = np.flatnonzero(piece == tokenizer.eos_id).tolist()
            if position == 0:
                marks_ends = int(piece[0]) != tokenizer.eos_id
            marks_any = marks_any or bool(ends)
            begin = 0
            for end in ends:
                pending.append(piece[begin:end])
                document, pending = np.concatenate(pending) if len(pending) > 1 else pending[0], []
                yield None if position == 0 and begin == end == 0 else document
                begin = end + 1
            pending.append(piece[begin:])
            position += len(piece)
            if sum(map(len, pending)) > LONGEST:
                raise DataError(
                    f"{path} has more than {LONGEST:,} ids without {END_OF_TEXT} ({tokenizer.eos_id}) among them; "
                    f"wrong vocabulary? Name the tokenizer that it was written with"
                )
    rest = np.concatenate([np.empty(0, np.uint16), *pending])
    if len(rest) and marks_any and marks_ends:
        raise DataError(
            f"{path} ends inside a document: its last {len(rest)} ids have no {END_OF_TEXT} "
            f"({tokenizer.eos_id}) after them; is the file cut off?"
        )
    if len(rest):
        yield rest


def _check_vocabulary(piece: NDArray[np.uint16], path: Path, position: int, tokenizer: Tokenizer) -> None:
    if int(piece.max()) < tokenizer.mask_id:
        return
    at = int(np.argmax(piece >= tokenizer.mask_id))
    raise DataError(
        f"{path}, token {position + at} (from 0) is {int(piece[at])}, and the tokenizer's text tokens are "
        f"0 to {tokenizer.mask_id - 1}; wrong vocabulary? Name the tokenizer that it was written with"
    )
