"""One training run a directory: a lock that other processes see, and that dies with its holder.

It is the operating system's lock on a file, as a capture has on its store: however a process ends, it is free then.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mdlm_interp.atomic_files import write_errors
from mdlm_interp.errors import CheckpointError

LOCK = "train.lock"
"""File in the directory; removed when the run ends, and of no meaning if it was left there."""


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Be the only one that trains in a directory, which is made; removed again if nothing came into it.

    Raises:
        CheckpointError: If another process does.
        WriteError: If the directory cannot be written to.
    """
    lock = out / LOCK
    with write_errors(out):
        descriptor = _locked(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # something is in it
            out.rmdir()


def _locked(lock: Path) -> int:
    """The descriptor of the lock's file, locked."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last holder has just removed the directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"{lock.parent} is being trained in by another process; wait for it, stop it, or choose another out "
                f"directory"
            ) from None
        with suppress(FileNotFoundError):
            # Its last holder may have removed it after it was opened here; then it keeps nobody out.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)
