"""Training text as one stream of tokens, and batches as a pure function of (seed, step).

Documents are split into training and held-out ones by the hash of their text, so equal documents never
stand on both sides and adding files moves nobody. Training sequences are windows of the stream at random
offsets; validation sequences are its consecutive blocks, with end-of-texts around them where training's
have them.
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
from mdlm_interp.documents import expand_files, read_texts
from mdlm_interp.errors import DataError
from mdlm_interp.randomness import uniforms
from mdlm_interp.shapes import Int64
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.config import SHORTEST

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


def read_streams(files: Sequence[Path], tokenizer: Tokenizer, held_out_share: float) -> TokenStreams:
    """Tokenise the files and split them by document; a repeated file repeats in training only.

    Raises:
        DataError: If one of the two sides is empty.
    """
    files = expand_files(files)
    parts: dict[bool, list[NDArray[np.uint16]]] = {True: [], False: []}
    sizes = {True: 0, False: 0}
    seen: set[bytes] = set()
    for texts in _batches(read_texts(files)):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            held_out = is_held_out(text, held_out_share)
            digest = hashlib.sha256(text.encode()).digest()
            if held_out and digest in seen:
                continue
            seen.add(digest)
            parts[held_out].append(np.array([*ids, tokenizer.eos_id], np.uint16))
            sizes[held_out] += len(text.encode())
    for held_out, name in ((False, "training"), (True, "held-out")):
        if not parts[held_out]:
            raise DataError(
                f"no document fell on the {name} side; give more documents or change held_out_share"
            )
    train, held = np.concatenate(parts[False]), np.concatenate(parts[True])
    return TokenStreams(train, held, sizes[False], sizes[True], text_sources(files))


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


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == ENCODE_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class WindowSampler:
    """Random windows of a token stream; batch `step` is a pure function of (seed, step)."""

    stream: NDArray[np.uint16]
    length: int
    batch_size: int
    eos_id: int
    seed: int
    wrap_share: float
    short_share: float

    def __post_init__(self) -> None:
        if len(self.stream) < self.length:
            raise DataError(
                f"the training text has {len(self.stream)} tokens, fewer than one window of {self.length}"
            )

    def indices(self, step: int) -> range:
        """Numbers of the sequences of a step."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def batch(self, step: int) -> Int64[Tensor, "batch pos"]:
        """Token ids of a step's sequences."""
        length = self.length
        is_short, where = uniforms(self.seed, "length", step, 2)
        if is_short < self.short_share and length > SHORTEST:
            shorter = [size for k in range(16) if (size := SHORTEST << k) < length]
            length = shorter[int(where * len(shorter))]
        rows = [self._window(index, length) for index in self.indices(step)]
        return torch.from_numpy(np.stack(rows))

    def _window(self, index: int, length: int) -> NDArray[np.int64]:
        where, wrapped = uniforms(self.seed, "window", index, 2)
        if wrapped >= self.wrap_share:
            start = int(where * (len(self.stream) - length + 1))
            return self.stream[start : start + length].astype(np.int64)
        start = int(where * (len(self.stream) - length + 3))
        inner = self.stream[start : start + length - 2].astype(np.int64)
        return np.concatenate([[self.eos_id], inner, [self.eos_id]])


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
