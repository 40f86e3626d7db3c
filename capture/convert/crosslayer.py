"""A store as the activations that crosslayer-coding trains from, another project's layout.

    chunk_0.h5, chunk_1.h5, ...   groups layer_0, layer_1, ... with datasets inputs and targets [row, d]:
                                  what each MLP reads and what it adds to the residual stream
    index.bin                     for each chunk (number int32, rows int32, rows before it int64)
    metadata.json                 num_layers, d_model, dtype, total_tokens, chunk_tokens, and the rest for people
    norm_stats.json               for each layer and side, mean and standard deviation (n - 1) of every dimension

Rows keep their order: the loader shuffles within a chunk. It drops what does not fill a batch from one chunk,
so chunks are as equal as they can be. Its `dtype` has to be the type in metadata.json. There is no bfloat16:
that project's generator keeps it as uint16, which the released loader takes for whole numbers.

Source:
    decode-clt 0.0.1 (PyPI), clt/training/data/local_activation_store.py and manifest_activation_store.py,
    and clt/activation_generation/generator.py of utahnlp/crosslayer-coding at 0157f4ee: a fork of
    curt-tigges/crosslayer-coding. The fork's per-row index (8 bytes a row) is an older form of index.bin.
"""

# Axes: row, d

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture import schema
from capture.convert.hdf5 import Hdf5Writer
from capture.convert.selection import Selection, as_tensor
from capture.reader import ActivationStore
from mdlm_interp.errors import ConfigError, HookError, StoreError, nearest
from mdlm_interp.hooks import select_names

INPUT, TARGET = "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"
"""Hook points that become inputs and targets of a layer."""
CHUNK_ROWS = 16384
"""Most rows of a chunk; the loader keeps 64 arrays of this many rows in memory."""
STEP_ROWS = 256
"""Rows whose moments are taken together: they stay in the processor's cache."""
_INDEX = np.dtype([("chunk_id", "<i4"), ("num_tokens", "<i4"), ("offset", "<i8")])


def check_type(dtype: schema.StoredType) -> None:
    """Raise ConfigError for a type that the loader would misread."""
    if dtype == "bfloat16":
        raise ConfigError(
            "crosslayer-coding's loader reads bfloat16 as whole numbers; export with --dtype float32, which loses "
            "nothing"
        )


def layer_hooks(store: ActivationStore, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """The input and target hook points of every layer, in order.

    Args:
        patterns: What the user asked for, which can only be these.
    Raises:
        StoreError: If the store lacks one.
        HookError: If others are asked for, or too few.
    """
    numbers = [int(match[1]) for hook in store.hooks if (match := re.match(r"blocks\.(\d+)\.", hook))]
    known = store.provenance.get("model", {}).get("n_blocks")
    n_layers = int(known) if known is not None else max(numbers, default=0) + 1
    wanted = [name.format(layer) for layer in range(n_layers) for name in (INPUT, TARGET)]
    for name in wanted:
        if name not in store.hooks:
            raise StoreError(
                f"{store.name} holds no {name!r}{nearest(name, store.hooks)}; crosslayer-coding needs "
                f"{INPUT.format('*')!r} and {TARGET.format('*')!r} of all {n_layers} blocks"
            )
    if patterns is not None:
        differing = set(select_names(patterns, store.hooks)) ^ set(wanted)
        if differing:
            raise HookError(
                f"crosslayer-coding takes {INPUT.format('*')!r} and {TARGET.format('*')!r} of all {n_layers} "
                f"blocks and nothing else; {min(differing)!r} differs: leave --hooks out"
            )
    return tuple(wanted)


def write_crosslayer(selection: Selection, directory: Path, advance: Callable[[int], object]) -> None:
    """Fill an empty directory, a chunk after the other.

    Args:
        advance: Called with the number of bytes written since the last call.
    """
    shapes = set(selection.layout.shapes.values())
    assert len(shapes) == 1, shapes
    ((width,),) = shapes
    n_chunks = -(-selection.n_rows // CHUNK_ROWS)
    edges = [round(number * selection.n_rows / n_chunks) for number in range(n_chunks + 1)]
    moments = {hook: _Moments(width) for hook in selection.hooks}
    memory = selection.memory(selection.hooks[0], -(-selection.n_rows // n_chunks))
    for number, (start, stop) in enumerate(pairwise(edges)):
        with Hdf5Writer.open(directory / f"chunk_{number}.h5") as writer:
            for index, hook in enumerate(selection.hooks):
                path = f"layer_{index // 2}/{('inputs', 'targets')[index % 2]}"
                values = selection.acts(hook, start, stop, memory)
                writer.array(path, values.shape, values.dtype)
                writer.fill(path, [values], advance)
                moments[hook].add(values, selection.dtype)
    sizes = np.diff(edges)
    entries = zip(range(n_chunks), sizes.tolist(), edges[:-1], strict=True)
    (directory / "index.bin").write_bytes(np.array(list(entries), _INDEX).tobytes())
    _write_json(directory / "metadata.json", _metadata(selection, width, int(sizes.min())))
    sides = {hook: moments[hook].described(hook) for hook in selection.hooks}
    layers = range(len(selection.hooks) // 2)
    stats = {
        str(layer): {"inputs": sides[INPUT.format(layer)], "targets": sides[TARGET.format(layer)]}
        for layer in layers
    }
    _write_json(directory / "norm_stats.json", stats)


def _metadata(selection: Selection, width: int, chunk_rows: int) -> dict[str, Any]:
    attributes = selection.attributes()
    return {
        "model_name": str(attributes["config"].get("model", "")),
        "dataset": [str(file) for file in attributes["config"].get("files", ())],
        "split": "train",
        "num_layers": len(selection.hooks) // 2,
        "d_model": width,
        "dtype": selection.dtype,
        "total_tokens": selection.n_rows,
        "chunk_tokens": chunk_rows,
        "mdlm_interp": {name: attributes[name] for name in ("hooks", "config", "provenance", "source")},
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


class _Moments:
    """Mean and sum of squared deviations of each dimension over the rows added so far, in float64."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._mean, self._square = np.zeros(width), np.zeros(width)

    def add(self, values: NDArray[Any], dtype: schema.StoredType) -> None:
        """Add rows by the parallel form of Welford's update (Chan et al. 1979)."""
        for start in range(0, len(values), STEP_ROWS):
            rows = as_tensor(values[start : start + STEP_ROWS], dtype).double().numpy()
            mean = rows.mean(axis=0)
            rows -= mean
            delta, total = mean - self._mean, self._count + len(rows)
            between = delta**2 * (self._count * len(rows) / total)
            self._square += np.einsum("rd,rd->d", rows, rows) + between
            self._mean += delta * (len(rows) / total)
            self._count = total

    def described(self, hook: str) -> dict[str, list[float]]:
        """Mean and standard deviation, in float32 as that project keeps them.

        Raises:
            StoreError: If an activation is infinite or no number.
        """
        deviation = np.sqrt(self._square / max(self._count - 1, 1))
        if not (np.isfinite(self._mean).all() and np.isfinite(deviation).all()):
            raise StoreError(
                f"{hook} has activations that are infinite or not a number; nothing can train on it"
            )
        return {"mean": _float32(self._mean), "std": _float32(deviation)}


def _float32(values: NDArray[np.float64]) -> list[float]:
    found: list[float] = values.astype(np.float32).tolist()
    return found
