"""Documents to token blocks.

Packed as upstream does: each document's tokens and an end-of-text, concatenated within groups of 1,000
documents, cut into equal blocks, the group's remainder dropped. Or one block a document.

Reading and tokenising run in a thread, a group ahead of the consumer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.documents.prefetch import prefetched
from mdlm_interp.documents.reading import Document
from mdlm_interp.errors import DataError
from mdlm_interp.tokenizers import Tokenizer

GROUP_DOCUMENTS = 1000
"""Documents that upstream concatenates before cutting (its datasets.map batch)."""

PACKING = 2
"""Number of the rules by which documents become blocks; 1 passed over those without text."""

BATCH_DOCUMENTS = 128
"""Documents given to the tokenizer at once, at most: its own record of a token takes a hundred bytes."""

BATCH_CHARACTERS = 1 << 20
"""Characters of text after which no further document joins a batch."""

BETWEEN = -1
"""Document number of a token that belongs to none: the end-of-text tokens around a wrapped block."""


@dataclass(frozen=True)
class StreamPosition:
    """A place in a stream of documents where blocks begin anew."""

    documents: int = 0
    """Documents before it, over all files."""
    blocks: int = 0
    """Blocks before it."""


START = StreamPosition()


@dataclass(frozen=True)
class TokenBlock:
    """One sequence for the model."""

    ids: NDArray[np.int64]
    """Token ids [pos]."""
    documents: NDArray[np.int64]
    """`Document.running` of the document each token is of [pos]; -1 for added end-of-texts."""
    source: int
    """Number of the file that the block's first document came from."""
    offset: int
    """`Document.number` of the block's first document: its position in that file."""
    start: StreamPosition
    """Where to begin to get this block again: its group of documents, or itself if it is one document's."""


@dataclass(frozen=True)
class _Coded:
    """Some documents and their tokens."""

    ids: list[NDArray[np.int32]]
    """Token ids of each, without an end-of-text."""
    places: list[tuple[int, int, int]]
    """Source, number and running number of each."""


def token_blocks(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    *,
    wrap: bool = True,
    start: StreamPosition = START,
) -> Iterator[TokenBlock]:
    """Equal blocks of `length` tokens.

    Args:
        documents: The whole stream, also when `start` is further on.
        wrap: Put an end-of-text before and after the length - 2 tokens of each block, as upstream does.
        start: The `start` of a block of this same stream: the blocks from its group on, without tokenising
            what comes before.
    Raises:
        DataError: If length leaves no room, a text has the mask id, or the stream ends before `start`.
    """
    inner = _inner_length(length, wrap)
    if start.documents % GROUP_DOCUMENTS:
        raise DataError(
            f"a group of blocks starts at a multiple of {GROUP_DOCUMENTS} documents, got {start.documents}; "
            f"take the start of a block"
        )
    with closing(prefetched(_groups(_skipped(documents, start.documents), tokenizer))) as groups:
        for group in groups:
            counts = [len(ids) + 1 for ids in group.ids]
            count = sum(counts) // inner
            flat = np.full(sum(counts), tokenizer.eos_id, np.int64)
            end = 0
            for ids in group.ids:
                flat[end : end + len(ids)] = ids
                end += len(ids) + 1
            owner = np.repeat(np.arange(len(counts)), counts)
            running = np.array([place[2] for place in group.places])
            for block, owners in zip(_cut(flat, count, inner), _cut(owner, count, inner), strict=True):
                source, offset, _ = group.places[int(owners[0])]
                of = running[owners]
                if wrap:
                    block, of = _wrapped(block, tokenizer.eos_id), _wrapped(of, BETWEEN)
                yield TokenBlock(block.copy(), of.copy(), source, offset, start)
            start = StreamPosition(start.documents + len(counts), start.blocks + count)


def document_blocks(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    length: int,
    *,
    wrap: bool = True,
    start: StreamPosition = START,
) -> Iterator[TokenBlock]:
    """One block for each document: its first tokens, `length` at most and fewer if it has fewer.

    Args:
        documents: The whole stream, also when `start` is further on.
        wrap: Put an end-of-text before and after the document's tokens; they count in the length.
        start: The `start` of a block of this same stream: the blocks from it on.
    Raises:
        DataError: As for `token_blocks`.
    """
    inner = _inner_length(length, wrap)
    with closing(prefetched(_batches(_skipped(documents, start.documents), tokenizer))) as batches:
        for batch in batches:
            for ids, (source, offset, running) in zip(batch.ids, batch.places, strict=True):
                block = ids[:inner].astype(np.int64)
                if len(block):
                    of = np.full(len(block), running)
                    if wrap:
                        block, of = _wrapped(block, tokenizer.eos_id), _wrapped(of, BETWEEN)
                    yield TokenBlock(block, of, source, offset, start)
                start = StreamPosition(start.documents + 1, start.blocks + bool(len(block)))


def _inner_length(length: int, wrap: bool) -> int:
    inner = length - 2 if wrap else length
    if inner < 1:
        raise DataError(f"a block needs at least {length - inner + 1} tokens, got length {length}")
    return inner


def _cut(values: NDArray[np.int64], count: int, length: int) -> NDArray[np.int64]:
    return values[: count * length].reshape(count, length)


def _wrapped(values: NDArray[np.int64], around: int) -> NDArray[np.int64]:
    return np.concatenate([[around], values, [around]])


def _skipped(documents: Iterable[Document], count: int) -> Iterator[Document]:
    rest = iter(documents)
    skipped = sum(1 for _ in islice(rest, count))
    if skipped < count:
        raise DataError(
            f"the text has {skipped} documents, and the place to continue from is after {count}; "
            f"keep the files as they were"
        )
    yield from rest


def _groups(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[_Coded]:
    while True:
        group = _Coded([], [])
        for batch in _batches(islice(documents, GROUP_DOCUMENTS), tokenizer):
            group.ids.extend(batch.ids)
            group.places.extend(batch.places)
        if not group.ids:
            return
        yield group


def _batches(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[_Coded]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield _coded(batch, tokenizer)
            batch, characters = [], 0
    if batch:
        yield _coded(batch, tokenizer)


def _coded(batch: Sequence[Document], tokenizer: Tokenizer) -> _Coded:
    texts = iter(tokenizer.encode_batch([document.text for document in batch if document.ids is None]))
    ids = [np.array(next(texts) if document.ids is None else document.ids, np.int32) for document in batch]
    for document, coded in zip(batch, ids, strict=True):
        if len(coded) and coded.max() >= tokenizer.mask_id:
            raise DataError(
                f"document {document.number} of file {document.source} (from 0) has token id {coded.max()}, and "
                f"text may have 0 to {tokenizer.mask_id - 1}, below the mask; is it another tokenizer's?"
            )
    return _Coded(ids, [(document.source, document.number, document.running) for document in batch])
