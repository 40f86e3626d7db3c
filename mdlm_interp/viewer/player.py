"""Showing a film in the terminal, of a run under way or a finished one, as the viewer's keys say.

In a terminal the picture has a screen of its own, which is taken away afterwards, also after Ctrl-C or an error.
Where the output is none, each frame is a line and there are no keys and no waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mdlm_interp.decoding.trajectory import Seen, Trajectory
from mdlm_interp.errors import ConfigError
from mdlm_interp.viewer.film import Film
from mdlm_interp.viewer.keys import Keys
from mdlm_interp.viewer.terminal import HELP, Picture, plain_line, styled
from mdlm_interp.viewer.text import Decoder

MIN_SPEED, MAX_SPEED = 0.25, 64.0
"""Steps in a second that the keys can reach."""
POLL_S = 0.25
"""How often a waiting player looks whether the window has another size."""


@contextmanager
def live_view(
    tokenizer: Decoder, *, speed: float = 8.0, console: Console | None = None
) -> Iterator[Callable[[Seen], None]]:
    """Show a run while it goes on; `sample(..., watch=...)` takes what this yields.

    The key q takes the view away and lets the run go on; Ctrl-C ends both.

    Args:
        tokenizer: Of the model that writes.
        speed: Steps in a second at most, for the view to be followed.
        console: Where to show it; standard output if none.
    """
    with Player(Film(tokenizer.mask_id), tokenizer, speed=speed, console=console) as player:
        yield player.watch


def replay(
    trajectory: Trajectory,
    tokenizer: Decoder,
    *,
    speed: float = 4.0,
    row: int = 0,
    console: Console | None = None,
) -> None:
    """Show a finished trajectory; with keys it waits at the end, and q leaves.

    Args:
        tokenizer: Of the model that wrote it.
        speed: Steps in a second.
        row: Sequence of the batch that is shown first.
        console: Where to show it; standard output if none.
    """
    with Player(Film.of(trajectory), tokenizer, speed=speed, row=row, console=console) as player:
        player.play_all()
    player.leave_behind()


class Player:
    """Which frame is shown, for how long, and what the keys do; a context manager that owns the screen."""

    def __init__(
        self, film: Film, tokenizer: Decoder, *, speed: float, row: int = 0, console: Console | None = None
    ) -> None:
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise ConfigError(
                f"speed must be in [{MIN_SPEED:g}, {MAX_SPEED:g}] steps a second, got {speed:g}"
            )
        self._film, self._tokenizer, self._speed, self._row = film, tokenizer, speed, row
        self._console = console if console is not None else Console(soft_wrap=False)
        # Asked of the file too: FORCE_COLOR makes rich take a pipe for a terminal.
        self._screen = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._at, self._paused, self._closed = 0, False, False
        self._whole = False
        self._live: Live | None = None
        self._keys = Keys()
        self._stack = ExitStack()

    def __enter__(self) -> Player:
        with ExitStack() as stack:
            if self._screen:
                stack.enter_context(self._keys)
                self._live = stack.enter_context(Live(console=self._console, auto_refresh=False, screen=True))
            self._stack = stack.pop_all()  # only now, so that a failure above undoes what was entered
        return self

    def __exit__(self, *exception: object) -> None:
        self._live = None
        self._stack.close()

    def watch(self, seen: Seen) -> None:
        """Take the next step of a run, show it, and return when the one after is wanted."""
        is_first = self._film.last < 0
        self._film.add(seen)
        if self._closed:
            return
        if is_first:
            self._show(0)
        if not is_first or not self._screen:  # on the screen the start has its time too
            self._show(self._film.last)
        self._wait()

    def play_all(self) -> None:
        """Show a whole film from its start."""
        self._whole = True
        self._show(0)
        if not self._screen:
            for number in range(1, self._film.last + 1):
                self._show(number)
            return
        self._wait()
        while self._keys.available and not self._closed:
            self._paused = True
            self._show(self._at)
            self._wait()

    def leave_behind(self) -> None:
        """Print the text that was last seen, for the screen of its own is gone."""
        if self._screen:
            self._console.print(styled(self._film.frame(self._at, self._row), self._tokenizer))

    def _wait(self) -> None:
        """Play and obey until the newest frame has had its time, or its step key, or the view is closed."""
        if not self._screen:
            return
        due, size = time.monotonic() + 1 / self._speed, self._console.size
        while not self._closed:
            left = due - time.monotonic()
            key = self._keys.get(POLL_S if self._paused else min(max(left, 0.0), POLL_S))
            if self._console.size != size:
                size = self._console.size
                self._show(self._at)
            if key is not None:
                if self._press(key):
                    return
                due = time.monotonic() + 1 / self._speed
            elif not self._paused and time.monotonic() >= due:
                if self._at == self._film.last:
                    return
                self._show(self._at + 1)
                due = time.monotonic() + 1 / self._speed

    def _press(self, key: str) -> bool:
        """Obey a key; True if the step after the newest is wanted."""
        at_end = self._at == self._film.last
        if key in ("q", "hangup"):
            self._close()
        elif key == " ":
            self._paused = not self._paused
            if self._whole and at_end and not self._paused:
                self._at = 0
        elif key in ("right", "n"):
            self._paused = True
            if at_end:
                return True
            self._at += 1
        elif key in ("left", "b"):
            self._paused, self._at = True, max(self._at - 1, 0)
        elif key in ("home", "r"):
            self._at = 0
        elif key in ("end", "e"):
            self._at = self._film.last
        elif key in ("+", "=", "-"):
            factor = 0.5 if key == "-" else 2.0
            self._speed = min(max(self._speed * factor, MIN_SPEED), MAX_SPEED)
        elif key in ("up", "down"):
            self._row = (self._row + (1 if key == "down" else -1)) % self._film.batch
        if not self._closed:
            self._show(self._at)
        return False

    def _close(self) -> None:
        self._closed = True
        self._live = None
        self._stack.close()

    def _show(self, number: int) -> None:
        self._at = number
        frame = self._film.frame(number, self._row)
        if self._live is None:
            self._console.print(Text(plain_line(frame, self._tokenizer)), soft_wrap=True)
            return
        state = "paused" if self._paused else f"{self._speed:g} steps/s"
        which = f"sequence {self._row + 1} of {self._film.batch}  " if self._film.batch > 1 else ""
        footer = HELP if self._keys.available else ""
        self._live.update(Picture(frame, self._tokenizer, which + state, footer), refresh=True)
