"""Which text a transcoder was not trained on, by the text itself and across stores.

1. A training run records a 64-bit hash of every sequence on its training side: of the clean tokens, so the
   same text noised otherwise, or captured again into another store, has the same hash.
2. A sequence of any store is held out if its hash is not among those.
3. That sees whole sequences only. Where two stores cut the same file into sequences at other places,
   training text cannot be told from other text, and the store is refused.
"""

# Axes: seq, pos

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.shapes import Int64
from transcoder.data import RowStore

if TYPE_CHECKING:
    from torch import Tensor

    from transcoder.model import CrossLayerTranscoder


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


def is_training_text(clt: CrossLayerTranscoder, x_0: Int64[Tensor, "seq pos"]) -> NDArray[np.bool_]:
    """Whether the transcoder was trained on each of these sequences.

    Raises:
        CheckpointError: If it does not record what it was trained on.
    """
    if clt.training_sequences is None:
        raise CheckpointError(
            "the transcoder does not record which sequences it was trained on, so none can be called held "
            "out; train it again with this version, or hand evaluate() sequences instead of a store"
        )
    return np.isin(sequence_hashes(x_0), clt.training_sequences)


def held_out_sequences(clt: CrossLayerTranscoder, store: RowStore) -> NDArray[np.int64]:
    """Numbers of the sequences of a store that the transcoder was not trained on, ascending.

    Raises:
        CheckpointError: If the transcoder does not record what it was trained on.
        DataError: If nothing is left, or the store has text of the training store cut into other sequences.
    """
    x_0 = store.tokens()[0]
    held_out = np.flatnonzero(~is_training_text(clt, x_0))
    check_cut(clt.provenance.get("store", {}), store)
    if len(held_out) == 0:
        raise DataError(
            f"all {len(x_0)} sequences of the store are text that the transcoder was trained on, nothing is "
            f"held out; capture other text"
        )
    return held_out


def cut_of(store: RowStore) -> dict[str, Any]:
    """What decides where a store's text is cut into sequences: compared by `check_cut`."""
    sources = [str(source["sha256"]) for source in store.provenance.get("sources", ())]
    settings = {name: store.config.get(name) for name in ("wrap", "pack")}
    return {"length": store.length, **settings, "sources": sources}


def check_cut(trained_on: Mapping[str, Any], store: RowStore) -> None:
    """Raise DataError if a text file of the training store is cut into other sequences in this store.

    Sequences are cut from the files one after the other, so a file is cut alike in both only if all files
    before it are the same too.
    """
    before, now = trained_on.get("cut", {}), cut_of(store)
    files = list(before.get("sources", ()))
    alike = 0
    if all(before.get(name) == now[name] for name in now if name != "sources"):
        pairs = zip(files, now["sources"], strict=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    both = set(files[alike:]) & set(now["sources"]) | set(files) & set(now["sources"][alike:])
    if both:
        raise DataError(
            f"the text file with sha256 {sorted(both)[0][:12]} is in this store and in the training store, cut "
            f"into sequences at other places (length {now['length']} here, {before.get('length')} there), so "
            f"training text cannot be told apart; capture it as for training, or capture other text"
        )
