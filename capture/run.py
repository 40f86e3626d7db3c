"""The capture: text, or what a sampler decodes, to sequences, forward pass and store; and its continuation.

1. Everything that can be wrong with the request is found before anything is written.
2. The store is made, or found and compared with the request: what another request began is refused.
3. Batches are run from the last commit on, while threads write the rows of earlier ones.
4. When the text or the budget ends, the last of the ranks completes the store.

Tokens, times, masks and positions are functions of (text, seed, number of the block): neither batches nor
ranks nor interruptions enter. Under exact arithmetic neither do they enter the bytes of the activations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from capture import manifest as manifests
from capture import schema
from capture.begin import begin
from capture.config import CaptureConfig
from capture.decodings import Decodings
from capture.finish import clean, done_name, finish, has_leftovers
from capture.forecast import duration, forecast, refuse_full_disk
from capture.forward import Forward
from capture.manifest import ResumePoint
from capture.passes import Passes, Shares
from capture.places import Place, place_of
from capture.plan import SCHEDULE, Batch, batches, read_blocks
from capture.provenance import provenance
from capture.reader import ActivationStore, open_store
from capture.sources import Sources, refuse_repeated
from capture.store_files import read_manifest
from capture.writer import Rows, StoreWriter
from mdlm_interp.checkpoints import resolve_source
from mdlm_interp.documents import expand_files
from mdlm_interp.errors import ConfigError, DataError, HookError, StoreError
from mdlm_interp.hooks import select_names
from mdlm_interp.model import HookedMDLM
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer

BatchesFrom = Callable[[ResumePoint | None], Iterator[Batch]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A capture that was found possible."""

    config: CaptureConfig
    """With nothing left to default."""
    first: Batch
    """The first of the whole capture."""
    batches: BatchesFrom
    """All batches, or those from a place on."""
    model: HookedMDLM
    network: HookedMDLM
    """The model in the arithmetic that was asked for."""
    directory: Path
    """Of the model."""
    tokenizer: Tokenizer
    layout: schema.Layout
    shares: Shares
    """Of this process's threads among forward passes."""
    rank: int
    world_size: int


def run_capture(config: CaptureConfig, *, progress: bool = False) -> ActivationStore:
    """Run the model over the text and store what its hook points see, or go on with a store begun so.

    When it is interrupted or fails, the store stays readable up to its last commit, and the same call goes
    on from there to the same bytes. Of several ranks the last to end completes the store; the others return
    it incomplete.

    Args:
        progress: Show the forecast, and a bar with rows/s on stderr if that is a terminal.
    Raises:
        OutputExistsError: If `config.out` holds something else; it is left alone.
        ConfigError, DataError, HookError, CheckpointError: If the request does not fit the model or text, or a
            file of text changes meanwhile; what is committed stays.
        StoreError: If the disk cannot hold the store, a service does not answer, or another process is writing.
        WriteError: If the disk fails or is full while writing; what is committed stays.
    """
    place = place_of(config.out, config.endpoint)
    request = prepared(config)
    refuse_repeated(request.config.files)
    expected = forecast(request.config, request.tokenizer, request.layout)
    begun = begun_manifest(place)
    if not config.any_disk and not (begun and begun.complete):
        refuse_full_disk(place, expected, begun.committed_rows if begun else 0)
    forward = Forward(request.network, list(request.layout.shapes), together=request.config.pack == "blocks")
    if progress and request.rank == 0:
        hours = expected.rows / rows_per_second(forward, request.first) / 3600 / request.world_size
        sys.stderr.write(f"{place.name}: {expected}, about {duration(hours)}\n")
    sources = Sources(request.config.files)
    sources.refuse_same_content()
    attributes = {
        "config": request.config.identity(),
        "provenance": provenance(
            model_directory=request.directory,
            model=request.model,
            tokenizer=request.tokenizer,
            config=request.config,
            sources=sources,
            schedule=SCHEDULE,
            threads=request.shares.threads,
        ),
    }
    manifest = begin(place, request.layout, attributes, expected.rows, request.rank, request.world_size)
    if manifest.complete:
        # A kill after the last commit leaves what only an incomplete store needs.
        if has_leftovers(place):
            with place.lock("finish", wait=True):
                clean(place)
    else:
        with place.lock(f"rank-{request.rank}"):
            # Another process may have committed between reading the manifest and taking the lock.
            manifest = begin(
                place, request.layout, attributes, expected.rows, request.rank, request.world_size
            )
            rows = _write(place, request, forward, manifest, sources, progress)
            with place.lock("finish", wait=True):
                finish(place, request.layout, world_size=request.world_size, rows=rows)
    return open_store(config.out, endpoint=config.endpoint)


