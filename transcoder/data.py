"""What a training run takes from an activation store besides batches: its shape, normalisation and split.

Sequences are split into training and held-out ones by a keyed permutation; those of equal text stay together.
"""

# Axes: row, layer, d_model, seq, pos

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from capture.statistics import HookStatistics
from mdlm_interp.errors import DataError, StoreError, nearest
from mdlm_interp.randomness import permutation
from transcoder.config import hook_names
from transcoder.normalisation import Normalisation, normalisation_from_moments


@runtime_checkable
class RowStore(Protocol):
    """What is used of `capture.ActivationStore` to judge a transcoder."""

    def __len__(self) -> int:
        """Committed rows."""
        ...

    @property
    def hooks(self) -> Sequence[str]:
        """Names of the recorded hook points."""
        ...

    @property
    def length(self) -> int:
        """Positions of each sequence."""
        ...

    @property
    def n_sequences(self) -> int:
        """Recorded sequences."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """How the store was captured."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the activations come from: the model's weights, the text, versions."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the capture ran to its end."""
        ...

    @property
    def planned_rows(self) -> int:
        """Rows that the store will hold when it is complete."""
        ...

    def read(self, rows: Any, hooks: Any) -> Mapping[str, Tensor]:
        """Float32 activations [row d] of each hook point."""
        ...

    def coords(self, rows: Any, names: Any) -> Mapping[str, Tensor]:
        """Coordinates of rows by name."""
        ...

    def sequence_rows(self, seq: int) -> slice:
        """The rows of a sequence."""
        ...

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Clean and noised token ids [seq pos]."""
        ...

    def times(self) -> Tensor:
        """Diffusion time of each sequence, float64."""
        ...

    def statistics(self, hook: str) -> HookStatistics:
        """Moments of a hook point by stratum."""
        ...

    def fingerprint(self) -> str:
        """Hash of all the store's data."""
        ...


class Coverage(NamedTuple):
    """How much of a planned capture a store holds."""

    committed_rows: int
    planned_rows: int
    complete: bool

    def __str__(self) -> str:
        """One sentence for a warning or a report, without a full stop."""
        rows = f"{self.committed_rows:,} of {self.planned_rows:,} planned rows"
        state = "complete" if self.complete else "INCOMPLETE, its capture did not run to the end"
        return f"{rows} ({state})"


def coverage(store: RowStore) -> Coverage:
    """Committed and planned rows of a store."""
    return Coverage(len(store), store.planned_rows, store.complete)


def infer_shape(store: RowStore, input_hook: str, output_hook: str) -> tuple[int, int]:
    """Number of layers and d_model of a store that holds both hook points of every layer.

    Raises:
        StoreError: If a hook point is missing.
    """
    present = set(store.hooks)
    # The last block of which there is either: a store that ends with some input has lost the outputs.
    n_layers = 0
    for block in range(
        1 + max((int(name.split(".")[1]) for name in present if name.startswith("blocks.")), default=-1)
    ):
        if {hook_names(output_hook, block + 1)[-1], hook_names(input_hook, block + 1)[-1]} & present:
            n_layers = block + 1
    for name in (*hook_names(output_hook, max(1, n_layers)), *hook_names(input_hook, max(1, n_layers))):
        if name not in present:
            raise StoreError(
                f"the store holds no {name!r}{nearest(name, sorted(present))}; capture {input_hook!r} and "
                f"{output_hook!r} of every block"
            )
    width = store.read([0], [hook_names(output_hook, 1)[0]])[hook_names(output_hook, 1)[0]].shape[-1]
    return n_layers, int(width)


def store_normalisation(store: RowStore, hooks: Sequence[str]) -> Normalisation:
    """The normalisation of some hook points from the store's statistics.

    Raises:
        DataError: If an activation does not vary over the store.
    """
    pooled = [store.statistics(name).pooled() for name in hooks]
    return normalisation_from_moments([(mean, mean_square) for _, mean, mean_square in pooled], hooks)


@dataclass(frozen=True)
class SequenceSplit:
    """Numbers of the sequences on each side, ascending."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_sequences(x_0: Tensor, held_out_fraction: float, seed: int) -> SequenceSplit:
    """Hold out a share of the sequences; those with equal clean tokens stay on one side.

    Args:
        x_0: Clean token ids [seq pos]: the same text noised twice must not be on both sides.
    Raises:
        DataError: If a side would be empty.
    """
    n_sequences = x_0.shape[0]
    groups = np.unique(x_0.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    n_groups = int(groups.max()) + 1 if n_sequences else 0
    if n_groups < 2:
        raise DataError(
            f"a split needs at least 2 different sequences, the store has {n_groups}; capture more text"
        )
    # Renumber groups by first appearance, so that the split does not depend on how token ids sort.
    first = np.full(n_groups, n_sequences)
    np.minimum.at(first, groups, np.arange(n_sequences))
    groups = np.argsort(np.argsort(first))[groups]
    n_held_out = min(max(1, round(held_out_fraction * n_groups)), n_groups - 1)
    chosen = permutation(seed, "clt:split", 0, n_groups)[:n_held_out]
    is_held_out = np.isin(groups, chosen)
    return SequenceSplit(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))
