"""Files and directories that are there whole or not at all, and one line for a disk that refuses them.

1. What is written goes to a temporary sibling, `.partial-NAME`, which no reader takes for the finished thing.
2. When the caller is done it is fsynced, renamed to its name, and the directory that holds it is fsynced.
3. If anything fails before that, the sibling is removed and what stood under the name is as it was. A
   process that is killed leaves the sibling, and the next attempt starts it anew, whether it was a file or
   a directory.

A full, read-only or failing disk becomes a WriteError, whichever library met it: Python's OSError, or the
exceptions of libraries written in Rust (safetensors, tokenizers), which name the error in their text.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdlm_interp.errors import OutputExistsError, WriteError

PREFIX = ".partial-"
"""Start of the temporary sibling's name; the rest is the final name, so that it keeps its suffix."""

_NO_ROOM = "free some space or choose another directory, then run this again"
_NOT_ALLOWED = "choose a directory that you may write to"
DISK_REMEDIES = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: "the file system or `ulimit -f` caps the size of a file; choose another directory",
    errno.EIO: "the disk is failing or gone; choose another one, then run this again",
    errno.EROFS: _NOT_ALLOWED,
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
}
"""What to do about the errors that come from the disk, not from us."""

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file so that its name has the old content or the whole new one, never a part of it.

    Yields the temporary path to write to; missing parent directories are made. The file is as readable as
    any that this user makes, also where a library makes its files private.

    Raises:
        WriteError: If the disk is full, read-only or failing. Other exceptions pass unchanged.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "report.json"
    >>> with replacing(target) as partial:
    ...     _ = partial.write_text("{}")
    >>> [file.name for file in target.parent.iterdir()]
    ['report.json']
    """
    path = Path(path)
    partial = path.with_name(PREFIX + path.name)
    with write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                _remove(partial)


@contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory that gets its name only when all of it is on disk.

    Yields the temporary directory to fill, made and empty; missing parent directories are made.

    Raises:
        OutputExistsError: At once, if the path exists and is not an empty directory, or is the working one.
        WriteError: If the disk is full, read-only or failing. Other exceptions pass unchanged.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "model"
    >>> with replacing_directory(target) as partial:
    ...     _ = (partial / "config.json").write_text("{}")
    ...     target.exists()
    False
    >>> [file.name for file in target.iterdir()]
    ['config.json']
    """
    path = Path(path)
    if path.name in ("", ".."):  # no sibling can be named after these
        path = path.resolve()
    refuse_existing(path)
    partial = path.with_name(PREFIX + path.name)
    with write_errors(path):
        try:
            _remove(partial)
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                _remove(partial)


def refuse_existing(path: Path) -> None:
    """Raise OutputExistsError unless a directory can take this path without replacing anything."""
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            what = "is not empty"
        elif path.samefile(Path.cwd()):
            what = "is the working directory, which cannot be replaced"
        else:
            return
    elif path.exists() or path.is_symlink():
        what = "is a file or a link"
    else:
        return
    raise OutputExistsError(f"{path} exists and {what}; choose another path or remove it first")


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Tell in one line why a path cannot be written, for what is appended or written in place.

    Raises:
        WriteError: Instead of a disk's error, or of an OSError about this path or its neighbours. An error
            about some other file, which is read meanwhile, passes unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error, Path(path))
        if number is None:
            raise
        remedy = DISK_REMEDIES.get(number, "choose another path")
        # What is written into a directory that is not whole yet is known to the user by its later path.
        final = Path(*(part.removeprefix(PREFIX) for part in Path(path).parts))
        raise WriteError(f"{final} cannot be written: {os.strerror(number)}; {remedy}") from error


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """`sync` for everything below a directory and the directory itself."""
    for top, _, files in os.walk(root):
        for name in [*files, ""]:
            sync(Path(top, name))


def _remove(partial: Path) -> None:
    """Remove what is at a path: a file, a directory with all in it, or a link but not what it leads to."""
    if partial.is_symlink() or not partial.is_dir():
        partial.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(partial)
    except OSError as error:
        # It may name an entry without its directory, which would be taken for some other file.
        raise OSError(error.errno, error.strerror, str(partial)) from error


def _disk_error(error: Exception, path: Path) -> int | None:
    """The errno of a failure to write the path; None if the error is about something else."""
    if isinstance(error, OSError):
        if error.filename is None:  # a write to an open file, which does not say to which
            return error.errno if error.errno in DISK_REMEDIES else None
        return error.errno if _concerns(error.filename, path) else None
    found = _RUST_ERROR.search(str(error))
    return int(found[1]) if found and int(found[1]) in DISK_REMEDIES else None


def _concerns(filename: object, path: Path) -> bool:
    """Whether a file is the path, its temporary sibling, in it, or a directory above it."""
    if not isinstance(filename, str | bytes | os.PathLike):  # an open file's number
        return True
    failed, wanted = (Path(os.path.abspath(os.fsdecode(name))) for name in (filename, path))
    partial = wanted.with_name(PREFIX + wanted.name)
    return failed in wanted.parents or any(whole in (failed, *failed.parents) for whole in (wanted, partial))
