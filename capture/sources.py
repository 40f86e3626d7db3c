"""The text files of a capture: hashed once, and watched as long as rows are made of them.

1. Each file's size, times and inode are noted, then it is hashed, before the first row.
2. Before anything is committed these are looked at again. A file in which any differs is hashed again, and
   if it has other content now, nothing more is committed: the hash would not be of what was read.

The time of the last change of the inode is among what is noted: it shows a file that was written in place
with its size and modification time restored. What was changed and changed back before a look is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.errors import ConfigError, DataError

State = tuple[int, ...]
"""Device, inode, size in bytes, and the times of modification and change in nanoseconds."""


class Sources:
    """Text files as they are now."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        # Looked at before they are hashed: what changes meanwhile is found by the next look.
        self._states = [_state(file) for file in files]
        self._hashes = [sha256_of(file) for file in files]
        self._sizes = [file.stat().st_size for file in files]

    def record(self) -> list[dict[str, Any]]:
        """Path, SHA-256 and bytes of each, as a store keeps them."""
        columns = zip(self._files, self._hashes, self._sizes, strict=True)
        return [{"file": str(file), "sha256": sha256, "bytes": size} for file, sha256, size in columns]

    def refuse_same_content(self) -> None:
        """Raise DataError if two files have the same content."""
        first: dict[str, Path] = {}
        for file, sha256 in zip(self._files, self._hashes, strict=True):
            before = first.setdefault(sha256, file)
            if before is not file:
                raise DataError(
                    f"{before} and {file} have the same content (sha256 {sha256[:16]}...), and each text is captured "
                    f"once; leave one out"
                )

    def refuse_changed(self, out: str) -> None:
        """Raise DataError if a file does not have the content any more that it was hashed with.

        Args:
            out: The store that is made of them, for the message.
        """
        for number, file in enumerate(self._files):
            try:
                state = _state(file)
                if state == self._states[number]:
                    continue
                found = sha256_of(file)
            except FileNotFoundError:
                raise DataError(f"{file} {_rule('is gone', out)}") from None
            expected = self._hashes[number]
            if found != expected:
                what = f"changed from sha256 {expected[:16]}... to {found[:16]}..."
                raise DataError(f"{file} {_rule(what, out)}")
            self._states[number] = state


def refuse_repeated(files: Sequence[Path]) -> None:
    """Raise ConfigError if a file is named twice, by whatever paths: its rows would be there twice."""
    first: dict[Path, Path] = {}
    for file in files:
        before = first.setdefault(file.resolve(), file)
        if before is not file:
            also = "" if before == file else f", also as {before}"
            raise ConfigError(f"files name {file} twice{also}; name each file once")


def _rule(what: str, out: str) -> str:
    return (
        f"{what} while {out} was made of it, so no more is committed; restore it and run this again, or choose "
        f"another --out"
    )


def _state(file: Path) -> State:
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
