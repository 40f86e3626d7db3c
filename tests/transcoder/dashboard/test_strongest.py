"""The strongest occurrences of each feature, against sorting everything at once."""

from __future__ import annotations

import numpy as np
import pytest

from transcoder.dashboard.strongest import Strongest


def at_once(acts: np.ndarray, seqs: np.ndarray, count: int) -> list[list[tuple[float, int]]]:
    """Value and row of each feature's strongest rows, one a sequence, the earlier of equal ones first."""
    found = []
    for column in acts.T:
        best: list[tuple[float, int]] = []
        seen: set[int] = set()
        for row in sorted(np.flatnonzero(column > 0).tolist(), key=lambda row: (-column[row], row)):
            if seqs[row] not in seen and len(best) < count:
                seen.add(int(seqs[row]))
                best.append((float(column[row]), row))
        found.append(best)
    return found


def kept(strongest: Strongest) -> list[list[tuple[float, int]]]:
    return [
        [(float(value), int(row)) for value, row in zip(values, rows, strict=True) if row >= 0]
        for values, rows in zip(strongest.values, strongest.rows, strict=True)
    ]


def streamed(acts: np.ndarray, seqs: np.ndarray, count: int, cuts: list[int]) -> Strongest:
    strongest = Strongest(acts.shape[1], count)
    for first, after in zip([0, *cuts], [*cuts, len(acts)], strict=True):
        row, feature = np.nonzero(acts[first:after] > 0)
        row += first
        strongest.add(feature, acts[row, feature], row, seqs[row])
    return strongest


@pytest.mark.parametrize("seed", range(8))
def test_any_division_into_blocks_gives_what_sorting_gives(seed):
    draw = np.random.default_rng(seed)
    n_rows, n_features, count = 90, 7, int(draw.integers(1, 6))
    # Few different values, so that many are equal.
    acts = draw.integers(-3, 5, (n_rows, n_features)).clip(0).astype(np.float32)
    acts[:, 2] = 0
    acts[5:, 3] = 0
    seqs = np.sort(draw.integers(0, 12, n_rows))
    expected = at_once(acts, seqs, count)
    for n_cuts in (0, 1, 5, 40):
        cuts = sorted(draw.integers(0, n_rows, n_cuts).tolist())
        strongest = streamed(acts, seqs, count, cuts)
        assert kept(strongest) == expected
        assert np.array_equal(strongest.seqs, np.where(strongest.rows >= 0, seqs[strongest.rows], -1))


def test_a_sequences_second_best_does_not_keep_others_out():
    acts = np.array([[9.0], [8.0], [7.0], [1.0]], np.float32)
    assert kept(streamed(acts, np.array([0, 0, 0, 1]), 2, [])) == [[(9.0, 0), (1.0, 3)]]
