"""Small stores made by zarr-python alone, and what is in them: what a reader is tested against."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from safetensors.numpy import save

from capture import schema
from capture.manifest import Manifest, ResumePoint, Shard, rank_manifest, to_bytes
from capture.places import Directory
from capture.schema import Layout, StoredType
from capture.statistics import RunningMoments, Strata

MLP, HEADS, SCALE = "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z", "ln_final.hook_scale"
HOOKS = {HEADS: (2, 3), MLP: (5,), SCALE: (1,)}
LENGTH = 40
MASK_ID = 99


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a store holds."""

    root: Path
    acts: Mapping[str, NDArray[np.float32]]
    """As they read back."""
    stored: Mapping[str, NDArray[Any]]
    """As zarr sees them."""
    columns: Mapping[str, NDArray[Any]]
    sequences: Mapping[str, NDArray[Any]]
    t: NDArray[np.float64]
    """Of each row."""
    moments: Mapping[str, RunningMoments]
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What store to make."""

    sequences: int = 60
    dtype: StoredType = "float32"
    shard_rows: int = 512
    complete: bool = True
    committed_shards: int | None = None
    """How many shards the manifest lists; None for all."""
    world_size: int = 1
    """Ranks that are writing it."""
    every_position: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(HOOKS))


def stored_values(acts: NDArray[np.float32], dtype: StoredType) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Activations as zarr gets them, and as they read back."""
    rounded = torch.from_numpy(acts).to(getattr(torch, dtype))
    raw = rounded.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else rounded.numpy()
    return raw, rounded.float().numpy()


def make_store(root: Path, plan: Plan | None = None) -> Truth:
    """Sequences of 20 to 40 tokens; of each, some positions are rows."""
    plan = plan or Plan()
    rng = np.random.default_rng(plan.sequences)
    columns, sequences = _coordinates(rng, plan)
    rows = len(columns["seq"])
    t = sequences["t"][columns["seq"]]
    layout = Layout(shapes=plan.shapes, length=LENGTH, dtype=plan.dtype, shard_rows=plan.shard_rows)
    acts = {
        hook: rng.standard_normal((rows, *shape)).astype(np.float32) * 3
        for hook, shape in plan.shapes.items()
    }
    raw = {hook: stored_values(values, plan.dtype)[0] for hook, values in acts.items()}

    root.mkdir(parents=True)
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.create_group(root, attributes=_attributes(plan))
        schema.create_row_arrays(group, layout, rows if plan.complete else rows + 3 * plan.shard_rows)
        for name, values in {**{f"acts/{k}": v for k, v in raw.items()}, **_rows(columns)}.items():
            zarr.open_array(root, path=name)[:rows] = values
    shards = _shards(sequences, rows, plan)
    pending = [_moments(acts, columns, t, shard.rows, plan.shapes) for shard in shards]
    whole = {hook: RunningMoments(shape) for hook, shape in plan.shapes.items()}
    for moments in pending:
        for hook, running in whole.items():
            running.merge(moments[hook])
    manifest = Manifest(
        length=LENGTH, shard_rows=plan.shard_rows, planned_rows=rows, complete=plan.complete, shards=shards
    )
    if plan.complete:
        for name, values in sequences.items():
            schema.create_sequence_array(group, name, len(values), LENGTH)[...] = values
        for hook, running in whole.items():
            schema.create_statistics(group, hook, running.arrays())
        manifest = with_hashes(root, manifest)
    else:
        shards = _write_pending(root, shards, sequences, pending)
        manifest = replace(manifest, shards=shards)
    write_manifests(root, manifest, plan.world_size)
    return Truth(
        root=root,
        acts={hook: stored_values(values, plan.dtype)[1] for hook, values in acts.items()},
        stored=raw,
        columns=columns,
        sequences=sequences,
        t=t,
        moments=whole,
        manifest=manifest,
    )


def write_manifests(root: Path, manifest: Manifest, world_size: int = 1) -> None:
    """One manifest, or one a rank, each with every world_size-th shard."""
    for rank in range(world_size):
        own = [s for s in manifest.shards if s.rows[0] // manifest.shard_rows % world_size == rank]
        part = replace(manifest, shards=tuple(own))
        (root / rank_manifest(rank, world_size)).write_bytes(to_bytes(part))


def with_hashes(root: Path, manifest: Manifest) -> Manifest:
    """The manifest of a complete store: with the hash of every file that is no shard."""
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("manifest") and path.parts[-3] not in ("acts", "rows")
    }
    metadata = [*root.glob("acts/*/zarr.json"), *root.glob("rows/*/zarr.json")]
    files |= {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in metadata
    }
    return replace(manifest, files=files)


