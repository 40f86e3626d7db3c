"""Which text a transcoder was not trained on, by the text itself and across stores.

1. A training run records 64-bit hashes of the clean tokens of its training side: of every whole sequence, and of its
   windows of 8 tokens (of a large text, of one window in so many, chosen by the hash itself).
2. A sequence of any store is training text if it was one whole, or if a quarter of its windows or more are among those:
   the same text noised otherwise, captured again, cut at other places, or out of another file is found. Of unrelated
   text some windows are common phrases.
3. All other sequences are held out: those that an evaluation takes of any store, and those of its own store that a
   run calibrates and measures itself on, which for that leaves out what of its split repeats the training side.
"""

# Axes: seq, pos

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.shapes import Int64
from transcoder.data import RowStore, SequenceSplit, split_sequences

if TYPE_CHECKING:
    from torch import Tensor

    from transcoder.model import CrossLayerTranscoder


WINDOW = 8
"""Tokens of a stretch of text that is compared."""
MUCH = 0.25
"""Share of a sequence's windows in the training text from which on it is training text."""
MOST_WINDOWS = 2**22
"""That a transcoder keeps the hashes of, about."""
MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
ABSENT = np.uint64(0)


def sequence_hashes(x_0: Int64[Tensor, "seq pos"]) -> NDArray[np.int64]:
    """One 64-bit hash for each sequence of clean tokens, in the order given.

    >>> import torch
    >>> a, b, c = sequence_hashes(torch.tensor([[1, 2], [2, 1], [1, 2]]))
    >>> bool(a == c), bool(a == b)
    (True, False)
    """
    rows = x_0.numpy().astype("<i8")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def window_hashes(x_0: Int64[Tensor, "seq pos"]) -> NDArray[np.uint64]:
    """A 64-bit hash [seq window] of every WINDOW consecutive tokens; ABSENT where one is -1, behind a shorter sequence.

    The sum of the tokens, each mixed, times powers of an odd number, mixed again.
    """
    tokens = x_0.numpy()
    mixed = _mixed(tokens.astype(np.uint64))
    count = max(0, tokens.shape[1] - WINDOW + 1)
    total = np.zeros((len(tokens), count), np.uint64)
    is_text = np.ones((len(tokens), count), np.bool_)
    for place in range(WINDOW):
        total = total * MULTIPLIER + mixed[:, place : place + count]
        is_text &= tokens[:, place : place + count] >= 0
    return np.where(is_text, np.maximum(_mixed(total), ABSENT + np.uint64(1)), ABSENT)


def training_hashes(x_0: Int64[Tensor, "seq pos"]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """What a transcoder keeps of the text it is trained on: sorted hashes, and how its windows were chosen."""
    windows = window_hashes(x_0)
    one_in = 1
    while np.count_nonzero(windows != ABSENT) > one_in * MOST_WINDOWS:
        one_in *= 2
    chosen = windows[_chosen(windows, one_in)].view(np.int64)
    hashes = np.unique(np.concatenate([sequence_hashes(x_0), chosen]))
    return hashes, {"tokens": WINDOW, "one_in": one_in}


def is_training_text(clt: CrossLayerTranscoder, x_0: Int64[Tensor, "seq pos"]) -> NDArray[np.bool_]:
    """Whether the transcoder was trained on each of these sequences, or on much of it.

    Raises:
        CheckpointError: If it does not record what it was trained on.
    """
    record = clt.provenance.get("text_windows")
    if clt.training_sequences is None or record is None or record["tokens"] != WINDOW:
        raise CheckpointError(
            "the transcoder does not record which text it was trained on, so none can be called held "
            "out; train it again with this version, or hand evaluate() sequences instead of a store"
        )
    return _is_of(clt.training_sequences, record["one_in"], x_0)


def _is_of(training: NDArray[np.int64], one_in: int, x_0: Int64[Tensor, "seq pos"]) -> NDArray[np.bool_]:
    """Whether each sequence, or much of it, is text that has these hashes."""
    windows = window_hashes(x_0)
    looked_at = _chosen(windows, one_in)
    found = np.isin(windows.view(np.int64), training) & looked_at
    is_much = found.sum(1) >= np.maximum(MUCH * looked_at.sum(1), 1)
    result: NDArray[np.bool_] = np.isin(sequence_hashes(x_0), training) | is_much
    return result


@dataclass(frozen=True)
class TextSplit(SequenceSplit):
    """A split by text, and what a transcoder keeps of its training side."""

    hashes: NDArray[np.int64]
    windows: dict[str, int]
    """How the windows among the hashes were chosen."""
    n_repeated: int
    """Sequences on neither side: not trained on, but they repeat text that is."""


def split_text(x_0: Int64[Tensor, "seq pos"], held_out_fraction: float, seed: int) -> TextSplit:
    """`split_sequences`, of whose held-out side only what `is_training_text` calls no training text is kept.

    Raises:
        DataError: If nothing is left on a side.
    """
    split = split_sequences(x_0, held_out_fraction, seed)
    hashes, windows = training_hashes(x_0[split.train])
    repeated = _is_of(hashes, windows["one_in"], x_0[split.held_out])
    if repeated.all():
        raise DataError(
            f"all {len(repeated)} sequences on the held-out side of the split repeat text of the training side "
            f"({MUCH:g} or more of their windows of {WINDOW} tokens), nothing is held out; use more varied text"
        )
    return TextSplit(split.train, split.held_out[~repeated], hashes, windows, int(repeated.sum()))


def _chosen(windows: NDArray[np.uint64], one_in: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (windows % np.uint64(one_in) == 0) & (windows != ABSENT)
    return found


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood 2014): every bit depends on every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def held_out_sequences(clt: CrossLayerTranscoder, store: RowStore) -> NDArray[np.int64]:
    """Numbers of the sequences of a store that the transcoder was not trained on, ascending.

    Raises:
        CheckpointError: If the transcoder does not record what it was trained on.
        DataError: If nothing is left.
    """
    x_0 = store.tokens()[0]
    held_out = np.flatnonzero(~is_training_text(clt, x_0))
    if len(held_out) == 0:
        raise DataError(
            f"all {len(x_0)} sequences of the store are text that the transcoder was trained on, nothing is "
            f"held out; capture other text"
        )
    return held_out
