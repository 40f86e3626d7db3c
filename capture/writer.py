"""Writes the rows of a store shard by shard, beside the forward pass; what is committed stays readable.

1. `append` hands the rows of a batch to a thread, which turns them into bytes with checksums at the end of
   draft files and adds up their moments. Two batches may wait; then `append` blocks.
2. A full shard goes to a second thread, which makes its files durable and only then lists it in the manifest,
   while the first goes on with the next shard.
3. `close` commits the last, shorter shard. What several ranks wrote becomes one store in `finish.py`.

Memory does not grow with the shard: only checksums and the columns of its rows are kept.
"""

# Axes: row, then the axes of one row; sequence, pos

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from capture import manifest as manifests
from capture import schema
from capture.checks import refuse_overflow
from capture.manifest import Manifest, ResumePoint, Shard
from capture.metadata import grow
from capture.places import Draft, Place
from capture.shards import ShardEncoder, column_chunk, shard_digest
from capture.stages import Stage
from capture.statistics import RunningMoments, Strata
from mdlm_interp.errors import StoreError

WAITING_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of the store, and the sequences that begin in them."""

    start: int
    """Number of the first row."""
    acts: Mapping[str, Tensor]
    """Activations [row, ...] of every hook, float32."""
    columns: Mapping[str, NDArray[Any]]
    """Every column of `schema.ROW_COLUMNS` [row]."""
    t: NDArray[np.float64]
    """Diffusion time of each row."""
    first_sequence: int
    sequences: Mapping[str, NDArray[Any]]
    """Every column of `schema.SEQUENCE_COLUMNS`, of the sequences that these rows are of."""
    resume: ResumePoint
    """Where the batch begins."""
    release: Callable[[], None] = lambda: None
    """Called when the activations have been written."""

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.t)


@dataclass(kw_only=True)
class OpenShard:
    """A shard that takes rows."""

    start: int
    stop: int
    drafts: Mapping[str, Draft]
    """By hook."""
    encoders: Mapping[str, ShardEncoder]
    moments: Mapping[str, RunningMoments]
    columns: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    sequences: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Columns of the sequences that end in this shard, by number."""
    not_finite: int = 0
    resume: ResumePoint = field(default_factory=ResumePoint)