class Elsewhere:
    """The same files, as if they were in no local directory."""

    def __init__(self, root: Path) -> None:
        self._directory = Directory(root)
        self.name = f"far://{root.name}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._directory, name)


def _attributes(plan: Plan) -> dict[str, Any]:
    return {
        "format": schema.FORMAT,
        "schema_version": schema.SCHEMA_VERSION,
        "hooks": list(plan.shapes),
        "dtype": plan.dtype,
        "config": {"positions": "all" if plan.every_position else "random", "seed": 7},
        "provenance": {"weights_sha256": "ab"},
    }


def _rows(columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"rows/{name}": values for name, values in columns.items()}


def _coordinates(
    rng: np.random.Generator, plan: Plan
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    rows: dict[str, list[NDArray[Any]]] = {name: [] for name in schema.ROW_COLUMNS}
    total = 0
    found: dict[str, list[Any]] = {name: [] for name in schema.SEQUENCE_COLUMNS}
    for seq in range(plan.sequences):
        length = LENGTH if plan.every_position else int(rng.integers(20, LENGTH + 1))
        t = float(rng.random())
        x0, doc = rng.integers(0, MASK_ID, length), np.full(length, seq // 3)
        is_masked = rng.random(length) < t
        xt = np.where(is_masked, MASK_ID, x0)
        count = length if plan.every_position else int(rng.integers(1, length + 1))
        pos = np.sort(rng.choice(length, count, replace=False))
        values = {"x0": x0[pos], "xt": xt[pos], "is_masked": is_masked[pos], "doc": doc[pos]}
        for name, column in {"seq": np.full(count, seq), "pos": pos, **values}.items():
            rows[name].append(column)
        padded = {
            k: np.append(v, np.full(LENGTH - length, -1)) for k, v in (("x0", x0), ("xt", xt), ("doc", doc))
        }
        scalars = {
            "row": total,
            "length": length,
            "t": t,
            "sigma": 2 * t,
            "seed": 7,
            "block": seq,
            "source": 0,
        }
        for name, value in {**scalars, "offset": seq // 3, **padded}.items():
            found[name].append(value)
        total += count
    columns = {k: np.concatenate(v).astype(schema.ROW_COLUMNS[k].dtype) for k, v in rows.items()}
    return columns, {k: np.array(v, schema.SEQUENCE_COLUMNS[k].dtype) for k, v in found.items()}


def _shards(sequences: Mapping[str, NDArray[Any]], rows: int, plan: Plan) -> tuple[Shard, ...]:
    ends = np.append(sequences["row"][1:], rows)
    found = []
    for start in range(0, rows, plan.shard_rows):
        stop = min(start + plan.shard_rows, rows)
        ending = np.flatnonzero((ends > start) & (ends <= stop))
        span = (int(ending[0]), int(ending[-1]) + 1) if len(ending) else (0, 0)
        found.append(
            Shard(
                rows=(start, stop),
                sequences=span,
                sha256="0" * 64,
                pending=0,
                not_finite=0,
                resume=ResumePoint(),
            )
        )
    return tuple(found[: plan.committed_shards])


def _moments(
    acts: Mapping[str, NDArray[np.float32]],
    columns: Mapping[str, NDArray[Any]],
    t: NDArray[np.float64],
    rows: tuple[int, int],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, RunningMoments]:
    part = slice(*rows)
    found = {hook: RunningMoments(shape) for hook, shape in shapes.items()}
    strata = Strata.of(columns["is_masked"][part], t[part], columns["seq"][part])
    for hook, moments in found.items():
        moments.add(acts[hook][part], strata)
    return found


def _write_pending(
    root: Path,
    shards: tuple[Shard, ...],
    sequences: Mapping[str, NDArray[Any]],
    pending: list[dict[str, RunningMoments]],
) -> tuple[Shard, ...]:
    (root / "pending").mkdir()
    found: list[Shard] = []
    for shard, moments in zip(shards, pending, strict=True):
        first, last = shard.sequences
        tensors = {
            f"seqs/{k}": np.ascontiguousarray(v[first:last]) for k, v in sequences.items() if last > first
        }
        for hook, running in moments.items():
            parts = {"count": running.count, "total": running.total, "square": running.square}
            tensors |= {f"stats/{hook}/{name}": values for name, values in parts.items()}
        content = save(tensors)
        (root / "pending" / f"{len(found)}.safetensors").write_bytes(content)
        found.append(replace(shard, pending=google_crc32c.value(content)))
    return tuple(found)
