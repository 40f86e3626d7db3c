"""The command `mdlm-interp capture export`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from capture.convert.export import Target, export_store
from capture.forecast import bytes_text
from capture.reader import open_store
from capture.schema import StoredType
from mdlm_interp.config_args import parse_args
from mdlm_interp.errors import ConfigError
from mdlm_interp.program import command_line, counted


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a store in another format; HDF5 and safetensors exports are read again like stores."""

    store: str
    """Directory or URL of the store, or an export."""
    endpoint: str | None = None
    """URL of an S3-compatible service, for an s3:// store; none takes AWS_ENDPOINT_URL, or Amazon's own."""
    to: Target
    """One HDF5 file, a directory of safetensors files, or the layout that crosslayer-coding trains from."""
    out: Path
    """The file (hdf5) or directory to make; nothing may be there."""
    hooks: tuple[str, ...] | None = None
    """Names or globs of hook points; none takes all, or those that crosslayer-coding knows."""
    rows: str | None = None
    """Only whole sequences in these rows, as START:STOP, START: or :STOP; none takes all."""
    max_rows: int | None = None
    """Only as many whole sequences as have at most this many rows."""
    dtype: StoredType | None = None
    """Type of the activations; none takes the store's."""
    incomplete: bool = False
    """Export what is committed of a store whose capture did not run to its end."""

    def __post_init__(self) -> None:
        self.span()

    def span(self) -> slice | None:
        """The rows as a slice."""
        if self.rows is None:
            return None
        match = re.fullmatch(r"(\d*):(\d*)", self.rows)
        if match is None:
            raise ConfigError(f"rows must be START:STOP, such as 0:10000, got {self.rows!r}")
        return slice(*(int(end) if end else None for end in match.groups()))


def export(argv: Sequence[str]) -> int:
    """Export a store and say how to go on."""
    config = parse_args(ExportConfig, argv, prog="mdlm-interp capture export", positional=("store",))
    start = perf_counter()
    made = export_store(
        open_store(config.store, endpoint=config.endpoint),
        config.out,
        to=config.to,
        hooks=config.hooks,
        rows=config.span(),
        max_rows=config.max_rows,
        dtype=config.dtype,
        incomplete=config.incomplete,
        progress=True,
    )
    seconds = perf_counter() - start
    print(
        f"{made.path}: {counted(made.rows, 'row')} of {counted(made.sequences, 'sequence')}, "
        f"{counted(len(made.hooks), 'hook')}, {made.dtype}, {bytes_text(made.size)}"
    )
    print(f"took {seconds:.1f} s ({bytes_text(made.size / seconds)}/s)")
    if config.to == "crosslayer-coding":
        print(f"next: crosslayer-coding's LocalActivationStore({str(made.path)!r}, dtype={made.dtype!r})")
    else:
        print(f"next: {command_line('capture', 'info', made.path)}")
    return 0
