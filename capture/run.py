"""The capture: text, or what a sampler decodes, to sequences, forward pass and store; and its continuation.

1. Everything that can be wrong with the request is found before anything is written.
2. The store is made, or found and compared with the request: what another request began is refused.
3. Batches are run from the last commit on, while threads write the rows of earlier ones.
4. When the text or the budget ends, the last of the ranks completes the store.

Tokens, times, masks and positions are functions of (text, seed, number of the block): neither batches nor
ranks nor interruptions enter. Under exact arithmetic neither do they enter the bytes of the activations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from capture.begin import begin, begun
from capture.checked_files import check_begun, check_shards
from capture.config import CaptureConfig
from capture.finish import clean, done_name, finish, has_leftovers
from capture.forecast import Forecast, forecast, refuse_full_disk, with_time
from capture.forward import Forward
from capture.manifest import Manifest
from capture.passes import Passes
from capture.places import Place, place_of
from capture.plan import SCHEDULE, Batch
from capture.provenance import provenance
from capture.reader import ActivationStore, open_store
from capture.request import Request, forward_of_request, prepared
from capture.schema import Layout
from capture.sources import Sources, refuse_repeated
from capture.store_files import read_manifest
from capture.writer import Rows, StoreWriter
from mdlm_interp.errors import StoreError


def run_capture(config: CaptureConfig, *, progress: bool = False) -> ActivationStore:
    """Run the model over the text and store what its hook points see, or go on with a store begun so.

    When it is interrupted or fails, the store stays readable up to its last commit, and the same call goes
    on from there to the same bytes. Of several ranks the last to end completes the store; the others return
    it incomplete.

    Args:
        progress: Show the forecast if something is left to do, and a bar with rows/s on stderr if that is a
            terminal.
    Raises:
        OutputExistsError: If `config.out` holds something else; it is left alone.
        ConfigError, DataError, HookError, CheckpointError: If the request does not fit the model or text, or a
            file of text changes meanwhile; what is committed stays.
        StoreError: If the disk cannot hold the store, a service does not answer, or another process is writing.
        WriteError: If the disk fails or is full while writing; what is committed stays.
    """
    place = place_of(config.out, config.endpoint)
    possible = _possible(place, config)
    request, expected = possible.request, possible.expected
    made = partial(
        begin, place, request.layout, possible.attributes, expected.rows, request.rank, request.world_size
    )
    manifest = made()
    if not manifest.complete:
        with place.lock(f"rank-{request.rank}"):
            # Another process may have committed between reading the manifest and taking the lock.
            manifest = _checked(place, made(), request.layout)
            if not manifest.complete:
                if progress and request.rank == 0:
                    sys.stderr.write(f"{place.name}: {with_time(expected, request, possible.forward)}\n")
                rows = _write(place, possible, manifest, progress)
                with place.lock("finish", wait=True):
                    finish(place, request.layout, world_size=request.world_size, rows=rows)
    if manifest.complete and has_leftovers(place):
        # A kill after the last commit leaves what only an incomplete store needs.
        with place.lock("finish", wait=True):
            clean(place)
    return open_store(config.out, endpoint=config.endpoint)


def dry_run(config: CaptureConfig) -> Forecast:
    """The forecast of a request, with the time, that `run_capture` would begin or go on with; writes nothing.

    Raises:
        MdlmError: As `run_capture`, but for what only a store's own files and locks tell.
    """
    possible = _possible(place_of(config.out, config.endpoint), config)
    if possible.expected.complete:
        return possible.expected
    return with_time(possible.expected, possible.request, possible.forward)


@dataclass(frozen=True, kw_only=True)
class _Possible:
    """A capture that model, text, place and disk allow."""

    request: Request
    expected: Forecast
    forward: Forward
    sources: Sources
    attributes: Mapping[str, Any]
    """Of the store."""


def _possible(place: Place, config: CaptureConfig) -> _Possible:
    """What is asked for; raises if anything does not allow it, and writes nothing."""
    request = prepared(config)
    forward = forward_of_request(request)
    refuse_repeated(request.config.files)
    expected = forecast(request.config, request.tokenizer, request.layout)
    whole = begun_manifest(place)
    if whole is not None:
        expected = replace(expected, present=whole.present_rows, complete=whole.complete)
    if not config.any_disk and not expected.complete:
        refuse_full_disk(place, expected)
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
    if place.exists():
        check_shards(place, begun(place, attributes, request.rank, request.world_size), request.layout)
    return _Possible(
        request=request, expected=expected, forward=forward, sources=sources, attributes=attributes
    )


def _checked(place: Place, manifest: Manifest, layout: Layout) -> Manifest:
    """What is committed, with what its end will need: rather told now than then, after hours."""
    try:
        if not manifest.complete:
            check_begun(place, manifest, layout)
    except StoreError:
        # The last of the ranks may have completed the store meanwhile, and removed what only its end needed.
        whole = begun_manifest(place)
        if whole is None or not whole.complete:
            raise
        return whole
    return manifest


def begun_manifest(place: Place) -> Manifest | None:
    """What is committed of the store already, if there is one."""
    try:
        return read_manifest(place) if place.exists() else None
    except StoreError:  # something else is there, which `begun` refuses
        return None


def _write(place: Place, possible: _Possible, manifest: Manifest, progress: bool) -> int:
    """Run and commit what this rank has not committed yet; rows of the whole store."""
    request, sources = possible.request, possible.sources
    layout = request.layout
    resume = manifest.shards[-1].resume if manifest.shards else None
    rows = 0
    with (
        _bar(request, manifest, progress) as bar,
        _writing(place, request, manifest) as writer,
        Passes(possible.forward, request.shares) as passes,
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
def _writing(place: Place, request: Request, manifest: Manifest) -> Iterator[StoreWriter]:
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


def _bar(request: Request, manifest: Manifest, progress: bool) -> Any:
    quiet = not progress or request.rank != 0 or not sys.stderr.isatty()
    return tqdm(total=manifest.planned_rows, unit="row", unit_scale=True, disable=quiet)
