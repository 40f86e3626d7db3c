"""Reads a store: activations and coordinates of any rows, as torch tensors.

Only committed rows exist for a reader; what an interrupted run left behind them is never read. A chunk
whose checksum does not match, or a file that is gone, is an error that names the file.
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture import schema
from capture.places import Place, place_of
from capture.row_numbers import RowNumbers, Rows, shown, whole_number
from capture.statistics import HookStatistics, RunningMoments
from capture.store_files import RowArray, StoreFiles
from capture.store_header import StoreHeader
from capture.stored_values import floats, native
from mdlm_interp.errors import StoreError, nearest
from mdlm_interp.shapes import Float64, Int64

BLOCK_BYTES = 2**26
"""Of one hook's rows: what is asked of the disk before it is read, or held in memory to be hashed."""


def open_store(path: str | Path, *, endpoint: str | None = None) -> ActivationStore:
    """Open an activation store for reading, complete or not: a directory, a URL, or an HDF5 or safetensors export.

    Args:
        endpoint: URL of an S3-compatible service for an s3:// path; none takes AWS_ENDPOINT_URL, or Amazon's.
    Raises:
        StoreError: If there is no store, its metadata is damaged, or a later version wrote it.
    """
    if not isinstance(path, str | os.PathLike):
        raise StoreError(f"a store is opened by its path or URL, got {shown(path)}; pass a str or a Path")
    # Here, because what reads an export is made of what is in this module.
    from capture.convert.exported import open_export

    return open_export(path) or ActivationStore(place_of(path, endpoint))


