"""Where features are active in a store, in two passes over its rows.

1. Block by block, every layer is encoded. Counts and sums by (masked, part of [0, 1] in t) grow by the block, and
   `Strongest` keeps the strongest occurrences of each feature.
2. The sequences of these are encoded once more, for each feature's activations on the tokens around them.

Memory is that of one block and of the result, which grows with features and examples; of the rows only token ids are
held, 8 bytes a token. All committed sequences count, those that the transcoder was trained on too.
"""

# Axes: layer, feature, is_masked (no, yes), t_bin, example (strongest first), place (position in a context), row, seq

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from capture import ActivationStore
from capture.schema import T_BINS
from mdlm_interp.errors import DataError
from transcoder.dashboard.strongest import Strongest
from transcoder.identity import check_store
from transcoder.model import CrossLayerTranscoder
from transcoder.sequence_choice import well_mixed

BLOCK_VALUES = 2**24
"""Activations of one layer that are in memory at once."""
BLOCK_ROWS = 4096
"""At most; blocks end where sequences do."""


@dataclass(frozen=True, kw_only=True)
class Occurrences:
    """What every feature did on a store's rows."""

    n_sequences: int
    """Sequences that were looked at."""
    rows: NDArray[np.int64]
    """[is_masked t_bin] rows that were looked at."""
    active: NDArray[np.int64]
    """[layer feature is_masked t_bin] rows in which the feature is above zero."""
    total: NDArray[np.float64]
    """[layer feature is_masked t_bin] sum of its activations."""
    values: NDArray[np.float32]
    """[layer feature example] the strongest activations; NaN where there are fewer."""
    seqs: NDArray[np.int64]
    """[layer feature example] their sequences; -1 where there are fewer."""
    positions: NDArray[np.int64]
    """[layer feature example] likewise."""
    times: NDArray[np.float64]
    """[layer feature example] t of the row; NaN where there are fewer."""
    starts: NDArray[np.int64]
    """[layer feature example] position of a context's first place."""
    clean: NDArray[np.int32]
    """[layer feature example place] token ids of the clean text around them; -1 outside it."""
    read: NDArray[np.int32]
    """[layer feature example place] token ids that the model read."""
    acts: NDArray[np.float32]
    """[layer feature example place] the feature's activations; NaN outside, and where nothing was recorded."""

    @property
    def n_rows(self) -> int:
        """Rows that were looked at."""
        return int(self.rows.sum())

    @property
    def density(self) -> NDArray[np.float64]:
        """[layer feature] share of the rows in which each feature is active."""
        shares: NDArray[np.float64] = self.active.sum((2, 3)) / self.n_rows
        return shares


@dataclass
class _Layer:
    """What grows while rows stream by."""

    strongest: Strongest
    active: NDArray[np.int64] = field(init=False)
    total: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        n_features = len(self.strongest.values)
        self.active = np.zeros((2 * T_BINS, n_features), np.int64)
        self.total = np.zeros((2 * T_BINS, n_features))

    def add(
        self,
        acts: Tensor,
        rows: NDArray[np.int64],
        seqs: NDArray[np.int64],
        strata: NDArray[np.int64],
    ) -> None:
        entry, feature = (part.numpy() for part in (acts > 0).nonzero(as_tuple=True))
        values = acts.numpy()[entry, feature]
        places = strata[entry] * acts.shape[1] + feature
        size = self.active.size
        self.active += np.bincount(places, minlength=size).reshape(self.active.shape)
        self.total += np.bincount(places, weights=values, minlength=size).reshape(self.total.shape)
        self.strongest.add(feature, values, rows[entry], seqs[entry])


@torch.no_grad()
def find_occurrences(
    clt: CrossLayerTranscoder,
    store: ActivationStore,
    *,
    n_examples: int = 8,
    before: int = 12,
    after: int = 12,
    max_sequences: int | None = None,
    progress: bool = False,
) -> Occurrences:
    """Look for every feature's occurrences.

    Args:
        store: Of the model that the transcoder was trained on, with its input hooks.
        n_examples: Strongest occurrences to keep of a feature, at most one of a sequence.
        before: Tokens of context before each.
        after: Likewise.
        max_sequences: Sequences to look at: each time in its share, and as many texts as that allows; none looks at
            all.
    Raises:
        DataError: If a number is out of range, the store has no whole sequence, or the transcoder is a batchtopk.
        StoreError: If the store is of another model, or lacks a hook point.
    """
    for name, value, least in (
        ("n_examples", n_examples, 1),
        ("before", before, 0),
        ("after", after, 0),
        ("max_sequences", 1 if max_sequences is None else max_sequences, 1),
    ):
        if value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")
    check_store(clt, store)
    if store.n_sequences == 0:
        raise DataError(f"{store.name} has no sequence that is committed whole; let its capture go on")
    text = store.sequence_column("block").numpy()
    wanted = store.n_sequences if max_sequences is None else max_sequences
    seqs = well_mixed(store.times().numpy(), text, wanted, seed=0)
    rows, layers = _stream(clt, store, seqs, n_examples, progress)
    n_layers, n_features = clt.config.n_layers, clt.config.n_features
    by_stratum = (n_layers, 2, T_BINS, n_features)
    kept = [layer.strongest for layer in layers]
    found = np.stack([one.rows for one in kept])
    values = np.stack([one.values for one in kept])
    return Occurrences(
        n_sequences=len(seqs),
        rows=rows,
        active=np.moveaxis(np.stack([layer.active for layer in layers]).reshape(by_stratum), -1, 1),
        total=np.moveaxis(np.stack([layer.total for layer in layers]).reshape(by_stratum), -1, 1),
        values=np.where(found >= 0, values, np.float32(np.nan)),
        **_contexts(clt, store, np.stack([one.seqs for one in kept]), found, before, after, progress),
    )


