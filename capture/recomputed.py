"""Sampled batches of a store, recomputed and compared with what is stored."""

# Axes: row, then the axes of one row; pos

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture import schema
from capture.begin import SAME_STACK, item
from capture.config import CaptureConfig
from capture.decodings import Decodings
from capture.native import on_threads, refuse_rounded_factors
from capture.plan import Batch, PlannedSequence, noised
from capture.provenance import model_record, stack_record
from capture.reader import ActivationStore
from capture.request import forward_of, in_arithmetic
from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.config_files import from_mapping
from mdlm_interp.documents import StreamPosition, TokenBlock
from mdlm_interp.errors import ConfigError, StoreError
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import permutation
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer

BOUND = 1e-3
"""Largest difference of a recomputed activation on another stack, as a share of its hook's root mean square.

Float32 rounding at 12 blocks and 1,024 positions stays well below a tenth of it.
"""
TYPE_BOUND = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What storing adds, as a share of the value: one unit in the last place."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked and held."""

    files: int = 0
    size: int = 0
    """Bytes of all files that were read and compared."""
    batches: int = 0
    """Batches that were recomputed."""
    rows: int = 0
    """Their rows."""
    bitwise: bool = False
    """Whether the recomputed activations had to be, and were, the same bits."""
    largest: float = 0.0
    """Largest difference from the stored values, as a share of the hook's root mean square."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a store was captured with, found again and with the hashes that the store has."""

    config: CaptureConfig
    """On this machine's CPU."""
    model: HookedMDLM
    tokenizer: Tokenizer
    bitwise: bool
    """Whether this stack must give the same bits."""


def verify_rows(
    store: ActivationStore, model: str | None, *, tokenizer: str | None = None, batches: int, seed: int = 0
) -> Verification:
    """Recompute sampled batches and compare them with what is stored; `origin_of`, then `recompute`."""
    check_batches(batches)
    return recompute(store, origin_of(store, model, tokenizer), batches=batches, seed=seed)


def check_batches(batches: int) -> None:
    """Raise ConfigError unless it is a number of batches."""
    if not isinstance(batches, Integral) or isinstance(batches, bool) or batches < 0:
        raise ConfigError(f"batches must be a whole number from 0, got {batches!r}; 0 checks the bytes only")


def origin_of(store: ActivationStore, model: str | None, tokenizer: str | None = None) -> Origin:
    """The model and the tokenizer that a store was captured with.

    Args:
        model: Where the weights are; none takes the store's own word.
        tokenizer: Where the tokenizer is; none takes the store's word, or the model's own if the store's came with it.
    Raises:
        StoreError: If the weights or the tokenizer are others.
        ConfigError: If torch was told to multiply with fewer digits than a store promises.
        MdlmError: If they are not there or do not load.
    """
    config = recorded_config(store, model, tokenizer)
    directory = resolve_source(config.model)
    network = HookedMDLM.from_pretrained(directory)
    words = load_tokenizer(config.tokenizer or config.model)
    threads = store.provenance["threads"]
    now = {**model_record(directory, network, words), **stack_record(network, config, threads)}
    for key in ("weights_sha256", "tokenizer_sha256"):
        if store.provenance[key] != now[key]:
            kind = key.partition("_")[0]
            found = config.model if kind == "weights" else config.tokenizer
            raise StoreError(
                f"{store.name} was captured with {key} {store.provenance[key][:16]}..., {found} has "
                f"{now[key][:16]}...; name the store's own with --{'model' if kind == 'weights' else 'tokenizer'}"
            )
    if config.arithmetic == "native":
        refuse_rounded_factors(next(network.parameters()).device)
    before = {key: item(store.provenance, key) for key in SAME_STACK}
    # Earlier versions did not record all of them.
    same_stack = all(value == item(now, key) for key, value in before.items() if value is not None)
    bitwise = config.arithmetic == "exact" or same_stack
    return Origin(config=config, model=network, tokenizer=words, bitwise=bitwise)


