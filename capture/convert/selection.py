"""What of a store is exported, and its arrays as the export holds them.

1. Rows are those of whole sequences within the range asked for, so that the first row of a sequence and its
   length mean the same in an export as in a store. Their sequences are numbered from 0.
2. Without a range it is everything, also the beginning of a last sequence that an interrupted capture left.
3. Values are copied bit for bit, unless another type is asked for.
"""

# Axes: row, sequence, pos, then the axes of one row

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture import schema
from capture.checks import refuse_overflow
from capture.reader import ActivationStore
from capture.statistics import RunningMoments, Strata
from mdlm_interp.errors import ConfigError, StoreError
from mdlm_interp.hooks import select_names

EXPORT_VERSION = 1
"""Of how our HDF5 and safetensors exports are laid out; `schema.SCHEMA_VERSION` is of what they hold."""
BLOCK_BYTES = 2**24
"""Of one array: what is read and written at a time."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Some rows and hooks of a store, in one type; `select` makes it."""

    store: ActivationStore
    hooks: tuple[str, ...]
    rows: tuple[int, int]
    """First row of the store, and one past the last."""
    sequences: tuple[int, int]
    """The sequences that are whole in these rows; the beginning of another may follow."""
    dtype: schema.StoredType
    """Type of the export's activations."""

    @property
    def n_rows(self) -> int:
        """Rows of the export."""
        return self.rows[1] - self.rows[0]

    @property
    def n_sequences(self) -> int:
        """Sequences of the export."""
        return self.sequences[1] - self.sequences[0]

    @property
    def everything(self) -> bool:
        """Whether these are all rows of the store."""
        return self.rows == (0, len(self.store))

    @property
    def layout(self) -> schema.Layout:
        """The sizes of the export's arrays."""
        shapes = {hook: self.store.row_shape(hook) for hook in self.hooks}
        return schema.Layout(
            shapes=shapes, length=self.store.length, dtype=self.dtype, sampled=self.store.sampled
        )

    @property
    def acts_size(self) -> int:
        """Bytes of the export's activations."""
        shapes = self.layout.shapes.values()
        return self.n_rows * sum(map(prod, shapes)) * schema.ARRAY_TYPES[self.dtype].itemsize

    @property
    def size(self) -> int:
        """Bytes of the export's rows and sequences."""
        layout = self.layout
        return self.n_rows * layout.row_bytes + self.n_sequences * layout.sequence_bytes

    def acts(self, hook: str, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Activations of the export's rows start to stop, as it stores them (bfloat16 as uint16).

        Args:
            out: Memory to read into, at least as large: fresh memory takes longer to get than to fill.
        """
        first, array = self.rows[0], self.store.files.array(f"acts/{hook}")
        if out is None:
            values = array.read(first + start, first + stop)
        else:
            values = out[: stop - start]
            array.take(np.arange(first + start, first + stop), values, None)
        return converted(values, self.store.dtype, self.dtype, f"{self.store.name}: {hook}")

    def memory(self, hook: str, rows: int) -> NDArray[Any]:
        """Memory that `acts` can read this many rows into."""
        return np.empty((rows, *self.store.row_shape(hook)), schema.ARRAY_TYPES[self.store.dtype])

    def act_blocks(self, hook: str) -> Iterator[NDArray[Any]]:
        """The same of all rows, in portions; each is overwritten by the next."""
        row_bytes = prod(self.store.row_shape(hook)) * schema.ARRAY_TYPES[self.dtype].itemsize
        step = schema.CHUNK_ROWS * max(1, BLOCK_BYTES // (schema.CHUNK_ROWS * row_bytes))
        memory = self.memory(hook, min(step, self.n_rows))
        for start in range(0, self.n_rows, step):
            yield self.acts(hook, start, min(start + step, self.n_rows), memory)

    def column(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """A column of the export's rows start to stop."""
        values = self.store.files.array(f"rows/{name}").read(self.rows[0] + start, self.rows[0] + stop)
        return values - self.sequences[0] if name == "seq" else values

    def column_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The same of all rows, in portions."""
        step = max(1, BLOCK_BYTES // 8)
        for start in range(0, self.n_rows, step):
            yield self.column(name, start, min(start + step, self.n_rows))

    def sequence_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """A column of the export's sequences, in portions."""
        first, last = self.sequences
        at = 0
        for block in self.store.files.sequence_blocks(name):
            part = block[max(first - at, 0) : max(last - at, 0)]
            at += len(block)
            if len(part):
                yield part - self.rows[0] if name == "row" else part

    def sequence_shape(self, name: str) -> tuple[int, ...]:
        """Shape of that column."""
        return self.store.files.sequence_shape(name, self.n_sequences)

    def statistics(self, hook: str) -> Mapping[str, NDArray[np.float64]]:
        """The store's own statistics of a hook, or those of the selected rows as the store holds them."""
        if self.everything:
            found = self.store.statistics(hook)
            return {name: getattr(found, name).numpy() for name in schema.STATISTICS}
        moments = RunningMoments(self.store.row_shape(hook))
        step = schema.CHUNK_ROWS * 16
        for start in range(*self.rows, step):
            rows = slice(start, min(start + step, self.rows[1]))
            acts, coords = self.store.read(rows, hook)[hook], self.store.coords(rows)
            strata = Strata.of(*(coords[name].numpy() for name in ("is_masked", "t", "seq")))
            moments.add(acts.numpy(), strata)
        return moments.arrays()

    def _not_finite(self) -> int:
        """Activations that are infinite or no number."""
        if not sum(shard.not_finite for shard in self.store.manifest.shards):
            return 0
        blocks = (block for hook in self.hooks for block in self.act_blocks(hook))
        return sum(int((~as_tensor(block, self.dtype).isfinite()).sum()) for block in blocks)

    def attributes(self) -> dict[str, Any]:
        """What a reader has to know of the export, as JSON holds it."""
        store, (start, stop) = self.store, self.rows
        return {
            "format": schema.FORMAT,
            "schema_version": schema.SCHEMA_VERSION,
            "export_version": EXPORT_VERSION,
            "hooks": list(self.hooks),
            "shapes": {hook: list(store.row_shape(hook)) for hook in self.hooks},
            "dtype": self.dtype,
            "rows": self.n_rows,
            "sequences": self.n_sequences,
            "length": store.length,
            "complete": store.complete,
            "planned_rows": store.planned_rows if self.everything else self.n_rows,
            "not_finite": self._not_finite(),
            "config": store.config,
            "provenance": store.provenance,
            "source": {
                "rows": [start, stop],
                "sequences": list(self.sequences),
                "of_rows": len(store),
                "dtype": store.dtype,
            },
        }


def select(
    store: ActivationStore,
    *,
    hooks: Sequence[str] | None = None,
    rows: slice | None = None,
    max_rows: int | None = None,
    dtype: schema.StoredType | None = None,
    incomplete: bool = False,
) -> Selection:
    """Check what is asked for against the store.

    Raises:
        StoreError: If the store is incomplete or has not these rows.
        ConfigError: If max_rows is less than 1.
        HookError: If a pattern matches no hook of the store.
    """
    if not store.complete and not incomplete:
        raise StoreError(
            f"{store.name} is incomplete ({len(store):,} of about {store.planned_rows:,} rows): let the same "
            f"`capture run` go on, or export what there is with --incomplete"
        )
    start, stop = _span(rows, len(store))
    if max_rows is not None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, got {max_rows}")
        stop = min(stop, start + max_rows)
    chosen = (0, store.n_sequences)
    if (start, stop) != (0, len(store)):
        chosen, (start, stop) = _whole_sequences(store, start, stop)
    return Selection(
        store=store,
        hooks=tuple(select_names(hooks, store.hooks)),
        rows=(start, stop),
        sequences=chosen,
        dtype=dtype or store.dtype,
    )


def _span(rows: slice | None, total: int) -> tuple[int, int]:
    rows = rows or slice(None)
    start, stop = rows.start or 0, total if rows.stop is None else rows.stop
    if rows.step not in (None, 1):
        raise StoreError(f"rows must be consecutive, got every {rows.step}th")
    if not 0 <= start < stop <= total:
        raise StoreError(f"rows must be START:STOP with 0 <= START < STOP <= {total}, got {start}:{stop}")
    return start, stop


def _whole_sequences(
    store: ActivationStore, start: int, stop: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sequences that lie whole in these rows, and their rows."""
    starts = store.sequence_column("row").numpy()
    edges = (
        np.append(starts, store.sequence_rows(len(starts) - 1).stop) if len(starts) else np.zeros(1, np.int64)
    )
    first = int(np.searchsorted(edges, start))
    last = int(np.searchsorted(edges, stop, side="right")) - 1
    if last <= first:
        raise StoreError(
            f"rows {start}:{stop} of {store.name} hold no whole sequence, and an export is made of whole ones; "
            f"a sequence has up to {store.length} rows"
        )
    return (first, last), (int(edges[first]), int(edges[last]))


def converted(
    values: NDArray[Any], source: schema.StoredType, target: schema.StoredType, what: str
) -> NDArray[Any]:
    """Stored activations as another type, rounded to nearest; the same bits if it is the same type.

    Raises:
        StoreError: If a finite value is too large for the type.
    """
    if source == target:
        return values
    given = as_tensor(values, source)
    found = given.to(getattr(torch, target))
    refuse_overflow(given, found, what, command="export")
    return found.view(torch.int16).numpy().view(np.uint16) if target == "bfloat16" else found.numpy()


def as_tensor(values: NDArray[Any], dtype: str) -> Tensor:
    """Stored values as torch has them."""
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    if dtype == "bfloat16":
        return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(native)


def rechunked(blocks: Iterable[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The same rows in portions of this size; the last may be smaller.

    >>> [part.tolist() for part in rechunked([np.arange(2), np.arange(2, 5)], 3)]
    [[0, 1, 2], [3, 4]]
    """
    waiting: list[NDArray[Any]] = []
    held = 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        if held < size:
            continue
        joined = np.concatenate(waiting)
        whole = held - held % size
        yield from np.split(joined[:whole], range(size, whole, size))
        waiting, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(waiting)