def _blocks(store: ActivationStore, seqs: NDArray[np.int64], n_rows: int) -> Iterator[slice]:
    """Rows of these sequences, neighbours together, up to about `n_rows` at a time."""
    start = stop = -1
    for seq in seqs.tolist():
        rows = store.sequence_rows(seq)
        if rows.start != stop or rows.stop - start > n_rows:
            if stop > start:
                yield slice(start, stop)
            start = rows.start
        stop = rows.stop
    if stop > start:
        yield slice(start, stop)


def _stream(
    clt: CrossLayerTranscoder,
    store: ActivationStore,
    seqs: NDArray[np.int64],
    n_examples: int,
    progress: bool,
) -> tuple[NDArray[np.int64], list[_Layer]]:
    n_features, hooks = clt.config.n_features, list(clt.config.input_hooks)
    layers = [_Layer(Strongest(n_features, n_examples)) for _ in hooks]
    seen = np.zeros(2 * T_BINS, np.int64)
    size = min(BLOCK_ROWS, max(1, BLOCK_VALUES // n_features))
    with tqdm(total=len(seqs), desc="features", unit="seq", disable=None if progress else True) as bar:
        for block in _blocks(store, seqs, size):
            columns = store.coords(block, ["seq", "t", "is_masked"])
            t_bin = (columns["t"] * T_BINS).long().clamp(0, T_BINS - 1)
            strata = (columns["is_masked"].long() * T_BINS + t_bin).numpy()
            seen += np.bincount(strata, minlength=len(seen))
            numbers, in_seq = np.arange(block.start, block.stop), columns["seq"].numpy()
            inputs = store.read(block, hooks)
            # A sequence may be longer than a block should be.
            for first in range(0, len(numbers), size):
                part = slice(first, first + size)
                for number, hook in enumerate(hooks):
                    acts = _encode(clt, inputs[hook][part], number)
                    layers[number].add(acts, numbers[part], in_seq[part], strata[part])
            bar.update(int(in_seq[-1] - in_seq[0] + 1))
    return seen.reshape(2, T_BINS), layers


def _encode(clt: CrossLayerTranscoder, x: Tensor, layer: int) -> Tensor:
    return clt.encode_layer(x.to(clt.W_enc.device), layer).float().cpu()


def _contexts(
    clt: CrossLayerTranscoder,
    store: ActivationStore,
    seqs: NDArray[np.int64],
    rows: NDArray[np.int64],
    before: int,
    after: int,
    progress: bool,
) -> dict[str, NDArray[Any]]:
    """The fields of `Occurrences` from `seqs` on."""
    window = np.arange(-before, after + 1)
    shape = (*seqs.shape, len(window))
    positions, times = np.full(seqs.shape, -1), np.full(seqs.shape, np.nan)
    clean, read = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    acts = np.full(shape, np.nan, np.float32)
    x_0, x_t = (store.sequence_column(name).numpy() for name in ("x0", "xt"))
    hooks = list(clt.config.input_hooks)
    order = np.argsort(seqs, axis=None, kind="stable")
    begin = int(np.searchsorted(seqs.reshape(-1)[order], 0))  # those before it are empty
    groups = _groups(seqs.reshape(-1), order[begin:])
    for seq, members in tqdm(list(groups), desc="contexts", unit="seq", disable=None if progress else True):
        span = store.sequence_rows(seq)
        columns = store.coords(span, ["pos", "t"])
        row_of = np.full(x_0.shape[1] + 1, -1)  # the last one stands for every position outside
        row_of[columns["pos"].numpy()] = np.arange(span.stop - span.start)
        layer, feature, example = np.unravel_index(members, seqs.shape)
        at = rows[layer, feature, example] - span.start
        positions[layer, feature, example] = columns["pos"].numpy()[at]
        times[layer, feature, example] = columns["t"].numpy()[at]
        around = positions[layer, feature, example][:, None] + window
        inside = (around >= 0) & (around < x_0.shape[1])
        around = np.where(inside, around, x_0.shape[1])
        for kept, text in ((clean, x_0[seq]), (read, x_t[seq])):
            kept[layer, feature, example] = np.append(text, -1)[around]
        inputs = store.read(span, hooks)
        for number in np.unique(layer).tolist():
            mine = layer == number
            of_rows = row_of[around[mine]]
            found = _encode(clt, inputs[hooks[number]], number).numpy()[of_rows, feature[mine][:, None]]
            acts[number, feature[mine], example[mine]] = np.where(of_rows >= 0, found, np.nan)
    starts = np.where(positions >= 0, positions - before, -1)
    return {
        "seqs": seqs,
        "positions": positions,
        "times": times,
        "starts": starts,
        "clean": clean,
        "read": read,
        "acts": acts,
    }


def _groups(seqs: NDArray[np.int64], order: NDArray[np.int64]) -> Sequence[tuple[int, NDArray[np.int64]]]:
    """Places of each sequence's examples, by sequence."""
    numbers, starts = np.unique(seqs[order], return_index=True)
    return list(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else []
