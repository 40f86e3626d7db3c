"""Feature activations of one layer as a list of active entries.

Row r's entries are `offsets[r]` up to `offsets[r + 1]`. Within a row the features ascend, none twice: the order of
additions in a reconstruction is theirs. A value may be zero: it adds nothing, and still has its gradient.
"""

# Axes: batch, feature, nnz (active entries, row by row)

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdlm_interp.shapes import Bool, Float, Int, Int64


@dataclass(frozen=True)
class SparseActs:
    """Active features of each row of a batch; the values may carry a gradient."""

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    """Feature of each entry, as int32."""
    offsets: Int64[Tensor, " rows_and_one"]
    """First entry of each row, then nnz."""

    @property
    def n_rows(self) -> int:
        """Rows of the batch, those without an entry among them."""
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        """Entries of all rows."""
        return len(self.indices)

    def rows(self) -> Int64[Tensor, " nnz"]:
        """Row of each entry."""
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.nnz)

    def with_values(self, values: Float[Tensor, " nnz"]) -> SparseActs:
        """The same entries with other values."""
        return replace(self, values=values)

    def detach(self) -> SparseActs:
        """The same without gradient."""
        return self.with_values(self.values.detach())

    def to_dense(self, n_features: int) -> Float[Tensor, "batch feature"]:
        """As a matrix, zero where there is no entry; the gradient reaches the values."""
        dense = self.values.new_zeros(self.n_rows * n_features)
        places = self.rows() * n_features + self.indices
        return dense.index_put((places,), self.values).reshape(self.n_rows, n_features)


def from_mask(pre_acts: Float[Tensor, "batch feature"], mask: Bool[Tensor, "batch feature"]) -> SparseActs:
    """Entries where the mask is true, their values as they are, negative and zero ones too."""
    rows, features = mask.nonzero(as_tuple=True)
    return SparseActs(pre_acts[rows, features], features.to(torch.int32), offsets_of(mask.sum(1)))


def from_dense(feature_acts: Float[Tensor, "batch feature"]) -> SparseActs:
    """Entries that are not zero, NaNs among them."""
    return from_mask(feature_acts, feature_acts.detach() != 0)


def from_topk(values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> SparseActs:
    """Entries of a top-k, in any order within a row; values below or at zero are left out, NaNs are not."""
    indices, order = indices.sort(dim=1)
    values = values.gather(1, order)
    kept = ~(values.detach() <= 0)
    return SparseActs(values[kept], indices[kept].to(torch.int32), offsets_of(kept.sum(1)))


def offsets_of(counts: Int64[Tensor, " batch"]) -> Int64[Tensor, " rows_and_one"]:
    """Offsets of rows with so many entries."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
