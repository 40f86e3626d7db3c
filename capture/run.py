"""The capture: text to sequences, noise, forward pass, store.

1. Everything that can be wrong with the request is found before anything is written.
2. The text is read once to count and place the sequences, then again in batches.
3. Each batch is noised, run, and appended; the writer commits a shard at a time.

Tokens, times and masks are functions of (text, seed, number of the sequence): batches do not enter.
"""

# Axes: batch, pos, row (batch * pos), sequence

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from capture import schema
from capture.config import CaptureConfig
from capture.provenance import provenance
from capture.reader import ActivationStore, open_store
from capture.writer import StoreWriter, refuse_existing
from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.config_files import to_mapping
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, sequence_times
from mdlm_interp.documents import TokenBlock, read_documents, token_blocks
from mdlm_interp.errors import ConfigError, DataError, HookError, StoreError
from mdlm_interp.hooks import select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.shapes import Float64, Int64
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer

SCHEDULE = LogLinearSchedule()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive sequences as the model reads them, and the columns of their rows."""

    xt: Int64[Tensor, "batch pos"]
    sigma: Float64[Tensor, " batch"]
    columns: dict[str, Tensor]
    """Every column of `schema.ROW_COLUMNS` [row]."""


def run_capture(config: CaptureConfig, *, progress: bool = False) -> ActivationStore:
    """Run the model over the text and store what its hook points see.

    When it is interrupted or fails, the store stays readable up to its last commit.

    Args:
        progress: Show a bar with rows/s on stderr, if that is a terminal.
    Raises:
        OutputExistsError: If `config.out` holds something; it is left alone.
        ConfigError, DataError, HookError, CheckpointError: If the request does not fit the model or text.
        StoreError: If the disk cannot hold the store.
    """
    refuse_existing(config.out)
    directory = resolve_source(config.model)
    model = HookedMDLM.from_pretrained(directory)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    config = resolved(config, model, tokenizer)
    assert config.length is not None
    hooks = recordable_hooks(config.hooks, model)
    sequences = plan_sequences(config, tokenizer)
    layout = schema.Layout(
        shapes={hook: schema.row_shape(hook, model.config) for hook in hooks},
        n_sequences=len(sequences["t"]),
        length=config.length,
    )
    refuse_full_disk(config.out, layout)
    attributes = {
        "config": to_mapping(config),
        "provenance": provenance(
            model_directory=directory,
            model=model.config,
            tokenizer=tokenizer,
            files=config.files,
            batch_shape=(config.batch_size, config.length),
            seed=config.seed,
            schedule=SCHEDULE,
        ),
    }
    writer = StoreWriter(config.out, layout, attributes=attributes, sequences=sequences)
    stop_at_block = last_block_needed(hooks)
    quiet = not progress or not sys.stderr.isatty()
    with tqdm(total=layout.rows, unit="row", unit_scale=True, disable=quiet) as bar:
        for batch in batches(config, tokenizer, sequences):
            with torch.inference_mode():
                _, cache = model.run_with_cache(
                    batch.xt,
                    hooks,
                    timesteps=batch.sigma,
                    stop_at_block=stop_at_block,
                    clone=False,
                    device="cpu",
                )
            writer.append({hook: cache[hook].flatten(0, 1) for hook in hooks}, batch.columns)
            bar.update(batch.xt.numel())
    writer.finish()
    return open_store(config.out)


def resolved(config: CaptureConfig, model: HookedMDLM, tokenizer: Tokenizer) -> CaptureConfig:
    """The config with nothing left to default, checked against the model."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise DataError(
            f"the tokenizer {config.tokenizer or config.model} has {tokenizer.vocab_size} ids and the model "
            f"{config.model} has {model.config.vocab_size}; name the tokenizer that it was trained with"
        )
    context = model.config.model_length
    length = config.length if config.length is not None else context
    if length > context:
        raise ConfigError(
            f"length {length} is more than the model's context of {context} tokens; lower --length"
        )
    return replace(config, length=length, tokenizer=config.tokenizer or config.model)


def recordable_hooks(patterns: Sequence[str], model: HookedMDLM) -> list[str]:
    """The hook points that the patterns mean, in execution order.

    Raises:
        HookError: If a pattern matches nothing, or a hook point that has no row for each token.
    """
    hooks = select_names(patterns, model.hook_names)
    refused = [hook for hook in hooks if schema.row_axes(hook) is None]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        what = "two position axes" if "attn.hook_" in refused[0] else "no position axis"
        raise HookError(
            f"{refused[0]}{more} has {what}, and a store keeps one row a token; "
            f"leave it out of hooks, or name those wanted, such as 'blocks.*.hook_resid_post'"
        )
    return hooks


