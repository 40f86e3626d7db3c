"""Writes a store shard by shard; what is committed stays readable whatever happens afterwards.

1. `StoreWriter(...)` creates the arrays, writes `seqs` whole and commits a manifest of zero rows.
2. `append` copies rows into buffers of one shard; a full shard is written by zarr-python, its files and
   directories are fsynced, and only then does the manifest speak of it.
3. `finish` commits the last, shorter shard, writes the statistics and marks the store complete.

The buffers hold one shard of every hook in memory: 16,384 rows times the bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.storage import LocalStore

from capture import schema
from capture.manifest import Manifest, Shard, sync_all, sync_tree, write_manifest
from capture.statistics import RunningMoments
from mdlm_interp.errors import OutputExistsError, StoreError


def refuse_existing(root: Path) -> None:
    """Raise OutputExistsError if a store at this path would overwrite something."""
    if root.is_dir():
        if not any(root.iterdir()):
            return
        what = "is not empty"
    elif root.exists() or root.is_symlink():
        what = "is a file"
    else:
        return
    raise OutputExistsError(f"{root} exists and {what}; choose another --out, or remove it first")


class StoreWriter:
    """A store being written, in row order.

    Args:
        root: Directory of the store; created, must not exist or be empty.
        attributes: The group's attributes besides the format's own: config and provenance.
        sequences: Every column of `schema.SEQUENCE_COLUMNS`, for all planned sequences.
    """

    def __init__(
        self,
        root: Path,
        layout: schema.Layout,
        *,
        attributes: Mapping[str, Any],
        sequences: Mapping[str, NDArray[Any]],
    ) -> None:
        refuse_existing(root)
        self._root, self._layout = root, layout
        self._times = sequences["t"]
        root.mkdir(parents=True, exist_ok=True)
        header = {
            "format": schema.FORMAT,
            "schema_version": schema.SCHEMA_VERSION,
            "hooks": list(layout.shapes),
        }
        self._group = zarr.create_group(LocalStore(root), attributes={**header, **attributes})
        self._arrays = schema.create_arrays(self._group, layout)
        for name in schema.SEQUENCE_COLUMNS:
            self._arrays[f"seqs/{name}"][...] = sequences[name]
        sync_tree(root)
        self._manifest = Manifest(n_sequences=layout.n_sequences, length=layout.length)
        write_manifest(root, self._manifest)

        rows = layout.shard_rows
        self._buffers: dict[str, NDArray[Any]] = {
            f"acts/{hook}": np.empty((rows, *shape), np.float32) for hook, shape in layout.shapes.items()
        }
        for name, column in schema.ROW_COLUMNS.items():
            self._buffers[f"rows/{name}"] = np.empty(rows, column.dtype)
        self._moments = {hook: RunningMoments(shape) for hook, shape in layout.shapes.items()}
        self._durable = 0
        self._filled = 0

    def append(self, acts: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
        """Add the next rows; commits each shard that they fill.

        Args:
            acts: float32 activations [row, ...] of every hook.
            columns: Every column of `schema.ROW_COLUMNS` [row].
        """
        values = {f"acts/{hook}": acts[hook] for hook in self._layout.shapes}
        values |= {f"rows/{name}": columns[name] for name in schema.ROW_COLUMNS}
        total = len(columns["seq"])
        if self._durable + self._filled + total > self._layout.rows:
            raise StoreError(
                f"{self._root} was planned with {self._layout.rows} rows, and more were appended"
            )
        done = 0
        while done < total:
            take = min(total - done, self._layout.shard_rows - self._filled)
            for name, buffer in self._buffers.items():
                # copy_ would convert another dtype or broadcast another shape without a word.
                piece, target = (
                    values[name][done : done + take],
                    torch.from_numpy(buffer)[self._filled :][:take],
                )
                if piece.dtype != target.dtype or piece.shape != target.shape:
                    raise StoreError(
                        f"{name} got {str(piece.dtype).removeprefix('torch.')} {list(piece.shape)}, "
                        f"expected {buffer.dtype} {list(target.shape)}"
                    )
                target.copy_(piece)
            self._filled += take
            done += take
            if self._filled == self._layout.shard_rows:
                self._commit_shard()

    def finish(self) -> None:
        """Commit what is left, write the statistics and mark the store complete."""
        if self._filled:
            self._commit_shard()
        if self._durable != self._layout.rows:
            raise StoreError(f"{self._root} was planned with {self._layout.rows} rows, got {self._durable}")
        for hook, moments in self._moments.items():
            schema.create_statistics(self._group, hook, moments.arrays())
        sync_tree(self._root / "stats")
        self._manifest = replace(self._manifest, complete=True)
        write_manifest(self._root, self._manifest)

    def _commit_shard(self) -> None:
        start, stop = self._durable, self._durable + self._filled
        content = schema.ContentHash()
        number, files = start // self._layout.shard_rows, []
        for name, buffer in self._buffers.items():
            block = buffer[: self._filled]
            self._arrays[name][start:stop] = block
            files.append(self._root / schema.file_of(name, block.ndim, number))
            content.add(name, str(block.dtype), block.shape, [block])
        masked, seq = (self._buffers[f"rows/{name}"][: self._filled] for name in ("is_masked", "seq"))
        t = self._times[seq]
        for hook, moments in self._moments.items():
            moments.add(self._buffers[f"acts/{hook}"][: self._filled], masked, t)
        # The directories of a file are new as well; those of the arrays are durable already.
        sync_all({path for file in files for path in (file, *file.parents) if self._root in path.parents})
        before = self._manifest.committed_rows // self._layout.length
        ended = stop // self._layout.length - before
        shard = Shard(
            rows=(start, stop), first_sequence=before, n_sequences=ended, sha256=content.hexdigest()
        )
        self._manifest = replace(
            self._manifest,
            committed_rows=(before + ended) * self._layout.length,
            shards=(*self._manifest.shards, shard),
        )
        write_manifest(self._root, self._manifest)
        self._durable, self._filled = stop, 0
