"""Checks a store against itself and against the model that it was captured from.

1. Every byte: the manifest against its own hash, each shard file's chunks and index against their checksums
   and those against the manifest, every other file against the manifest's SHA-256.
2. The noise of sampled sequences, made again from seed, block and time.
3. The activations of sampled batches, made again by a forward pass of the recorded shape. Exact arithmetic
   must give the same bits on any machine. Native arithmetic must do so on the stack that captured; elsewhere
   it must agree to `BOUND`.
"""

# Axes: row, then the axes of one row; pos

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture import schema
from capture.begin import SAME_STACK, item
from capture.config import CaptureConfig
from capture.decodings import Decodings
from capture.finish import file_hashes
from capture.manifest import Shard
from capture.places import Place
from capture.plan import Batch, PlannedSequence, noised
from capture.provenance import model_record, stack_record
from capture.reader import ActivationStore, open_store
from capture.run import forward_of, in_arithmetic
from capture.shards import CRC_BYTES, ShardShape, index_bytes, shard_digest
from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.config_files import from_mapping
from mdlm_interp.documents import StreamPosition, TokenBlock
from mdlm_interp.errors import StoreError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import permutation
from mdlm_interp.tokenizers import load_tokenizer

BOUND = 1e-3
"""Largest difference of a recomputed activation on another stack, as a share of its hook's root mean square.

Float32 rounding at 12 blocks and 1,024 positions stays well below a tenth of it.
"""
TYPE_BOUND = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What storing adds, as a share of the value: one unit in the last place."""
READERS = 4
"""Files that are checked at a time."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked and held."""

    files: int
    size: int
    """Bytes of all files that were read and compared."""
    batches: int
    """Batches that were recomputed."""
    rows: int
    """Their rows."""
    bitwise: bool
    """Whether the recomputed activations had to be, and were, the same bits."""
    largest: float
    """Largest difference from the stored values, as a share of the hook's root mean square."""


def verify_files(store: ActivationStore, *, progress: Any = None) -> tuple[int, int]:
    """Read every file of a store and compare it with the manifest.

    Args:
        progress: Called with the number of rows of each shard that was found right.
    Returns:
        (files, bytes) read.
    Raises:
        StoreError: If a file is missing or any of its bits differs.
    """
    place, layout = store.place, layout_of(store)
    files = size = 0
    with ThreadPoolExecutor(READERS) as pool:
        checked = pool.map(lambda shard: _verify_shard(place, layout, shard), store.manifest.shards)
        for (count, total), shard in zip(checked, store.manifest.shards, strict=True):
            files, size = files + count, size + total
            if progress is not None:
                progress(shard.rows[1] - shard.rows[0])
    if store.complete:
        found = file_hashes(place)
        for path, expected in store.manifest.files.items():
            if found.get(path) != expected:
                what = "differs from the manifest" if path in found else "is missing"
                raise StoreError(f"{place.name}/{path} {what}; restore it from a copy or capture again")
        strange = [path for path in found if path not in store.manifest.files]
        if strange:
            raise StoreError(f"{place.name}/{strange[0]} is no file of this store; remove it")
        files += len(found)
    return files, size


def layout_of(store: ActivationStore) -> schema.Layout:
    """The sizes of a store."""
    return schema.Layout(
        shapes={hook: store.row_shape(hook) for hook in store.hooks},
        length=store.length,
        dtype=store.dtype,
        shard_rows=store.manifest.shard_rows,
        sampled=store.sampled,
    )


