"""Training text as one stream of tokens, and batches as a pure function of (seed, step).

Documents are split into training and held-out ones by the hash of their text, so equal documents never
stand on both sides and adding files moves nobody. Training sequences are windows of the stream, at random
offsets or packed (`sampling.py`); validation sequences are its consecutive blocks, with end-of-texts around
them where training's have them. The stream may be in memory or in mapped files (`token_cache.py`).
"""

# Axes: batch, pos

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.documents import Document, expand_files, read_documents
from mdlm_interp.errors import DataError
from mdlm_interp.shapes import Int64
from mdlm_interp.tokenizers import Tokenizer

ENCODE_DOCUMENTS = 256
"""Documents given to the tokenizer at once."""


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: decided by its own hash alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


@dataclass(frozen=True)
class TextSource:
    """What a text file was when it was read."""

    file: str
    """Its name, without the directories of one machine."""
    bytes: int
    """Its size."""
    sha256: str
    """Hash of its content."""


@dataclass(frozen=True)
class TokenStreams:
    """Tokens of the training and of the held-out documents, each document ended by <|endoftext|>."""

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    train_bytes: int
    """Bytes of UTF-8 in the training text."""
    held_out_bytes: int
    """Bytes of UTF-8 in the held-out text."""
    sources: tuple[TextSource, ...]
    """The files, in the order given."""


@dataclass(frozen=True)
class EncodedDocument:
    """The ids of one document, ended by <|endoftext|>, and its side."""

    ids: NDArray[np.uint16]
    held_out: bool
    bytes: int
    """Bytes of UTF-8 in its text."""


def encoded_documents(
    files: Sequence[Path], tokenizer: Tokenizer, held_out_share: float
) -> Iterator[EncodedDocument]:
    """Tokenise the files' documents; a held-out one that repeats is passed over, and so is one without text.

    In a file of token ids (.bin) a document's side is that of the text that its ids stand for.
    """
    seen: set[bytes] = set()
    with_text = (one for one in read_documents(files, tokenizer) if _has_text(one))
    for documents in _batches(with_text):
        for text, ids in _encoded(documents, tokenizer):
            held_out = is_held_out(text, held_out_share)
            digest = hashlib.sha256(text.encode()).digest()
            if held_out and digest in seen:
                continue
            seen.add(digest)
            yield EncodedDocument(np.array([*ids, tokenizer.eos_id], np.uint16), held_out, len(text.encode()))


def _has_text(document: Document) -> bool:
    return bool(document.text.strip() if document.ids is None else len(document.ids))


def read_streams(files: Sequence[Path], tokenizer: Tokenizer, held_out_share: float) -> TokenStreams:
    """Tokenise the files and split them by document; a repeated file repeats in training only.

    Raises:
        DataError: If one of the two sides is empty.
    """
    files = expand_files(files)
    parts: dict[bool, list[NDArray[np.uint16]]] = {True: [], False: []}
    sizes = {True: 0, False: 0}
    for document in encoded_documents(files, tokenizer, held_out_share):
        parts[document.held_out].append(document.ids)
        sizes[document.held_out] += document.bytes
    for held_out in (False, True):
        refuse_empty_side(len(parts[held_out]), held_out)
    train, held = np.concatenate(parts[False]), np.concatenate(parts[True])
    return TokenStreams(train, held, sizes[False], sizes[True], text_sources(files))


def refuse_empty_side(documents: int, held_out: bool) -> None:
    """Raise DataError if no document is on a side."""
    if not documents:
        name = "held-out" if held_out else "training"
        raise DataError(f"no document fell on the {name} side; give more documents or change held_out_share")


def text_sources(files: Sequence[Path]) -> tuple[TextSource, ...]:
    """Name, size and SHA-256 of each file; one listed twice is read once.

    Raises:
        DataError: If a file cannot be read.
    """
    known: dict[Path, TextSource] = {}
    for file in files:
        try:
            if file not in known:
                known[file] = TextSource(file.name, file.stat().st_size, sha256_of(file))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    return tuple(known[file] for file in files)


def _encoded(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, Sequence[int]]]:
    """Text and ids of each document, those of text tokenised at once."""
    coded = iter(tokenizer.encode_batch([document.text for document in documents if document.ids is None]))
    for document in documents:
        if document.ids is None:
            yield document.text, next(coded)
        else:
            ids = document.ids.tolist()
            yield tokenizer.decode(ids), ids


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == ENCODE_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def consecutive_blocks(
    stream: NDArray[np.uint16], length: int, limit: int | None = None, *, wrap_with: int | None = None
) -> Int64[Tensor, "batch pos"]:
    """The stream cut into equal blocks, the remainder dropped; evenly spread ones if limited.

    Args:
        wrap_with: The id to put before and after the length - 2 tokens of each block; none for bare blocks.
    """
    inner = length if wrap_with is None else length - 2
    count = len(stream) // inner
    if count == 0:
        raise DataError(
            f"the held-out text has {len(stream)} tokens, fewer than one block of {inner}; "
            f"give more text or raise held_out_share"
        )
    blocks = stream[: count * inner].reshape(count, inner).astype(np.int64)
    if limit is not None and limit < count:
        blocks = blocks[np.linspace(0, count - 1, limit).astype(np.int64)]
    if wrap_with is not None:
        blocks = np.pad(blocks, ((0, 0), (1, 1)), constant_values=wrap_with)
    return torch.from_numpy(blocks)
