"""What it means that two stores hold the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from capture import open_store, schema
from capture.convert import ExportedStore
from capture.reader import ActivationStore


def opened(path: Path) -> ExportedStore:
    """The export at a path."""
    found = open_store(path)
    assert isinstance(found, ExportedStore)
    return found


def assert_same_content(found: ActivationStore, expected: ActivationStore) -> None:
    """Every array, bit for bit as it is stored, and all that is said about them. Exact."""
    assert (len(found), found.hooks, found.dtype) == (len(expected), expected.hooks, expected.dtype)
    assert (found.length, found.n_sequences) == (expected.length, expected.n_sequences)
    assert (found.complete, found.planned_rows) == (expected.complete, expected.planned_rows)
    assert (found.config, found.provenance) == (expected.config, expected.provenance)
    names = [*(f"acts/{hook}" for hook in found.hooks), *(f"rows/{name}" for name in schema.ROW_COLUMNS)]
    for name in names:
        pair = [store.files.array(name).read(0, len(store)) for store in (found, expected)]
        assert_same_bits(*pair)
    for name in schema.SEQUENCE_COLUMNS:
        assert_same_bits(*[store.sequence_column(name).numpy() for store in (found, expected)])
    for hook in found.hooks:
        for what in schema.STATISTICS:
            pair = [getattr(store.statistics(hook), what).numpy() for store in (found, expected)]
            assert_same_bits(*pair)
    assert found.fingerprint() == expected.fingerprint()


def assert_same_bits(found: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    """Type, shape and bytes; NaN is equal to NaN with the same bits."""
    assert (found.dtype.name, found.shape) == (expected.dtype.name, expected.shape)
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


def same_values(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """`torch.equal`, but NaN is equal to NaN."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )
