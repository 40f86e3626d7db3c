"""Checks a store against itself and against the model that it was captured from.

1. Every byte: the manifest against its own hash, each shard file's chunks and index against their checksums
   and those against the manifest, every other file against the manifest's SHA-256.
2. Before that, as it takes hours for a large store: that the model and tokenizer are there, and the store's own.
3. The noise of sampled sequences, made again from seed, block and time.
4. The activations of sampled batches, made again by a forward pass of the recorded shape. Exact arithmetic
   must give the same bits on any machine. Native arithmetic must do so on the stack that captured; elsewhere
   it must agree to `recomputed.BOUND`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from capture.checked_files import verify_files
from capture.convert.exported import ExportedStore
from capture.reader import ActivationStore, open_store
from capture.recomputed import Origin, Verification, check_batches, origin_of, recompute
from mdlm_interp.errors import CheckpointError


def verify_store(
    path: str | Path,
    *,
    endpoint: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    batches: int = 4,
    seed: int = 0,
    progress: Any = None,
) -> Verification:
    """Check every byte of a store and recompute some of its batches; of an export, its bytes only.

    Args:
        model: Where the weights are; none takes the store's own word.
        tokenizer: Where the tokenizer is; none takes the store's word, or the model's own if the store's came with it.
        batches: How many to recompute; all, if there are not so many.
        seed: Key of the sample.
        progress: As of `verify_bytes`.
    Raises:
        StoreError: Naming what is missing, damaged or different.
        ConfigError: If batches is no whole number from 0.
    """
    store = open_store(path, endpoint=endpoint)
    origin = needed_origin(store, model, tokenizer, batches)
    files, size = verify_bytes(store, progress=progress)
    rows = Verification()
    if origin is not None:
        rows = recompute(store, origin, batches=batches, seed=seed)
    return replace(rows, files=files, size=size)


def needed_origin(
    store: ActivationStore, model: str | None, tokenizer: str | None, batches: int
) -> Origin | None:
    """What recomputing that many batches needs; None if there is nothing to recompute.

    Raises:
        ConfigError: If batches is no whole number from 0.
        MdlmError: As `origin_of`.
    """
    check_batches(batches)
    if isinstance(store, ExportedStore) or not batches or not store.n_sequences:
        return None
    try:
        return origin_of(store, model, tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --batches 0 checks the bytes only") from error


def verify_bytes(store: ActivationStore, *, progress: Any = None) -> tuple[int, int]:
    """(files, bytes) of a store or an export, read and compared with their checksums.

    Args:
        progress: Called with the rows of each shard that was found right; of an export, with bytes.
    Raises:
        StoreError: Naming what is missing or damaged.
    """
    if isinstance(store, ExportedStore):
        return store.verify(progress or (lambda _: None))
    return verify_files(store, progress=progress)