def last_block_needed(hooks: Sequence[str]) -> int | None:
    """`stop_at_block` of the shortest forward pass that reaches all these hook points."""
    if any(not hook.startswith("blocks.") and hook != "hook_embed" for hook in hooks):
        return None
    return max((int(hook.split(".")[1]) + 1 for hook in hooks if hook != "hook_embed"), default=0)


def read_blocks(config: CaptureConfig, tokenizer: Tokenizer) -> Iterator[TokenBlock]:
    """The sequences of a resolved config, in order."""
    assert config.length is not None
    blocks = token_blocks(read_documents(config.files), tokenizer, config.length, wrap=config.wrap)
    return islice(blocks, config.max_sequences)


def plan_sequences(config: CaptureConfig, tokenizer: Tokenizer) -> dict[str, NDArray[Any]]:
    """Every column of `schema.SEQUENCE_COLUMNS`; reads the text once.

    Raises:
        DataError: If the text is too short for one sequence.
    """
    places = [(block.source, block.offset) for block in read_blocks(config, tokenizer)]
    if not places:
        tokens = sum(1 for _ in token_blocks(read_documents(config.files), tokenizer, 1, wrap=False))
        needed = (config.length or 0) - (2 if config.wrap else 0)
        raise DataError(
            f"the text has {tokens} tokens and one sequence of length {config.length} needs {needed}; "
            f"lower --length or give more text"
        )
    if config.times == "fixed":
        t = torch.full((len(places),), config.time, dtype=torch.float64)
    else:
        t = sequence_times(config.seed, range(len(places)))
    source, offset = np.array(places, np.int64).T
    return {
        "t": t.numpy(),
        "sigma": SCHEDULE.sigma(t).numpy(),
        "seed": np.full(len(places), config.seed, np.uint64),
        "source": source,
        "offset": offset,
    }


def batches(
    config: CaptureConfig, tokenizer: Tokenizer, sequences: dict[str, NDArray[Any]]
) -> Iterator[Batch]:
    """The planned sequences, noised, `batch_size` at a time."""
    blocks = read_blocks(config, tokenizer)
    total = len(sequences["t"])
    for first in range(0, total, config.batch_size):
        indices = range(first, min(first + config.batch_size, total))
        taken = list(islice(blocks, len(indices)))
        places = [(block.source, block.offset) for block in taken]
        planned = zip(sequences["source"][indices], sequences["offset"][indices], strict=True)
        if places != [(int(source), int(offset)) for source, offset in planned]:
            raise DataError(
                f"the text changed while it was read, at sequence {first}; keep the files as they are"
            )
        yield noised(taken, indices, sequences, config.seed, tokenizer.mask_id)


def noised(
    blocks: Sequence[TokenBlock], indices: range, sequences: dict[str, NDArray[Any]], seed: int, mask_id: int
) -> Batch:
    """Numbered sequences at their times, and the columns of their rows."""
    x0 = torch.from_numpy(np.stack([block.ids for block in blocks]))
    t, sigma = (torch.from_numpy(sequences[name][indices.start : indices.stop]) for name in ("t", "sigma"))
    xt = corrupt(x0, SCHEDULE.move_chance(t), mask_id, seed=seed, indices=indices)
    length = x0.shape[1]
    columns = {
        "seq": torch.tensor(indices).repeat_interleave(length),
        "pos": torch.arange(length).repeat(len(indices)),
        "x0": x0.flatten(),
        "xt": xt.flatten(),
        "is_masked": (xt == mask_id).flatten(),
        "doc": torch.from_numpy(np.concatenate([block.documents for block in blocks])),
    }
    return Batch(xt=xt, sigma=sigma, columns=columns)


def refuse_full_disk(out: Path, layout: schema.Layout) -> None:
    """Raise StoreError if the disk has no room for the store."""
    place = out.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if layout.total_bytes > free:
        fits = int(free * 0.9) // (layout.row_bytes * layout.length)
        remedy = f"lower --max-sequences to {fits}, " if fits else ""
        raise StoreError(
            f"{out} needs {layout.total_bytes / 1e9:.1f} GB for {layout.rows} rows and {place} has "
            f"{free / 1e9:.1f} GB free; {remedy}record fewer hooks or choose another --out"
        )