class ActivationStore(StoreHeader):
    """Activations of a model over noised text, one row a token; `open_store` makes it.

    Several threads may use it at a time, and of a store in a local directory processes forked from this one; see
    `remote.py` for object stores.
    """

    def __init__(self, place: Place, files: StoreFiles | None = None) -> None:
        super().__init__(place, files)
        self._acts_by_hook: dict[str, RowArray] = {}
        self._moments: Mapping[str, RunningMoments] | None = None
        """Of an incomplete store, once somebody asked for statistics."""
        self._numbers = RowNumbers(len(self), self.planned_rows, complete=self.complete)

    @property
    def layout(self) -> schema.Layout:
        """The sizes of all arrays."""
        shapes = {hook: self.row_shape(hook) for hook in self.hooks}
        return schema.Layout(
            shapes=shapes,
            length=self.length,
            dtype=self.dtype,
            shard_rows=self.manifest.shard_rows,
            sampled=self.sampled,
        )

    def row_shape(self, hook: str) -> tuple[int, ...]:
        """Shape of one row of a hook: [d] for a residual stream, [head, d_head] for attention."""
        return self._acts(hook).row

    def read(self, rows: Rows, hooks: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """Float32 activations [row, ...] by hook name, rows in the order asked for.

        Every chunk is compared with its checksum when this store first touches it.

        Args:
            rows: A slice, which reads fastest, or row numbers in any order, also repeated.
            hooks: One name, several, or None for all.
        Raises:
            StoreError: If a row or hook is not in the store, or a chunk is damaged.
        """
        return self._activations(rows, hooks, check=True)

    def gather(self, rows: Rows, hooks: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """The same as `read`, but of a chunk of which few rows are wanted only those are read.

        If such a chunk was not read whole before, it is NOT compared with its checksum, which takes all of
        its 256 rows; `mdlm-interp capture verify` checks everything. This is the fast way to few rows from
        many places: the kernel is asked for all of them at once, and a disk serves them side by side.
        """
        return self._activations(rows, hooks, check=False)

    def prefetch(self, rows: Rows, hooks: str | Sequence[str] | None = None) -> None:
        """Ask the system to begin fetching what `read` of these rows will need; returns at once.

        Raises:
            StoreError: If a row or hook is not in the store, or a file is gone.
        """
        arrays = [self._acts(name) for name in self._names(hooks)]
        numbers = (
            np.arange(*self._numbers.span(rows))
            if isinstance(rows, slice)
            else self._numbers.ascending(rows)[0]
        )
        for array in arrays:
            array.prefetch(numbers)

    def coords(self, rows: Rows, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Coordinates of the rows asked for: the columns of rows/ (seq, pos, x0, xt, is_masked, doc), and t.

        Of a sampler's store also step, reveal_step, token and confidence; see `schema.SAMPLER_COLUMNS`.

        Of an incomplete store, t is NaN in a last sequence of which only the beginning is committed.

        Args:
            names: Some of these; none takes all.
        Raises:
            StoreError: If a row or a name is not there, or a chunk is damaged.
        """
        known = tuple(dict.fromkeys((*self.row_columns, "t")))
        names = known if names is None else names
        for name in names:
            if name not in known:
                raise StoreError(f"rows have no coordinate {name!r}{nearest(name, known)}")
        of_sequence = "t" in names and "t" not in self.row_columns
        stored = dict.fromkeys("seq" if name == "t" and of_sequence else name for name in names)
        arrays = {name: self._files.array(f"rows/{name}") for name in stored}
        if isinstance(rows, slice):
            start, stop = self._numbers.span(rows)
            columns = {name: native(array.read(start, stop)) for name, array in arrays.items()}
        else:
            ascending, positions = self._numbers.ascending(rows)
            columns = {name: np.empty(len(ascending), array.dtype) for name, array in arrays.items()}
            for name, array in arrays.items():
                array.take(ascending, columns[name], positions)
            columns = {name: native(values) for name, values in columns.items()}
        if of_sequence:
            times, seq = self._files.sequence_column("t"), columns["seq"]
            whole = seq < len(times)
            columns["t"] = np.full(len(seq), np.nan)
            columns["t"][whole] = times[seq[whole]]
        return {name: torch.from_numpy(columns[name]) for name in names}

    def tokens(self) -> tuple[Int64[Tensor, "sequence pos"], Int64[Tensor, "sequence pos"]]:
        """Clean and noised token ids (x0, xt) of every committed sequence; -1 after the end of shorter ones."""
        return self.sequence_column("x0").long(), self.sequence_column("xt").long()

    def times(self) -> Float64[Tensor, " sequence"]:
        """Diffusion time of every committed sequence, 0 clean to 1 all masked."""
        return self.sequence_column("t")

    def sequence_column(self, name: str, sequences: slice = slice(None)) -> Tensor:
        """A column of `schema.SEQUENCE_COLUMNS` of committed sequences: [sequence] or [sequence, pos].

        Args:
            sequences: Consecutive ones, as of a list; of a complete store only those are read.
        Raises:
            StoreError: If there is no such column, or `sequences` is no slice, or one with a step.
        """
        if name not in schema.SEQUENCE_COLUMNS:
            raise StoreError(f"{self.name} has no column {name!r}{nearest(name, schema.SEQUENCE_COLUMNS)}")
        if not isinstance(sequences, slice):
            raise StoreError(
                f"sequences must be a slice, got {shown(sequences)}; pass slice(start, stop), or index the whole "
                f"column"
            )
        start, stop, step = sequences.indices(self.n_sequences)
        if step != 1:
            raise StoreError(f"a slice of sequences must have step 1, got {step}")
        if sequences == slice(None) or not self.complete:
            return torch.from_numpy(native(self._files.sequence_column(name)[start:stop]).copy())
        return torch.from_numpy(native(self._files.array(f"seqs/{name}").read(start, max(start, stop))))

    def sequence_rows(self, seq: int) -> slice:
        """The rows of a committed sequence, in order of their position.

        Raises:
            StoreError: If there is no such sequence.
        """
        seq = whole_number(seq, "seq", StoreError)
        if not 0 <= seq < self.n_sequences:
            raise StoreError(f"{self.name}: sequences are in [0, {self.n_sequences}), got {seq}")
        starts = self._files.sequence_column("row")
        start = int(starts[seq])
        if seq + 1 < len(starts):
            return slice(start, int(starts[seq + 1]))
        # The beginning of a sequence that is not committed whole may follow.
        after = self._files.array("rows/seq").read(start, len(self))
        return slice(start, start + int(np.searchsorted(after, seq, side="right")))

    def row_of(self, seq: int, pos: int) -> int:
        """The row of a token.

        Raises:
            StoreError: If there is no such sequence, or this position of it was not recorded.
        """
        seq, pos = whole_number(seq, "seq", StoreError), whole_number(pos, "pos", StoreError)
        rows = self.sequence_rows(seq)
        recorded = self._files.array("rows/pos").read(rows.start, rows.stop)
        index = int(np.searchsorted(recorded, pos))
        if index == len(recorded) or int(recorded[index]) != pos:
            raise StoreError(
                f"{self.name} has no row of position {pos} in sequence {seq}; it recorded "
                f"positions {self.positions!r}"
            )
        return int(rows.start) + index

    def statistics(self, hook: str) -> HookStatistics:
        """Count, mean and mean square by (masked, part of [0, 1] in t), of all committed rows.

        They are sums of what the model gave; a store in 16 bits holds it rounded.
        """
        self.row_shape(hook)  # raises if there is no such hook
        if self.complete:
            stored = {name: self._files.array(f"stats/{hook}/{name}") for name in schema.STATISTICS}
            return HookStatistics.from_arrays(
                {name: native(array.read(0, array.rows)) for name, array in stored.items()}
            )
        if self._moments is None:
            # Of all hooks at once: what is pending of a shard is one file.
            self._moments = self._files.moments(self.layout.shapes)
        return HookStatistics.from_arrays(self._moments[hook].arrays())

    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of all committed acts, rows and seqs; reads them all.

        It does not depend on how rows are divided into shards.
        """
        content = schema.ContentHash()
        acts = [f"acts/{hook}" for hook in self.hooks]
        for name in [*acts, *(f"rows/{column}" for column in self.row_columns)]:
            array = self._files.array(name)
            content.add(name, array.dtype.name, (len(self), *array.row), blocks(array, len(self)))
        for name, column in schema.SEQUENCE_COLUMNS.items():
            shape = self._files.sequence_shape(name, self.n_sequences)
            content.add(f"seqs/{name}", column.dtype, shape, self._files.sequence_blocks(name))
        return content.hexdigest()

    def _activations(
        self, rows: Rows, hooks: str | Sequence[str] | None, *, check: bool
    ) -> dict[str, Tensor]:
        names = self._names(hooks)
        if isinstance(rows, slice):
            start, stop = self._numbers.span(rows)
            return {name: floats(self._acts(name).read(start, stop)) for name in names}
        arrays = [self._acts(name) for name in names]
        ascending, positions = self._numbers.ascending(rows)
        values = [np.empty((len(ascending), *array.row), array.dtype) for array in arrays]
        step = max(1, BLOCK_BYTES // max([_row_bytes(array) for array in arrays], default=1))
        for first in range(0, len(ascending), step):
            block = slice(first, first + step)
            for array in arrays:
                array.prefetch(ascending[block], check=check)
            for array, out in zip(arrays, values, strict=True):
                target, at = (out[block], None) if positions is None else (out, positions[block])
                array.take(ascending[block], target, at, check=check)
        return {name: floats(out) for name, out in zip(names, values, strict=True)}

    def _names(self, hooks: str | Sequence[str] | None) -> Sequence[str]:
        return [hooks] if isinstance(hooks, str) else self.hooks if hooks is None else hooks

    def _acts(self, hook: str) -> RowArray:
        found = self._acts_by_hook.get(hook)
        if found is None:
            if hook not in self._hooks:
                raise StoreError(f"{self.name} holds no hook {hook!r}{nearest(hook, self._hooks)}")
            found = self._acts_by_hook[hook] = self._files.array(f"acts/{hook}")
        return found


def blocks(array: RowArray, rows: int) -> Iterator[NDArray[Any]]:
    """The first rows of an array, so many, in portions of about BLOCK_BYTES."""
    step = schema.CHUNK_ROWS * max(1, BLOCK_BYTES // (schema.CHUNK_ROWS * _row_bytes(array)))
    for start in range(0, rows, step):
        yield array.read(start, min(start + step, rows))


def _row_bytes(array: RowArray) -> int:
    return max(1, array.dtype.itemsize * int(np.prod(array.row, dtype=np.int64)))