class StoreWriter:
    """Takes the rows of one rank in order.

    Args:
        manifest: What this rank has committed before.
        rank: Writes the shards whose number is `rank` modulo `world_size`; rows of others are dropped.
    """

    def __init__(
        self, place: Place, layout: schema.Layout, manifest: Manifest, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self._place, self._layout = place, layout
        self._rank, self._world_size = rank, world_size
        self._name = manifests.rank_manifest(rank, world_size)
        self._committed = {shard.rows[0] // layout.shard_rows for shard in manifest.shards}
        self._open: OpenShard | None = None
        self._room = manifest.planned_rows
        """Rows that the arrays have in the eyes of other readers."""
        self._commit = Stage(self._publish, depth=1, name="capture-commit")
        self._encode = Stage(self._write, depth=WAITING_BATCHES, name="capture-write")
        self.manifest = manifest
        """What is committed."""

    def wants(self, start: int, stop: int) -> bool:
        """Whether rows in this range are still to be written by this rank."""
        first, last = start // self._layout.shard_rows, (stop - 1) // self._layout.shard_rows
        return start < stop and any(self._wanted(number) for number in range(first, last + 1))

    def append(self, rows: Rows) -> None:
        """Write these rows, later; those that this rank does not want are dropped.

        Raises:
            MdlmError, OSError: What went wrong with earlier rows.
        """
        self._encode.put(rows)

    def close(self) -> None:
        """Commit everything, the last shard included; no rows follow.

        When it fails or is interrupted, both threads have ended and full shards that waited may be committed.
        """
        try:
            self._encode.close()
            if self._open is not None:
                self._commit.put(self._open)
                self._open = None
        finally:
            self._commit.close()

    def abandon(self) -> None:
        """Stop; rows after the last commit are lost."""
        try:
            self._encode.abandon()
        finally:
            self._commit.abandon()

    def _wanted(self, number: int) -> bool:
        return number % self._world_size == self._rank and number not in self._committed

    def _write(self, rows: Rows) -> None:
        size = self._layout.shard_rows
        for number in range(rows.start // size, (rows.stop - 1) // size + 1):
            if not self._wanted(number):
                continue
            start, stop = max(rows.start, number * size), min(rows.stop, (number + 1) * size)
            shard = self._shard(start, number)
            self._take(shard, rows, slice(start - rows.start, stop - rows.start))
            if stop == (number + 1) * size:
                self._commit.put(shard)
                self._open = None
        rows.release()

    def _shard(self, row: int, number: int) -> OpenShard:
        if self._open is None:
            start = number * self._layout.shard_rows
            if row != start:
                raise StoreError(
                    f"{self._place.name}: row {row} came first in the shard that begins at {start}"
                )
            self._open = OpenShard(
                start=start,
                stop=start,
                drafts={
                    hook: self._place.draft(schema.file_of(f"acts/{hook}", 1 + len(shape), number))
                    for hook, shape in self._layout.shapes.items()
                },
                encoders={hook: ShardEncoder(self._layout.shard_shape(hook)) for hook in self._layout.shapes},
                moments={hook: RunningMoments(shape) for hook, shape in self._layout.shapes.items()},
            )
        if row != self._open.stop:
            raise StoreError(f"{self._place.name}: row {row} came where {self._open.stop} was due")
        return self._open

    def _take(self, shard: OpenShard, rows: Rows, part: slice) -> None:
        is_masked = rows.columns["is_masked"][part]
        strata = Strata.of(is_masked, rows.t[part], rows.columns["seq"][part])
        for hook, encoder in shard.encoders.items():
            acts = rows.acts[hook][part]
            self._check(hook, acts, len(is_masked))
            values = acts.contiguous().numpy()
            before = shard.moments[hook].finite
            shard.moments[hook].add(values, strata)
            if not (before and shard.moments[hook].finite):
                shard.not_finite += int(np.count_nonzero(~np.isfinite(values)))
            shard.drafts[hook].write(encoder.encode(stored(acts, self._layout.dtype, hook)))
        for name in self._layout.row_columns:
            shard.columns.setdefault(name, []).append(rows.columns[name][part])
        shard.stop += len(is_masked)
        shard.resume = rows.resume
        ends = np.append(rows.sequences["row"][1:], rows.stop)
        for index, end in enumerate(ends):
            if shard.start < end <= shard.stop:
                columns = {name: rows.sequences[name][index] for name in schema.SEQUENCE_COLUMNS}
                shard.sequences[rows.first_sequence + index] = columns

    def _check(self, hook: str, acts: Tensor, rows: int) -> None:
        shape = (rows, *self._layout.shapes[hook])
        if acts.dtype != torch.float32 or tuple(acts.shape) != shape:
            raise StoreError(
                f"acts/{hook} got {str(acts.dtype).removeprefix('torch.')} {list(acts.shape)}, "
                f"expected float32 {list(shape)}"
            )

    def _publish(self, shard: OpenShard) -> None:
        number = shard.start // self._layout.shard_rows
        checksums: dict[str, Sequence[int]] = {}
        drafts = list(shard.drafts.values())
        for hook, encoder in shard.encoders.items():
            shard.drafts[hook].write(encoder.finish())
            checksums[f"acts/{hook}"] = encoder.checksums
        for name, column in self._layout.row_columns.items():
            values = np.concatenate(shard.columns[name]).astype(column.dtype)
            content, checksum = column_chunk(values, self._layout.shard_rows, column.fill)
            drafts.append(self._place.draft(schema.file_of(f"rows/{name}", 1, number)))
            drafts[-1].write([content])
            checksums[f"rows/{name}"] = [checksum]
        if shard.stop > self._room:
            self._room = max(2 * self._room, shard.stop)
            grow(self._place, self._layout, self._room)
        waiting = save(pending(shard))
        drafts.append(self._place.draft(f"{schema.PENDING}/{number}.safetensors"))
        drafts[-1].write([waiting])
        self._place.publish(drafts)
        entry = Shard(
            rows=(shard.start, shard.stop),
            sequences=(min(shard.sequences, default=0), max(shard.sequences, default=-1) + 1),
            sha256=shard_digest(checksums),
            pending=google_crc32c.value(waiting),
            not_finite=shard.not_finite,
            resume=shard.resume,
        )
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, entry))
        self._place.replace(self._name, manifests.to_bytes(self.manifest))
        self._committed.add(number)


def pending(shard: OpenShard) -> dict[str, NDArray[Any]]:
    """What of a shard goes into `seqs` and `stats` later, by name."""
    numbers = sorted(shard.sequences)
    arrays: dict[str, NDArray[Any]] = {}
    if numbers:
        for name, column in schema.SEQUENCE_COLUMNS.items():
            arrays[f"seqs/{name}"] = np.stack(
                [np.asarray(shard.sequences[number][name], column.dtype) for number in numbers]
            )
    for hook, moments in shard.moments.items():
        arrays[f"stats/{hook}/count"] = moments.count
        arrays[f"stats/{hook}/total"] = moments.total
        arrays[f"stats/{hook}/square"] = moments.square
    return arrays


def stored(acts: Tensor, dtype: schema.StoredType, hook: str) -> NDArray[Any]:
    """Activations [row, ...] as the store keeps them.

    Raises:
        StoreError: If a finite value is too large for the type.
    """
    if dtype == "float32":
        return acts.contiguous().numpy()
    half = acts.to(torch.float16 if dtype == "float16" else torch.bfloat16).contiguous()
    refuse_overflow(acts, half, hook, command="capture", where=" to another --out")
    return half.numpy() if dtype == "float16" else half.view(torch.uint16).numpy()
