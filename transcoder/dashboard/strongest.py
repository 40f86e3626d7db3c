"""The strongest occurrences of each feature of a layer, kept while rows stream by.

A feature keeps at most one occurrence of a sequence, its strongest there: otherwise one repeated word fills the list.
Of equal values the earlier row stays, so that the result does not depend on how rows are divided into blocks.
"""

# Axes: feature, example (strongest first), entry

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Strongest:
    """The `n_examples` strongest occurrences of each of `n_features` features.

    Values are -inf, rows and sequences -1, where a feature has fewer.
    """

    def __init__(self, n_features: int, n_examples: int) -> None:
        shape = (n_features, n_examples)
        self.values = np.full(shape, -np.inf, np.float32)
        self.rows = np.full(shape, -1, np.int64)
        self.seqs = np.full(shape, -1, np.int64)

    def add(
        self,
        features: NDArray[np.int64],
        values: NDArray[np.float32],
        rows: NDArray[np.int64],
        seqs: NDArray[np.int64],
    ) -> None:
        """Take active entries into account; their rows come after all that were added before."""
        # An entry no stronger than the last one kept cannot come in, and later rows lose ties.
        strong = values > self.values[features, -1]
        touched = np.unique(features[strong])
        if not len(touched):
            return
        held = self.rows[touched] >= 0
        feature = np.concatenate([np.repeat(touched, held.sum(1)), features[strong]])
        value = np.concatenate([self.values[touched][held], values[strong]])
        row = np.concatenate([self.rows[touched][held], rows[strong]])
        seq = np.concatenate([self.seqs[touched][held], seqs[strong]])
        order = np.lexsort((row, -value, feature))
        # Of a sequence's occurrences the first in this order is the strongest.
        width = int(seq.max()) + 1
        _, first = np.unique(feature[order] * width + seq[order], return_index=True)
        order = order[np.sort(first)]
        feature = feature[order]
        rank = np.arange(len(order)) - np.searchsorted(feature, feature)
        order, feature, rank = (part[rank < self.values.shape[1]] for part in (order, feature, rank))
        for kept, found, empty in (
            (self.values, value, -np.inf),
            (self.rows, row, -1),
            (self.seqs, seq, -1),
        ):
            kept[touched] = empty
            kept[feature, rank] = found[order]
