"""The loops that numba compiles for `compiled.py` to put entries in order of their features, and to add them up.

Floating-point contraction and reassociation are off (numba's default). They stand apart from `loops.py`, whose loops
have to stay beside what is spelled out for them there: numba keeps a loop on disk for as long as its own file is as
old as it was.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import no_type_check

from oracle.kernels import compiled


@compiled()
@no_type_check
def by_feature(indices, offsets, starts, rows, places):
    """Sort entries by feature, rows ascending within one: a counting sort.

    Args:
        starts: Filled with the first sorted entry of each feature, then nnz.
        rows: Filled with the row of each sorted entry.
        places: Filled with where each sorted entry came from.

    Returns:
        Whether the entries are sound: nothing is filled in, and no other loop may run, if they are not.
    """
    n_features, last = starts.size - 1, 0
    for offset in offsets:
        if not last <= offset <= indices.size:
            return False
        last = offset
    if offsets[0] != 0 or last != indices.size:
        return False
    starts[:] = 0
    for feature in indices:
        if not 0 <= feature < n_features:
            return False
        starts[feature + 1] += 1
    for feature in range(n_features):
        starts[feature + 1] += starts[feature]
    room = starts[:-1].copy()
    for row in range(offsets.size - 1):
        for entry in range(offsets[row], offsets[row + 1]):
            at = room[indices[entry]]
            room[indices[entry]] = at + 1
            rows[at] = row
            places[at] = entry
    return True


@compiled()
@no_type_check
def sums_by_feature(out, fresh, starts, values):
    """out[feature] += the values of its entries."""
    for feature in range(starts.size - 1):
        total = values.dtype.type(0) if fresh else out[feature]
        for entry in range(starts[feature], starts[feature + 1]):
            total += values[entry]
        out[feature] = total
