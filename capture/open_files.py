"""Files kept open for reading: a bounded number, safe to read from several threads and forked processes."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.errors import StoreError

REMEDY = "restore it from a copy or capture again"
FULL_REMEDIES = {
    errno.EMFILE: "raise `ulimit -n`, or close other stores",
    errno.ENFILE: "close other stores or programs: the whole system has too many open",
}
"""What to do where the error says nothing of the file itself."""
ADVICE_BYTES = 128 * 1024
"""What the kernel surely fetches for one request; of a longer one it may drop the rest."""
MOST_FILES = 4096
NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""Linux: a read fails rather than wait for the disk."""


@dataclass
class FileState:
    """What is known of a file's content, for as long as it is the same file."""

    identity: tuple[int, ...]
    """Device, inode, size and time of change."""
    offsets: NDArray[np.int64]
    """Where each chunk begins; -1 if it was never written."""
    checked: bytearray = field(repr=False)
    """By chunk: whether its checksum was found right."""


def remedy_for(error: OSError) -> str:
    """What to do about a file of a store that cannot be opened or read."""
    return FULL_REMEDIES.get(error.errno or 0, REMEDY)


class OpenFile:
    """A file open for reading; closed when nobody uses it any more, so that no thread's read loses it."""

    __slots__ = ("_descriptor", "path", "state")

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; {REMEDY}") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be opened ({error.strerror}); {remedy_for(error)}") from None
        self.state: FileState

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # The module may be gone already when the interpreter ends.
        if self._descriptor >= 0:
            close(self._descriptor)

    def identity(self) -> tuple[int, ...]:
        """Device, inode, size and time of change."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, buffers: Sequence[Any], offset: int, size: int) -> None:
        """Fill contiguous buffers of this many bytes in all.

        Raises:
            StoreError: If the disk fails, or the file ends before.
        """
        try:
            if os.preadv(self._descriptor, buffers, offset) != size:
                self._read_in_parts(buffers, offset, size)
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path} cannot be read ({error.strerror}); {REMEDY}")

    def _read_in_parts(self, buffers: Sequence[Any], offset: int, size: int) -> None:
        # A signal may cut a read short, and so does the end of the file.
        content = bytearray(size)
        view = memoryview(content)
        done = 0
        while done < size:
            got = os.preadv(self._descriptor, [view[done:]], offset + done)
            if got == 0:
                raise StoreError(f"{self.path} is damaged (it is too short: was it truncated?); {REMEDY}")
            done += got
        for buffer in buffers:
            target = np.frombuffer(buffer, np.uint8).data
            target[:], view = view[: len(target)], view[len(target) :]

    def read_pieces(self, view: memoryview, pieces: Iterable[tuple[int, int, int]]) -> None:
        """Fill parts of a buffer: (offset in the file, first byte in the buffer, size) each."""
        read, descriptor = os.preadv, self._descriptor
        try:
            for offset, start, size in pieces:
                part = view[start : start + size]
                if read(descriptor, [part], offset) != size:
                    self._read_in_parts([part], offset, size)
        except OSError as error:
            raise self._unreadable(error) from None

    def in_memory(self, offset: int) -> bool:
        """Whether a byte can surely be read without waiting for the disk."""
        try:
            return bool(NO_WAIT) and os.preadv(self._descriptor, [bytearray(1)], offset, NO_WAIT) == 1
        except OSError:
            return False

    def advise(self, offset: int, size: int) -> None:
        """Ask the kernel to begin fetching these bytes."""
        if not hasattr(os, "posix_fadvise"):
            return  # macOS: reads are right all the same, one after another
        for start in range(offset, offset + size, ADVICE_BYTES):
            length = min(ADVICE_BYTES, offset + size - start)
            with suppress(OSError):  # of a file system that takes no advice
                os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)


class FileCache:
    """The files used last, of all arrays of a store, kept open.

    Args:
        limit: How many; none takes a quarter of what the process may have open.
    """

    def __init__(self, limit: int | None = None) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        quarter = MOST_FILES if allowed == resource.RLIM_INFINITY else max(allowed // 4, 16)
        self.limit = min(quarter, MOST_FILES) if limit is None else limit
        # By last use. Each operation of a dict is atomic, also while the file that it drops is being closed (an
        # OrderedDict's are not); between two of them another thread may come, and then a file is opened once more.
        self._files: dict[str, OpenFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: str) -> OpenFile | None:
        """The file, if it is open."""
        file = self._files.pop(path, None)
        if file is not None:
            self._files[path] = file
        return file

    def add(self, file: OpenFile) -> None:
        """Keep a file open; drops the one that was not used for longest."""
        self._files[file.path] = file
        while len(self._files) > self.limit:
            try:
                oldest = next(iter(self._files))
            except (StopIteration, RuntimeError):  # another thread came between
                continue
            self._files.pop(oldest, None)
