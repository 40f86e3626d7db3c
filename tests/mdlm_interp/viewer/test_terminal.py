"""One frame as styled text and as a line."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.text import Text

from mdlm_interp.viewer import Film, State
from mdlm_interp.viewer.terminal import STYLES, Picture, around_the_newest, plain_line, styled
from tests.mdlm_interp.viewer.vocabulary import HALF, MASK, ONE, OTHER_HALF, RULER, STORY, WORDS, written


def lines_of(states: list[list[int]]) -> list[str]:
    film = Film.of(written(states))
    return [plain_line(film.frame(number), WORDS) for number in range(film.last + 1)]


def test_a_line_says_where_the_run_is_and_brackets_what_is_new():
    assert lines_of(STORY) == [
        "step 0/4  4 masked  0 new | One day ___ ___ ___ ___",
        "step 1/4  t 1.000  3 masked  1 new | One day[,] ___ ___ ___",
        "step 2/4  t 0.750  1 masked  2 new | One day,[ Tim] ___[\ufffd]",
        "step 3/4  t 0.500  1 masked  1 new  1 taken back | One day ___ Tim[my]\ufffd",
        "step 4/4  t 0.250  0 masked  2 new | One day[\\n] Timmy[\ufffd]",
    ]


def test_halves_of_a_character_that_came_together_are_one():
    assert lines_of([[ONE, MASK, MASK], [ONE, HALF, OTHER_HALF]])[1].endswith("One[é]")


def test_every_state_has_its_own_style_that_colour_is_not_all_of():
    assert len(set(STYLES.values())) == len(STYLES) == len(State)
    text = styled(Film.of(written(STORY)).frame(3), WORDS)
    found = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert found == {
        "One day": STYLES[State.GIVEN],
        "░░░": STYLES[State.TAKEN_BACK],
        "my": STYLES[State.NEW],
    }
    colours = {"bright_blue", "yellow", "red", "black", "on"}
    attributes = [frozenset(style.split()) - colours for style in STYLES.values()]
    assert len(set(attributes)) == len(State)


def draw(states: list[list[int]], number: int, width: int = 60, height: int = 12) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=height, color_system="truecolor")
    console.print(Picture(Film.of(written(states)).frame(number), WORDS, footer="keys"))
    return output.getvalue()


def test_text_cannot_steer_the_terminal():
    """The only escape sequences are those that begin and end a style."""
    shown = draw([[MASK], [RULER]], 1)
    assert "r<U+202E>␛[2Jx" in shown
    assert "\x1b[" in shown
    assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", shown)


def test_a_picture_has_figures_progress_a_legend_the_text_and_the_keys():
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", draw(STORY, 2)).splitlines()]
    assert lines[0].startswith("step 2/4  t 0.750  1 masked  2 new")
    assert set(lines[1]) <= set("━╸╺")
    assert lines[2] == "given  ░░░ mask  new  settled  ░░░ taken back"
    assert lines[3:] == ["", "One day, Tim ░░░\ufffd", "keys"]


def test_a_picture_fits_the_window_and_keeps_the_newest_in_sight():
    length = 400
    before = [ONE] * length
    before[300] = MASK
    after = [ONE] * length
    after[300] = RULER
    shown = draw([before, after], 1, width=40, height=12)
    assert len(shown.splitlines()) <= 12
    assert "2Jx" in shown


def test_the_window_reaches_both_ends():
    console = Console(width=10, file=io.StringIO())
    for newest, first in ((0, 0), (2, 0), (20, 16), (47, 41), (49, 41)):
        text = Text("\n".join(f"{number:02}" for number in range(50)))
        text.stylize(STYLES[State.NEW], 3 * newest, 3 * newest + 2)
        kept = around_the_newest(text, console, 10, 9).plain.split("\n")
        assert kept == [f"{number:02}" for number in range(first, first + 9)]
