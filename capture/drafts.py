"""A file of a store in the making: appended to in large aligned pieces that go past the page cache.

A capture writes far more than memory holds and reads none of it back, so copies in the page cache only cost: the
processor's time for making and for clearing them, and a long wait for the disk when a shard is committed. Written
directly, a shard is on the disk but for its last bytes when its last rows arrive. Where the file system has no direct
writes (some network and memory file systems, macOS) the same bytes go through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capture.shards import Piece, bytes_of
from mdlm_interp.atomic_files import write_errors

PARTIAL = ".partial"
"""End of the name of a file that is not published yet; no reader takes it for a chunk."""
BUFFER_BYTES = 512 * 1024
"""Of a file that are gathered before they are written; it bounds what a store of hundreds of arrays needs."""
BLOCK_BYTES = 4096
"""Direct writes begin and end at multiples of this, in memory and in the file."""
DIRECT = getattr(os, "O_DIRECT", 0)


class FileDraft:
    """A file of a `Directory` that is not published yet."""

    def __init__(self, root: Path, path: str) -> None:
        self.path = path
        self.partial = root / (path + PARTIAL)
        self._root = root
        self._direct = True
        self._written = 0
        """Bytes that are in the file."""
        self._filled = 0
        """Bytes that wait in the buffer."""
        self._buffer: NDArray[np.uint8] | None = None
        with write_errors(root):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.unlink(missing_ok=True)
            os.close(os.open(self.partial, os.O_WRONLY | os.O_CREAT, 0o666))

    def write(self, pieces: Sequence[Piece]) -> None:
        """Append the pieces."""
        if self._buffer is None:
            self._buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)  # begins at a page
        for content in [np.frombuffer(bytes_of(piece), np.uint8) for piece in pieces if len(piece)]:
            done = 0
            while done < len(content):
                take = min(len(content) - done, BUFFER_BYTES - self._filled)
                # Unlike an assignment between views of bytes this lets other threads run.
                np.copyto(self._buffer[self._filled : self._filled + take], content[done : done + take])
                self._filled += take
                done += take
                if self._filled == BUFFER_BYTES:
                    self._flush(self._buffer)

    def finish(self) -> None:
        """Hand the rest to the system; nothing is appended after this."""
        if self._buffer is not None:
            self._flush(self._buffer)
            self._buffer = None

    def _flush(self, buffer: NDArray[np.uint8]) -> None:
        whole = self._filled // BLOCK_BYTES * BLOCK_BYTES
        with write_errors(self._root):
            self._append(buffer[:whole], direct=True)
            self._append(buffer[whole : self._filled], direct=False)
        self._filled = 0

    def _append(self, content: NDArray[np.uint8], *, direct: bool) -> None:
        done = 0
        while done < len(content):
            flags = DIRECT if direct and self._direct else 0
            try:
                # Opened each time: a store of every hook point has more files than a process may hold open.
                descriptor = os.open(self.partial, os.O_WRONLY | flags)
                try:
                    written = os.pwrite(descriptor, content[done:].data, self._written)
                finally:
                    os.close(descriptor)
            except OSError as error:
                if not flags or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._direct = False  # of this file system, or where a write that was cut short ended
                continue
            done += written
            self._written += written
