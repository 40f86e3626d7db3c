"""Single key presses from a terminal, which is as it was afterwards."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import IO, Any

SEQUENCES = {
    "[A": "up",
    "[B": "down",
    "[C": "right",
    "[D": "left",
    "[F": "end",
    "[H": "home",
    "OA": "up",
    "OB": "down",
    "OC": "right",
    "OD": "left",
    "OF": "end",
    "OH": "home",
    "[1~": "home",
    "[4~": "end",
}
"""What terminals send after Escape for the keys that are no characters."""

ESCAPE = "\x1b"
ESCAPE_S = 0.05
"""How long the rest of such a sequence may take; a lone Escape has none."""


class Keys:
    """Context manager: while it is entered, keys come one by one and unechoed. Ctrl-C still interrupts.

    Where standard input is no terminal, or another program has it (this one runs in the background), there
    are no keys and `get` only waits.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdin if stream is None else stream
        self._before: list[Any] | None = None
        self._descriptor = -1
        self._pending = ""

    @property
    def available(self) -> bool:
        """Whether keys can come."""
        return self._before is not None

    def __enter__(self) -> Keys:
        try:
            import termios
        except ImportError:  # not a POSIX system
            return self
        try:
            descriptor = self._stream.fileno()
            # Changing the settings of a terminal that another process group has would stop this one.
            if not os.isatty(descriptor) or os.tcgetpgrp(descriptor) != os.getpgrp():
                return self
        except (OSError, ValueError):  # closed, or not a file
            return self
        self._descriptor, self._before = descriptor, termios.tcgetattr(descriptor)
        changed = termios.tcgetattr(descriptor)
        changed[3] &= ~(termios.ICANON | termios.ECHO)  # by character, and silent; signals stay
        termios.tcsetattr(descriptor, termios.TCSANOW, changed)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            import termios

            # What was typed and not used is dropped: the shell shall not run it.
            termios.tcsetattr(self._descriptor, termios.TCSAFLUSH, self._before)
            self._before = None

    def get(self, timeout_s: float) -> str | None:
        """The next key: its character, or a name ("left", "home", ...), or None if none comes in time.

        At the end of input, when the terminal is gone, it is "hangup".
        """
        if not self.available:
            time.sleep(timeout_s)
            return None
        if not self._pending and not self._read(timeout_s):
            return None
        if not self._pending:
            return "hangup"
        if self._pending[0] != ESCAPE:
            return self._take(1)
        for length in (3, 4):
            while len(self._pending) < length:
                before = len(self._pending)
                if not self._read(ESCAPE_S) or len(self._pending) == before:
                    break
            name = SEQUENCES.get(self._pending[1:length])
            if name is not None:
                self._take(length)
                return name
            if self._pending[1:3] not in ("[1", "[4"):
                break
        self._pending = ""  # Escape itself, or a key that has no name here
        return "escape"

    def _take(self, count: int) -> str:
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    def _read(self, timeout_s: float) -> bool:
        """Add what was typed to what is pending; False if nothing was in time, True also at the end of input."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        try:
            read = os.read(self._descriptor, 64)
        except OSError:  # the terminal is gone
            read = b""
        self._pending += read.decode("utf-8", "replace")
        return True
