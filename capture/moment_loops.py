"""The loop that numba compiles for `statistics.py`: the same additions in the same order, in one pass over the rows.

Floating-point contraction and reassociation are off (numba's default), so each result has the bits of the plain path.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import no_type_check

import numpy as np

from oracle.kernels import compiled


@compiled()
@no_type_check
def add_runs(rows, order, runs, total, squares):
    """See `statistics.add_runs`."""
    run_sum = np.empty(rows.shape[1])
    for run in range(len(runs)):
        start, stop = runs[run, 1], runs[run, 2]
        square = squares[run]
        run_sum[:] = 0.0
        at = start
        # Four rows a turn, so that the sums are loaded and kept a quarter as often.
        while at + 4 <= stop:
            a, b, c, d = rows[order[at]], rows[order[at + 1]], rows[order[at + 2]], rows[order[at + 3]]
            for i in range(len(run_sum)):
                # `float` would leave them in float32.
                va, vb, vc, vd = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
                run_sum[i] = (((run_sum[i] + va) + vb) + vc) + vd
                square[i] = (((square[i] + va * va) + vb * vb) + vc * vc) + vd * vd
            at += 4
        while at < stop:
            row = rows[order[at]]
            for i in range(len(run_sum)):
                value = np.float64(row[i])
                run_sum[i] += value
                square[i] += value * value
            at += 1
        group = total[runs[run, 0]]
        for i in range(len(run_sum)):
            group[i] += run_sum[i]
