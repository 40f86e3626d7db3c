"""The commands `mdlm-interp capture run | info | verify`; `export_command.py` has the export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from time import perf_counter
from typing import TYPE_CHECKING

from tqdm import tqdm

from capture.config import CaptureConfig
from capture.describe import described, hook_lines, strata, summary
from capture.forecast import bytes_text
from capture.reader import open_store
from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError, MdlmError, StoreError, WriteError
from mdlm_interp.program import command_line, counted

if TYPE_CHECKING:
    from capture.recomputed import Verification


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show what an activation store holds."""

    store: str
    """Directory or URL of the store."""
    endpoint: str | None = None
    """URL of an S3-compatible service, for an s3:// store; none takes AWS_ENDPOINT_URL, or Amazon's own."""
    fingerprint: bool = False
    """Whether to read every row and print the SHA-256 of all that the store holds."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every byte of a store against its checksums, and recompute some of its batches."""

    store: str
    """Directory or URL of the store."""
    endpoint: str | None = None
    """URL of an S3-compatible service, for an s3:// store; none takes AWS_ENDPOINT_URL, or Amazon's own."""
    model: str | None = None
    """Model directory, hub id or "bundled"; none takes what the store names. Its weights must be the store's."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; none takes what the store names, or the model's own if that had it."""
    batches: int = 4
    """Batches to recompute, drawn at random; 0 checks the bytes only."""
    seed: int = 0
    """Key of the draw."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed must be in [0, 2**64), got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(CaptureConfig):
    """Record activations of a model over noised text, one row a token. The same command continues a capture."""

    dry_run: bool = False
    """Only print the forecast, or why the capture is not possible; write nothing."""

    def capture(self) -> CaptureConfig:
        """What to capture."""
        return CaptureConfig(**{field.name: getattr(self, field.name) for field in fields(CaptureConfig)})


def run(argv: Sequence[str]) -> int:
    """Capture activations, or go on with a capture, and say what was written."""
    from capture.request import ranks
    from capture.run import dry_run, run_capture

    given = parse_args(
        RunConfig, argv, prog="mdlm-interp capture run", positional=("files",), config_file=True
    )
    config = given.capture()
    if given.dry_run:
        print(f"{config.out}: {dry_run(config)}")
        return 0
    there = _is_complete(config)
    start = perf_counter()
    try:
        store = run_capture(config, progress=True)
    except (KeyboardInterrupt, WriteError):
        # What is committed stays; if nothing is there to be read, the error says enough.
        with suppress(StoreError):
            print(
                f"{summary(open_store(config.out, endpoint=config.endpoint))}; the same command goes on",
                file=sys.stderr,
            )
        raise
    print(summary(store))
    print("it was complete already; nothing was written" if there else f"took {perf_counter() - start:.1f} s")
    bad = sum(shard.not_finite for shard in store.manifest.shards)
    if bad:
        are = "is" if bad == 1 else "are"
        print(f"warning: {counted(bad, 'activation')} {are} infinite or not a number", file=sys.stderr)
    if store.complete:
        endpoint = ("--endpoint", config.endpoint) if config.endpoint else ()
        print(f"next: {command_line('capture', 'info', store.name, *endpoint)}")
    else:
        rank, world_size = ranks(config)
        print(f"rank {rank} of {world_size} is done; the last one to end completes the store")
    return 0


def _is_complete(config: CaptureConfig) -> bool:
    """Whether nothing is left to do; what is wrong with the place is for the capture to tell."""
    try:
        return open_store(config.out, endpoint=config.endpoint).complete
    except MdlmError:
        return False


def info(argv: Sequence[str]) -> int:
    """Describe a store without reading its activations."""
    config = parse_args(InfoConfig, argv, prog="mdlm-interp capture info", positional=("store",))
    store = open_store(config.store, endpoint=config.endpoint)
    print(summary(store))
    for title, lines in (
        ("rows by diffusion time:", strata(store)),
        ("hooks:", hook_lines(store)),
        ("provenance:", described(store)),
    ):
        if lines:
            print(title)
        for line in lines:
            print(f"  {line}")
    if config.fingerprint:
        print(f"fingerprint {store.fingerprint()}")
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check a store; the first thing that is wrong is the error."""
    from capture.convert.exported import ExportedStore
    from capture.recomputed import recompute
    from capture.verify import needed_origin, verify_bytes

    config = parse_args(VerifyConfig, argv, prog="mdlm-interp capture verify", positional=("store",))
    store = open_store(config.store, endpoint=config.endpoint)
    origin = needed_origin(store, config.model, config.tokenizer, config.batches)
    exported = isinstance(store, ExportedStore)
    with tqdm(
        total=store.bytes_on_disk if exported else store.manifest.present_rows,
        unit="B" if exported else "row",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        files, size = verify_bytes(store, progress=bar.update)
    print(summary(store))
    what = "every byte" if store.complete else "every byte that is committed"
    print(f"{what} matches its checksum: {counted(files, 'file')}, {bytes_text(size)}")
    if exported:
        print(
            "an export is checked for its bytes only; verify the store that it was made from to recompute rows"
        )
    elif origin is not None:
        print(_told(recompute(store, origin, batches=config.batches, seed=config.seed)))
    return 0


def _told(found: Verification) -> str:
    """What recomputing found."""
    from capture.recomputed import BOUND

    if not found.batches:
        return "no whole batch is committed yet, so none was recomputed"
    how = (
        "the same bits"
        if found.bitwise
        else f"captured on another stack: the largest difference is {found.largest:.1e} of the root mean square "
        f"(at most {BOUND:g})"
    )
    return f"{counted(found.batches, 'batch', 'batches')} ({counted(found.rows, 'row')}) recomputed: {how}"
