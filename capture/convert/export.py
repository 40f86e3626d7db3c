"""Exports a store, a piece at a time, to a file or directory that is there whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from tqdm import tqdm

from capture.convert.crosslayer import check_type, layer_hooks, write_crosslayer
from capture.convert.hdf5 import h5py_module, write_hdf5
from capture.convert.safetensors_files import write_safetensors
from capture.convert.selection import Selection, select
from capture.forecast import bytes_text
from capture.places import Directory
from capture.reader import ActivationStore, open_store
from capture.schema import StoredType
from mdlm_interp.atomic_files import refuse_existing, replacing, replacing_directory
from mdlm_interp.errors import ConfigError, OutputExistsError, StoreError, nearest

Target: TypeAlias = Literal["hdf5", "safetensors", "crosslayer-coding"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was exported."""

    path: Path
    rows: int
    sequences: int
    hooks: tuple[str, ...]
    dtype: StoredType
    size: int
    """Bytes of all its files."""


def export_store(
    store: ActivationStore | str | Path,
    out: str | Path,
    *,
    to: Target,
    hooks: Sequence[str] | None = None,
    rows: slice | None = None,
    max_rows: int | None = None,
    dtype: StoredType | None = None,
    incomplete: bool = False,
    progress: bool = False,
) -> Export:
    """Write rows of a store in another format; what `open_store` reads again, but for crosslayer-coding.

    Args:
        store: A store or an export, or where one is.
        out: The file (hdf5) or directory to make; nothing may be there.
        hooks: Names or globs; none takes all, or those that crosslayer-coding knows.
        rows: Only whole sequences in these rows; none takes all.
        max_rows: Only as many whole sequences as have at most this many rows.
        dtype: Type of the activations; none takes the store's.
        incomplete: Export what is committed of a store whose capture did not run to its end.
        progress: Show a bar on stderr if that is a terminal.
    Raises:
        OutputExistsError: If something is at `out`; it is left alone.
        StoreError: If the store is incomplete, damaged, or has not what is asked for, or the disk is too small.
        HookError: If a pattern matches no hook.
        ConfigError: If h5py is missing, or the target does not know the type.
        WriteError: If the disk fails or is full; nothing is left at `out`.
    """
    if to not in get_args(Target):
        raise ConfigError(f"to must name a format, got {to!r}{nearest(to, get_args(Target))}")
    store = store if isinstance(store, ActivationStore) else open_store(store)
    out = Path(_local(out))
    _refuse(out, store, to)
    if to != "safetensors":
        h5py_module()
    if to == "crosslayer-coding":
        check_type(dtype or store.dtype)
        hooks = layer_hooks(store, hooks)
    selection = select(store, hooks=hooks, rows=rows, max_rows=max_rows, dtype=dtype, incomplete=incomplete)
    _refuse_full_disk(out, selection)
    size = selection.acts_size if to == "crosslayer-coding" else selection.size
    with _bar(size, progress) as advance:
        _write(selection, out, to, advance)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return Export(
        path=out,
        rows=selection.n_rows,
        sequences=selection.n_sequences,
        hooks=selection.hooks,
        dtype=selection.dtype,
        size=sum(path.stat().st_size for path in files),
    )


def _write(selection: Selection, out: Path, to: Target, advance: Callable[[int], object]) -> None:
    if to == "hdf5":
        with replacing(out) as partial:
            write_hdf5(selection, partial, advance)
        return
    fill = write_safetensors if to == "safetensors" else write_crosslayer
    with replacing_directory(out) as partial:
        fill(selection, partial, advance)


def _local(out: str | Path) -> str:
    if "://" in str(out):
        raise ConfigError(f"{out}: an export is written to a local path; copy it from there")
    return str(out)


def _refuse(out: Path, store: ActivationStore, to: Target) -> None:
    """Find out before any work that nothing can be written there."""
    if "://" not in store.name and out.resolve().is_relative_to(Path(store.name).resolve()):
        raise OutputExistsError(f"{out} lies in the store itself; choose another path")
    if to != "hdf5":
        refuse_existing(out)
    elif out.is_dir():
        raise OutputExistsError(f"{out} is a directory; name the HDF5 file to make, such as {out / 'run.h5'}")
    elif out.exists() or out.is_symlink():
        raise OutputExistsError(f"{out} exists; choose another path or remove it first")


def _refuse_full_disk(out: Path, selection: Selection) -> None:
    free = Directory(out).free_bytes()
    if free is not None and selection.size > free:
        raise StoreError(
            f"{out} needs {bytes_text(selection.size)} and its disk has {bytes_text(free)} free; export fewer "
            f"--hooks or --max-rows, a shorter --dtype, or choose another --out"
        )


@contextmanager
def _bar(size: int, progress: bool) -> Iterator[Callable[[int], object]]:
    quiet = not progress or not sys.stderr.isatty()
    with tqdm(total=size, unit="B", unit_scale=True, disable=quiet) as bar:
        yield bar.update
