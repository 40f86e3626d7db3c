"""A program in a terminal of its own: what it writes, the keys it gets, and the state it leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
TAKE = (
    # Ctrl-C is ignored by what a shell without job control starts in the background, and by its children.
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); os.login_tty(0)"
)
COMMAND = "from mdlm_interp.__main__ import main; sys.exit(main(sys.argv[1:]))"
OPEN, CLOSE, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"
"""Enter and leave the second screen; show the cursor."""

STYLE = re.compile(r"\x1b\[[\d;]*m")


class Terminal:
    """Runs Python statements with a pseudo-terminal as controlling terminal, standard streams and all."""

    def __init__(self, statements: str, *arguments: object, rows: int = 24, columns: int = 90) -> None:
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._before = termios.tcgetattr(self._theirs)
        self.output = ""
        unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{TAKE}; {statements}", *map(str, arguments)],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            cwd=ROOT,
            env=environment | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def wait_for(self, pattern: str, timeout_s: float = 60) -> None:
        """Read until something new matches, styles apart."""
        start, end = len(self.output), time.monotonic() + timeout_s
        while not re.search(pattern, STYLE.sub("", self.output[start:]), re.DOTALL):
            if time.monotonic() > end or (not self._read() and self.process.poll() is not None):
                raise AssertionError(f"no {pattern!r} in {STYLE.sub('', self.output[start:])!r}")

    def press(self, keys: str) -> None:
        """Type keys."""
        os.write(self._ours, keys.encode())

    def is_silent(self, seconds: float) -> bool:
        """Whether, after what is on its way, nothing is written for a time."""
        while self._read():
            pass
        return not select.select([self._ours], [], [], seconds)[0]

    def finish(self, timeout_s: float = 60) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self._read()
            if time.monotonic() > end:
                raise AssertionError(f"still running after {self.output[-500:]!r}")
        while self._read():
            pass
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Whether the terminal's settings are those from before the program."""
        return termios.tcgetattr(self._theirs) == self._before

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 0.1)[0]:
            return False
        self.output += os.read(self._ours, 65536).decode("utf-8", "replace")
        return True
