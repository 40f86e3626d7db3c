"""One frame for a terminal: as styled text with a header, or as a plain line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mdlm_interp.viewer.film import Frame, State
from mdlm_interp.viewer.text import Decoder, visible

# Each differs from the others by more than its colour, for terminals and eyes without.
STYLES = {
    State.GIVEN: "underline bright_blue",
    State.MASK: "dim",
    State.NEW: "bold black on yellow",
    State.SETTLED: "",
    State.TAKEN_BACK: "bold reverse red",
}
NAMES = {
    State.GIVEN: "given",
    State.MASK: "mask",
    State.NEW: "new",
    State.SETTLED: "settled",
    State.TAKEN_BACK: "taken back",
}
MASK, PLAIN_MASK = "░░░", "___"
HIDDEN = (State.MASK, State.TAKEN_BACK)
HEADER_LINES = 4
HELP = "space pause · ← → step · + - speed · ↑ ↓ sequence · home end · q quit"


def styled(frame: Frame, tokenizer: Decoder, mask: str = MASK) -> Text:
    """The text of a frame, each position in the style of its state."""
    text = Text()
    pairs = list(zip(frame.states, frame.tokens, strict=True))
    # Neighbours in the same state are decoded together: a character can be several tokens.
    for state, group in groupby(pairs, key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        if state not in HIDDEN:
            text.append(visible(tokenizer.decode(tokens)), STYLES[state])
            continue
        for _ in tokens:
            text.append(" ")
            text.append(mask, STYLES[state])
    return text


def plain_line(frame: Frame, tokenizer: Decoder) -> str:
    """A frame in one line: new text in [brackets], masks as ___, newlines as backslash n."""
    parts = []
    pairs = list(zip(frame.states, frame.tokens, strict=True))
    for state, group in groupby(pairs, key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        if state in HIDDEN:
            parts.append(f" {PLAIN_MASK}" * len(tokens))
        else:
            text = visible(tokenizer.decode(tokens))
            parts.append(f"[{text}]" if state is State.NEW else text)
    return f"{described(frame)} | {''.join(parts)}".replace("\n", "\\n")


def described(frame: Frame) -> str:
    """Where a frame is, in figures."""
    total = f"/{frame.n_steps}" if frame.n_steps is not None else ""
    t = f"  t {frame.t:.3f}" if frame.t is not None else ""
    taken = frame.count(State.TAKEN_BACK)
    back = f"  {taken} taken back" if taken else ""
    return f"step {frame.number}{total}{t}  {frame.count(*HIDDEN)} masked  {frame.count(State.NEW)} new{back}"


class Picture:
    """A frame as it fills a terminal: figures, progress, legend, text, and a last line."""

    def __init__(self, frame: Frame, tokenizer: Decoder, note: str = "", footer: str = "") -> None:
        self._frame, self._tokenizer = frame, tokenizer
        self._note, self._footer = note, footer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        frame = self._frame
        mask = PLAIN_MASK if options.ascii_only else MASK
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        head.add_row(Text(described(frame)), Text(self._note, "bold"))
        bar = Table.grid(expand=True)  # which ends the bar's line, as the bar itself does not
        total = frame.n_steps or max(frame.number, 1)
        bar.add_row(
            ProgressBar(total, frame.number, complete_style="bright_blue", finished_style="bright_blue")
        )
        legend = Text(no_wrap=True, overflow="ellipsis")
        for state, name in NAMES.items():
            legend.append(mask if state in HIDDEN else name, STYLES[state])
            legend.append(f" {name}  " if state in HIDDEN else "  ")
        height = max(options.size.height - HEADER_LINES - bool(self._footer) - 1, 1)
        body = around_the_newest(styled(frame, self._tokenizer, mask), console, options.max_width, height)
        footer = Text(self._footer, "dim", no_wrap=True, overflow="ellipsis")
        yield Group(head, bar, legend, "", body, *([footer] if self._footer else []))


def around_the_newest(text: Text, console: Console, width: int, height: int) -> Text:
    """As many lines as there is room for, with the first new one in their middle if not all fit."""
    lines = text.wrap(console, width)
    if len(lines) > height:
        wanted = STYLES[State.NEW]
        new = [number for number, line in enumerate(lines) if any(s.style == wanted for s in line.spans)]
        first = max(min((new or [0])[0] - height // 2, len(lines) - height), 0)
        return Text("\n").join(lines[first : first + height])
    return Text("\n").join(lines)
