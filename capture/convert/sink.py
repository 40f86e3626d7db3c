"""The file that HDF5 writes to, which takes everything: after a write that failed, HDF5 crashes at exit.

It keeps what it could not write in its caches, tries again when the process ends, and dies of it (HDF5 2.0).
So a full disk is hidden from it: the first error is kept, what comes after it is dropped, and the caller asks.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class Sink(io.RawIOBase):
    """A new file, open for reading and writing."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w+b", buffering=0)
        self._at = self._size = 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error that a write ran into.

        Raises:
            OSError: Without a file name, as of any open file.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._file.fileno(), [buffer], self._at)
        self._at += count
        return count

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        at, size = self._at, len(view)
        self._at += size
        self._size = max(self._size, self._at)
        try:
            while self._error is None and view:
                count = os.pwrite(self._file.fileno(), view, at)
                view, at = view[count:], at + count
        except OSError as error:
            self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._file.fileno(), self._size)
        except OSError as error:
            self._error = error
        return self._size