def prepared(config: CaptureConfig) -> Request:
    """The request with everything resolved and checked; writes nothing."""
    rank, world_size = ranks(config)
    directory = resolve_source(config.model)
    device = device_of(config.device, rank)
    model = HookedMDLM.from_pretrained(directory, device=device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    config = resolved(config, model, tokenizer)
    assert config.length is not None
    assert config.shard_rows is not None
    hooks = recordable_hooks(config.hooks, model)
    network = in_arithmetic(model, config)
    from_place = batches_of(config, network, tokenizer)
    first = next(from_place(None), None)
    if first is None:
        raise DataError(_too_short(config, tokenizer))
    layout = schema.Layout(
        shapes={hook: schema.row_shape(hook, model.config) for hook in hooks},
        length=config.length,
        dtype=config.dtype,
        shard_rows=config.shard_rows,
        sampled=config.sampler is not None,
    )
    return Request(
        config=config,
        first=first,
        batches=from_place,
        model=model,
        network=network,
        directory=directory,
        tokenizer=tokenizer,
        layout=layout,
        shares=Shares.of(config.forwards, alone=runs_alone(config, device)),
        rank=rank,
        world_size=world_size,
    )


def batches_of(config: CaptureConfig, network: HookedMDLM, tokenizer: Tokenizer) -> BatchesFrom:
    """The batches of a resolved config: of its text, or of what its sampler decodes."""
    if config.sampler is not None:
        return Decodings(config, network, tokenizer).batches
    return lambda resume: batches(config, tokenizer, resume)


def _too_short(config: CaptureConfig, tokenizer: Tokenizer) -> str:
    if config.sampler is not None:
        if config.max_rows is None:
            return (
                f"no step of {config.sampler.n} decodings has {config.positions} positions to record; record others, "
                f"such as --positions all (a sampler that rewrites random tokens never has masks)"
            )
        return (
            f"no step of {config.sampler.n} decodings of length {config.length} with {config.positions} positions fits "
            f"max_rows {config.max_rows}; raise --max-rows or record other positions"
        )
    if config.max_rows is not None or config.positions in ("masked", "unmasked"):
        return (
            f"no sequence of length {config.length} with {config.positions} positions fits the text and max_rows "
            f"{config.max_rows}; raise --max-rows or give more text"
        )
    tokens = sum(1 for _ in read_blocks(replace(config, pack="blocks", length=1, wrap=False), tokenizer))
    needed = (config.length or 0) - (2 if config.wrap else 0)
    return (
        f"the text has {tokens} tokens and one sequence of length {config.length} needs {needed}; lower --length "
        f"or give more text"
    )


def ranks(config: CaptureConfig) -> tuple[int, int]:
    """(rank, world_size): the config's, or torchrun's, or (0, 1)."""
    if config.world_size is None and config.rank is None:
        rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        if not rank and not world_size:
            return 0, 1
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise ConfigError(
                f"RANK and WORLD_SIZE in the environment must be whole numbers with 0 <= RANK < WORLD_SIZE, got "
                f"{rank!r} and {world_size!r}; unset both, or give --rank and --world-size"
            )
        return int(rank), int(world_size)
    if config.rank is None or config.world_size is None:
        raise ConfigError("rank and world_size must be given together, such as --rank 0 --world-size 4")
    return config.rank, config.world_size


def device_of(name: str, rank: int) -> torch.device:
    """The device of a rank: on a machine with several, each takes its own."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {name!r}: this machine has no CUDA device that torch can use; take cpu"
            )
        if device.index is None:
            local = int(os.environ.get("LOCAL_RANK", rank))
            return torch.device("cuda", local % torch.cuda.device_count())
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()}, numbered from 0")
    return device


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
    if config.per_sequence is not None and config.per_sequence > length:
        raise ConfigError(f"per_sequence must be at most length {length}, got {config.per_sequence}")
    return replace(
        config,
        files=expand_files(config.files) if config.sampler is None else (),
        length=length,
        tokenizer=config.tokenizer or config.model,
        shard_rows=config.shard_rows or schema.SHARD_ROWS,
    )


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


def runs_alone(config: CaptureConfig, device: torch.device) -> bool:
    """Whether one forward pass at a time is best: it has all threads already, or needs them between passes."""
    return device.type != "cpu" or config.arithmetic == "exact" or config.sampler is not None


def forward_of(model: HookedMDLM, hooks: Sequence[str], config: CaptureConfig) -> Forward:
    """The forward pass in the arithmetic that was asked for."""
    return Forward(in_arithmetic(model, config), hooks, together=config.pack == "blocks")


def in_arithmetic(model: HookedMDLM, config: CaptureConfig) -> HookedMDLM:
    """The model in the arithmetic that was asked for."""
    if config.arithmetic == "exact":
        from oracle import Oracle

        return Oracle(model).model
    return model


def begun_manifest(place: Place) -> manifests.Manifest | None:
    """What is committed of the store already, if there is one."""
    try:
        return read_manifest(place) if place.exists() else None
    except StoreError:  # something else is there, which `begin` refuses
        return None


def rows_per_second(forward: Forward, batch: Batch) -> float:
    """Speed of the forward pass on one batch, the second time: the first one prepares the machine."""
    forward(batch, check=True)
    start = perf_counter()
    forward(batch, check=False)
    return (batch.stop - batch.start) / (perf_counter() - start)


def _write(
    place: Place,
    request: Request,
    forward: Forward,
    manifest: manifests.Manifest,
    sources: Sources,
    progress: bool,
) -> int:
    """Run and commit what this rank has not committed yet; rows of the whole store."""
    layout = request.layout
    resume = manifest.shards[-1].resume if manifest.shards else None
    rows = 0
    with (
        _bar(request, manifest, progress) as bar,
        _writing(place, request, manifest) as writer,
        Passes(forward, request.shares) as passes,
    ):
        for batch, lent in passes.run(_jobs(request.batches(resume), writer, layout.shard_rows)):
            rows = batch.stop
            if lent is not None:
                if batch.start // layout.shard_rows != batch.stop // layout.shard_rows:
                    # This batch fills a shard, of which every row has been read by now.
                    sources.refuse_changed(place.name)
                acts, release = lent
                writer.append(batch_rows(batch, acts, request.tokenizer.mask_id, release))
            bar.update(batch.stop - bar.n)
        # Before the last, shorter shard is committed and the text counts as read to its end.
        sources.refuse_changed(place.name)
    place.replace(done_name(request.rank, request.world_size), str(rows).encode())
    return rows


def _jobs(
    planned: Iterator[Batch], writer: StoreWriter, shard_rows: int
) -> Iterator[tuple[Batch, bool | None]]:
    """Each batch, and whether it is checked, as the first of every shard is; none is for other ranks."""
    for batch in planned:
        if not writer.wants(batch.start, batch.stop):
            yield batch, None
            continue
        first_of_shard = batch.start // shard_rows != (batch.stop - 1) // shard_rows
        yield batch, first_of_shard or batch.start % shard_rows == 0


@contextmanager
def _writing(place: Place, request: Request, manifest: manifests.Manifest) -> Iterator[StoreWriter]:
    """A writer that commits everything at the end, or stops at once on an error."""
    writer = StoreWriter(place, request.layout, manifest, rank=request.rank, world_size=request.world_size)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
    writer.close()


def batch_rows(
    batch: Batch, acts: Mapping[str, torch.Tensor], mask_id: int, release: Callable[[], None] = lambda: None
) -> Rows:
    """What the writer takes."""
    return Rows(
        start=batch.start,
        acts=acts,
        columns=batch.row_columns(mask_id),
        t=batch.times(),
        first_sequence=batch.sequences[0].number,
        sequences=batch.sequence_columns(),
        resume=batch.resume,
        release=release,
    )


def _bar(request: Request, manifest: manifests.Manifest, progress: bool) -> Any:
    quiet = not progress or request.rank != 0 or not sys.stderr.isatty()
    return tqdm(total=manifest.planned_rows, unit="row", unit_scale=True, disable=quiet)