def _verify_shard(place: Place, layout: schema.Layout, shard: Shard) -> tuple[int, int]:
    number = shard.rows[0] // layout.shard_rows
    checksums: dict[str, Sequence[int]] = {}
    size = 0
    for hook, row in layout.shapes.items():
        path = schema.file_of(f"acts/{hook}", 1 + len(row), number)
        content = _content(place, path)
        chunks = -(-(shard.rows[1] - shard.rows[0]) // schema.CHUNK_ROWS)
        checksums[f"acts/{hook}"] = _chunks(place, path, content, layout.shard_shape(hook), chunks)
        size += len(content)
    for name, column in layout.row_columns.items():
        path = schema.file_of(f"rows/{name}", 1, number)
        content = _content(place, path)
        if len(content) != layout.shard_rows * np.dtype(column.dtype).itemsize + CRC_BYTES:
            raise _damaged(place, path, f"it has {len(content)} bytes")
        checksums[f"rows/{name}"] = [_checked(place, path, memoryview(content), "its only chunk")]
        size += len(content)
    if shard_digest(checksums) != shard.sha256:
        raise StoreError(
            f"{place.name}: the files of rows {shard.rows[0]} to {shard.rows[1]} are whole, but not the ones that "
            f"the manifest lists; restore them from a copy or capture again"
        )
    return len(checksums), size


def _chunks(place: Place, path: str, content: bytes, shape: ShardShape, present: int) -> list[int]:
    """Checksums of the chunks of a shard file, all of which hold."""
    index = index_bytes(shape, present)
    step = shape.chunk_bytes + CRC_BYTES
    if len(content) != present * step + len(index):
        raise _damaged(place, path, f"it has {len(content)} bytes, expected {present * step + len(index)}")
    if content[-len(index) :] != index:
        raise _damaged(place, path, "its index differs")
    view = memoryview(content)
    return [
        _checked(place, path, view[chunk * step : (chunk + 1) * step], f"chunk {chunk}")
        for chunk in range(present)
    ]


def _checked(place: Place, path: str, chunk: memoryview, which: str) -> int:
    computed = google_crc32c.value(np.frombuffer(chunk[:-CRC_BYTES], np.uint8))
    if computed != int.from_bytes(chunk[-CRC_BYTES:], "little"):
        raise _damaged(place, path, f"the checksum of {which} does not match")
    return int(computed)


def _content(place: Place, path: str) -> bytes:
    content = place.read(path)
    if content is None:
        raise StoreError(f"{place.name}/{path} is missing; restore it from a copy or capture again")
    return content


def _damaged(place: Place, path: str, reason: str) -> StoreError:
    return StoreError(f"{place.name}/{path} is damaged ({reason}); restore it from a copy or capture again")


def verify_rows(
    store: ActivationStore, model: str | None, *, tokenizer: str | None = None, batches: int, seed: int = 0
) -> Verification:
    """Recompute sampled batches and compare them with what is stored.

    Args:
        model: Where the weights are; none takes the store's own word.
        tokenizer: Where the tokenizer is; none takes the store's word, or the model's own if the store's came with it.
        batches: How many to recompute; all, if there are not so many.
        seed: Key of the sample.
    Raises:
        StoreError: If the model is another one, or anything differs by more than it may.
    """
    config = recorded_config(store, model, tokenizer)
    directory = resolve_source(config.model)
    network = HookedMDLM.from_pretrained(directory)
    words = load_tokenizer(config.tokenizer or config.model)
    threads = store.provenance["threads"]
    now = {**model_record(directory, network, words), **stack_record(network, threads)}
    for key in ("weights_sha256", "tokenizer_sha256"):
        if store.provenance[key] != now[key]:
            kind = key.partition("_")[0]
            found = config.model if kind == "weights" else config.tokenizer
            raise StoreError(
                f"{store.name} was captured with {key} {store.provenance[key][:16]}..., {found} has "
                f"{now[key][:16]}...; name the store's own with --{'model' if kind == 'weights' else 'tokenizer'}"
            )
    forward = forward_of(network, store.hooks, config)
    same_stack = all(item(store.provenance, key) == item(now, key) for key in SAME_STACK)
    bitwise = config.arithmetic == "exact" or same_stack
    rows, largest, done = 0, 0.0, 0
    again = None
    if config.sampler is not None and bitwise:
        again = Decodings(config, in_arithmetic(network, config), words)
    with on_threads(threads):
        for batch in islice(sampled_batches(store, config, words.mask_id, seed, again), batches):
            acts = forward(batch, check=True)
            largest = max(largest, _compare(store, batch, acts, bitwise=bitwise))
            rows, done = rows + batch.stop - batch.start, done + 1
    return Verification(files=0, size=0, batches=done, rows=rows, bitwise=bitwise, largest=largest)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Forward passes have this many threads, as those that made a store; native bits depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded_config(store: ActivationStore, model: str | None, tokenizer: str | None = None) -> CaptureConfig:
    """The config that a store was captured with, on this machine's CPU.

    Args:
        model: Where the model is now, and its tokenizer if the store's came with it.
        tokenizer: Where the tokenizer is now.
    """
    given = {**store.config, "out": str(store.name), "device": "cpu"}
    if tokenizer is None and model is not None and given["tokenizer"] == given["model"]:
        tokenizer = model
    given |= {"model": model or given["model"], "tokenizer": tokenizer or given["tokenizer"]}
    return from_mapping(CaptureConfig, given, source=str(store.name))


def sampled_batches(
    store: ActivationStore,
    config: CaptureConfig,
    mask_id: int,
    seed: int,
    again: Decodings | None = None,
) -> Iterator[Batch]:
    """Whole batches of a store, as its sequences record them, in random order.

    Args:
        again: Of a sampler's store on the stack that captured, or in exact arithmetic: what decodes once more. (On
            another stack native arithmetic may draw other tokens, so only the activations are recomputed.)
    """
    total = store.n_sequences // config.batch_size
    if store.complete:
        total = -(-store.n_sequences // config.batch_size)
    x0, xt = store.tokens()
    for number in permutation(seed, "verify", 0, total).tolist():
        first = number * config.batch_size
        last = min(first + config.batch_size, store.n_sequences)
        sequences = [_recorded(store, index, x0[index], xt[index]) for index in range(first, last)]
        for sequence in sequences:
            if again is not None:
                _verify_state(store, again, sequence)
            elif config.sampler is None:
                _verify_noise(store, config, sequence, mask_id)
        assert config.length is not None
        yield Batch(sequences, config.length, config.seed)


def _recorded(store: ActivationStore, number: int, x0: Tensor, xt: Tensor) -> PlannedSequence:
    """A sequence as a store records it."""
    blocks = store.sequence_column("block")
    present = int((x0 >= 0).sum())
    rows = store.sequence_rows(number)
    block = TokenBlock(
        ids=x0[:present].numpy().astype(np.int64),
        documents=np.full(present, -1),
        source=-1,
        offset=-1,
        start=StreamPosition(0, 0),
    )
    return PlannedSequence(
        number=number,
        row=rows.start,
        block=block,
        block_number=int(blocks[number]),
        candidate=-1,
        t=float(store.times()[number]),
        xt=xt[:present].numpy().astype(np.int64),
        positions=store.coords(rows)["pos"].numpy(),
        told=float(store.sequence_column("sigma")[number]) if store.sampled else None,
    )


def _verify_noise(
    store: ActivationStore, config: CaptureConfig, sequence: PlannedSequence, mask_id: int
) -> None:
    again = noised(
        sequence.block.ids, sequence.t, mask_id, seed=config.seed, block_number=sequence.block_number
    )
    if not np.array_equal(again, sequence.xt):
        position = int(np.flatnonzero(again != sequence.xt)[0])
        raise StoreError(
            f"{store.name}: sequence {sequence.number} reads {sequence.xt[position]} at position {position}, and its "
            f"seed and time give {again[position]}; capture again"
        )


def _verify_state(store: ActivationStore, again: Decodings, sequence: PlannedSequence) -> None:
    """A sampler's sequence against the decoding that gives it: tokens, and every column of its rows."""
    rows = store.sequence_rows(sequence.number)
    stored = store.coords(rows)
    step = int(stored["step"][0])
    if step not in again.steps_of(sequence.block_number):
        raise StoreError(
            f"{store.name}: sequence {sequence.number} is of step {step}, and decoding {sequence.block_number} has "
            f"no such step when it is made again; capture again"
        )
    state = again.state(sequence.block_number, step)
    expected = {"xt": state.xt, "x0": state.block.ids, **state.columns}
    for name, values in expected.items():
        wanted, found = values[sequence.positions], stored[name].numpy()
        if not np.array_equal(wanted, found, equal_nan=values.dtype.kind == "f"):
            raise StoreError(_other_decoding(store, sequence, name))
    if not np.array_equal(state.xt, sequence.xt) or not np.array_equal(state.block.ids, sequence.block.ids):
        raise StoreError(_other_decoding(store, sequence, "xt or x0"))


def _other_decoding(store: ActivationStore, sequence: PlannedSequence, name: str) -> str:
    return (
        f"{store.name}: {name} of sequence {sequence.number} is not what seed and sampler give for decoding "
        f"{sequence.block_number}; capture again"
    )


def _compare(store: ActivationStore, batch: Batch, acts: Mapping[str, Tensor], *, bitwise: bool) -> float:
    """Largest difference as a share of a hook's root mean square; raises if it is more than it may be."""
    rows = np.arange(batch.start, batch.stop)
    stored = store.read(slice(batch.start, batch.stop))
    largest = 0.0
    for hook, expected in acts.items():
        kept = stored[hook]
        rounded = as_stored(expected, store.dtype)
        if bitwise:
            wrong = ~((rounded == kept) | (rounded.isnan() & kept.isnan()))
        else:
            rms = float(kept.double().square().mean().sqrt())
            difference = (rounded - kept).abs()
            largest = max(largest, float(difference.max()) / rms)
            wrong = ~(difference <= BOUND * rms + TYPE_BOUND[store.dtype] * kept.abs())
        if bool(wrong.any()):
            where = torch.nonzero(wrong)[0].tolist()
            raise StoreError(_differs(store, hook, rows, where, rounded, kept, bitwise=bitwise))
    return largest


def as_stored(acts: Tensor, dtype: schema.StoredType) -> Tensor:
    """Float32 activations after a round trip through the stored type."""
    return acts.to(
        {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    ).float()


def _differs(
    store: ActivationStore,
    hook: str,
    rows: NDArray[np.int64],
    where: Sequence[int],
    recomputed: Tensor,
    kept: Tensor,
    *,
    bitwise: bool,
) -> str:
    rule = "must be the same bits" if bitwise else f"may differ by {BOUND:g} of the root mean square"
    return (
        f"{store.name}: {hook} of row {int(rows[where[0]])} at {list(where[1:])} is {float(kept[tuple(where)])!r} and "
        f"was recomputed as {float(recomputed[tuple(where)])!r}, which {rule}; the store or this machine is wrong"
    )


def verify_store(
    path: str | Path,
    *,
    endpoint: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    batches: int = 4,
    seed: int = 0,
    progress: Any = None,
) -> Verification:
    """Check every byte of a store and recompute some of its batches.

    Raises:
        StoreError: Naming what is missing, damaged or different.
    """
    store = open_store(path, endpoint=endpoint)
    files, size = verify_files(store, progress=progress)
    rows = verify_rows(store, model, tokenizer=tokenizer, batches=batches, seed=seed)
    return Verification(
        files=files,
        size=size,
        batches=rows.batches,
        rows=rows.rows,
        bitwise=rows.bitwise,
        largest=rows.largest,
    )