def recompute(store: ActivationStore, origin: Origin, *, batches: int, seed: int = 0) -> Verification:
    """Recompute sampled batches and compare them with what is stored.

    Args:
        batches: How many to recompute; all, if there are not so many.
        seed: Key of the sample.
    Raises:
        StoreError: If anything differs by more than it may.
    """
    config, bitwise = origin.config, origin.bitwise
    forward = forward_of(origin.model, store.hooks, config)
    rows, largest, done = 0, 0.0, 0
    again = None
    if config.sampler is not None and bitwise:
        again = Decodings(config, in_arithmetic(origin.model, config), origin.tokenizer)
    sampled = sampled_batches(store, config, origin.tokenizer.mask_id, seed, again)
    with on_threads(store.provenance["threads"]):
        # islice takes no number of more than 63 bits.
        for batch in islice(sampled, min(batches, store.n_sequences)):
            acts = forward(batch, check=True)
            largest = max(largest, _compare(store, batch, acts, bitwise=bitwise))
            rows, done = rows + batch.stop - batch.start, done + 1
    return Verification(batches=done, rows=rows, bitwise=bitwise, largest=largest)


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
    for number in permutation(seed, "verify", 0, total).tolist():
        first = number * config.batch_size
        last = min(first + config.batch_size, store.n_sequences)
        sequences = _recorded(store, first, last)
        for sequence in sequences:
            if again is not None:
                _verify_state(store, again, sequence)
            elif config.sampler is None:
                _verify_noise(store, config, sequence, mask_id)
        assert config.length is not None
        yield Batch(sequences, config.length, config.seed)


def _recorded(store: ActivationStore, first: int, last: int) -> list[PlannedSequence]:
    """Consecutive sequences as a store records them."""
    names = ("x0", "xt", "block", "t", "sigma")
    columns = {name: store.sequence_column(name, slice(first, last)).numpy() for name in names}
    found = []
    for index, number in enumerate(range(first, last)):
        x0, xt = (columns[name][index].astype(np.int64) for name in ("x0", "xt"))
        present = int((x0 >= 0).sum())
        rows = store.sequence_rows(number)
        block = TokenBlock(
            ids=x0[:present],
            documents=np.full(present, -1),
            source=-1,
            offset=-1,
            start=StreamPosition(0, 0),
        )
        found.append(
            PlannedSequence(
                number=number,
                row=rows.start,
                block=block,
                block_number=int(columns["block"][index]),
                candidate=-1,
                t=float(columns["t"][index]),
                xt=xt[:present],
                positions=store.coords(rows, ["pos"])["pos"].numpy(),
                told=float(columns["sigma"][index]) if store.sampled else None,
            )
        )
    return found


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
            wrong = ~_equal(rounded, kept)
        else:
            share, wrong = _beyond(rounded, kept, TYPE_BOUND[store.dtype])
            largest = max(largest, share)
        if bool(wrong.any()):
            where = torch.nonzero(wrong)[0].tolist()
            raise StoreError(_differs(store, hook, rows, where, rounded, kept, bitwise=bitwise))
    return largest


def _equal(recomputed: Tensor, kept: Tensor) -> Tensor:
    """Where the values are the same, no number being the same as no number."""
    return (recomputed == kept) | (recomputed.isnan() & kept.isnan())


def _beyond(recomputed: Tensor, kept: Tensor, type_bound: float) -> tuple[float, Tensor]:
    """Largest difference as a share of the root mean square of what is finite, and where it is too much."""
    rms = float(kept[kept.isfinite()].double().square().mean().nan_to_num().sqrt())
    equal = _equal(recomputed, kept)
    difference = torch.where(equal, 0.0, (recomputed - kept).abs())
    held = equal | (difference.isfinite() & (difference <= BOUND * rms + type_bound * kept.abs()))
    # Where all that is kept is zero, so is all that holds.
    return float(difference.max()) / rms if rms else 0.0, ~held


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
