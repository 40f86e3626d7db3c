"""The page of a trajectory in Chromium, opened from a file as a reader would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdlm_interp.viewer import trajectory_page, write_page
from tests.mdlm_interp.viewer import browser
from tests.mdlm_interp.viewer.vocabulary import (
    EVIL,
    HALF,
    MASK,
    MY,
    ONE,
    OTHER_HALF,
    STORY,
    TIM,
    WORDS,
    written,
)

pytestmark = pytest.mark.skipif(bool(browser.WHY_NOT), reason=browser.WHY_NOT)

ATTACKED = [
    [EVIL, ONE, MASK, MASK],
    [EVIL, ONE, TIM, MASK],
    [EVIL, ONE, TIM, MY],
    [EVIL, EVIL, TIM, MY],
]
"""An attack in the prompt and one that is written later."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def visit(driver, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Opens the page of some states; nothing on it may complain."""

    def visit(states: list[list[int]], *, width: int = 1200, title: str = "Decoding", **figures: int) -> None:
        file = tmp_path / "page.html"
        write_page(file, trajectory_page(written(states, **figures), WORDS, title=title), overwrite=True)
        browser.resize(driver, width, 800)
        driver.get(file.as_uri())

    yield visit
    assert browser.complaints(driver) == []


def keys(driver: Any, *pressed: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*pressed).perform()


def script(driver: Any, statements: str, *arguments: Any) -> Any:
    return driver.execute_script(statements, *arguments)


def shown(driver: Any) -> list[list[str]]:
    """Text and state of each position or word."""
    found: list[list[str]] = script(
        driver,
        "return [...document.querySelectorAll('#text .unit')].map((unit) => [unit.textContent, unit.classList[1]])",
    )
    return found


def at_step(driver: Any) -> int:
    return int(script(driver, "return document.getElementById('step').value"))


def select(driver: Any, name: str, value: str) -> None:
    driver.find_element("css selector", f"input[name={name}][value={value}]").click()


def test_every_step_is_shown_as_the_trajectory_has_it(driver, visit):
    visit(STORY)
    frames = []
    for _ in STORY:
        frames.append(shown(driver))
        keys(driver, "\ue014")  # right
    letters = {"given": "g", "mask": ".", "new": "n", "settled": "s", "back": "b"}
    states = ["".join(letters[state] for _, state in frame) for frame in frames]
    assert states == ["gg....", "ggn...", "ggsn.n", "ggbsns", "ggnssn"]
    assert [text for text, _ in frames[2]] == ["One", "·day", ",", "·Tim", "\u00a0", "\ufffd"]
    assert [text for text, _ in frames[4]] == ["One", "·day", "↵", "·Tim", "my", "\ufffd"]
    assert driver.find_element("id", "where").text == "Step 4 of 4 · t 0.250"


def test_a_token_that_is_markup_is_text_and_does_not_run(driver, visit):
    visit(ATTACKED, title="</title><img src=x onerror=\"document.title='taken over'\">", alternatives=9)
    for group in ("word", "token"):
        select(driver, "group", group)
        for colour in ("order", "confidence", "state"):
            select(driver, "colour", colour)
            script(driver, "document.activeElement.blur()")
            keys(driver, "\ue011", *["\ue014"] * 3)  # home, to the end
            for unit in driver.find_elements("css selector", "#text .unit"):
                unit.click()
    time.sleep(0.2)
    assert driver.title.startswith("</title><img")
    assert script(driver, "return document.images.length") == 0
    assert "<img·src=x" in shown(driver)[0][0]
    assert "<img" in driver.find_element("id", "details").text


def test_the_policy_stops_markup_that_got_in_all_the_same(driver, visit):
    """The second lock: this puts the attack into the page as no code of ours does."""
    visit(ATTACKED)
    script(driver, "document.body.insertAdjacentHTML('beforeend', '<p onclick=\"document.title=1\">x</p>')")
    script(driver, "document.querySelector('body > p:last-of-type').click()")
    assert driver.title == "Decoding"
    # What was refused is what the browser complains of; reading the log empties it.
    assert any("Content Security Policy" in message for message in browser.complaints(driver))


def test_keys_play_step_and_change_speed(driver, visit):
    visit(STORY)
    keys(driver, "\ue014", "\ue014", "\ue012")
    assert at_step(driver) == 1
    keys(driver, "\ue010")  # end
    assert at_step(driver) == 4
    assert not driver.find_element("id", "forward").is_enabled()
    keys(driver, "\ue011")
    assert at_step(driver) == 0
    keys(driver, "+", "+")
    assert driver.find_element("id", "speed").text == "16 steps/s"
    keys(driver, "-", "-", "-", "-", "-", "-")
    assert driver.find_element("id", "speed").text == "0.5 steps/s"
    keys(driver, " ")
    assert driver.find_element("id", "play").text == "Pause"
    keys(driver, " ")
    assert driver.find_element("id", "play").text == "Play"
    assert at_step(driver) == 0
    keys(driver, *"++++++", " ")
    for _ in range(50):
        if driver.find_element("id", "play").text == "Play":
            break
        time.sleep(0.1)
    assert at_step(driver) == 4
    assert driver.find_element("id", "play").text == "Play"
    driver.find_element("id", "restart").click()
    assert at_step(driver) == 0


def test_positions_are_reached_by_tab_and_arrows_and_the_focus_is_seen(driver, visit):
    visit(STORY, alternatives=2)
    keys(driver, "\ue014")
    for _ in range(20):
        keys(driver, "\ue004")  # tab
        if script(driver, "return document.activeElement.classList.contains('unit')"):
            break
    keys(driver, "\ue015", "\ue015", "\ue015")  # down
    focused = "const style = getComputedStyle(document.activeElement);"
    assert script(driver, focused + "return [style.outlineStyle, style.outlineWidth]") == ["solid", "3px"]
    assert driver.find_element("id", "details").text.startswith("Position 3: mask")
    keys(driver, "\ue014")  # time goes on, the position stays
    assert driver.find_element("id", "details").text.startswith("Position 3: ·Tim")
    assert (
        script(driver, "return document.activeElement.getAttribute('aria-label')")
        == "Tim, written in this step"
    )
    keys(driver, "\ue00c")  # escape
    assert driver.find_element("id", "details").text.startswith("No position chosen")
    keys(driver, "\ue013")  # up: from where the focus still is, not from the beginning
    assert driver.find_element("id", "details").text.startswith("Position 2:")


def test_alternatives_on_hover(driver, visit):
    from selenium.webdriver import ActionChains

    visit(STORY, alternatives=5)
    keys(driver, "\ue014", "\ue014")
    units = driver.find_elements("css selector", "#text .unit")
    ActionChains(driver).move_to_element(units[4]).perform()
    found = driver.find_element("id", "details").text
    assert "Step 3 draws a token of probability 24%; entropy 0.48 nats." in found
    rows = [row.text for row in driver.find_elements("css selector", "#details tbody tr")]
    assert [row.split()[-1] for row in rows] == ["50%", "25%", "13%", "6.3%", "3.1%"]
    assert [row.split()[0] for row in rows] == ["One", "·day", ",", "·Tim", "my"]
    ActionChains(driver).move_to_element(units[3]).perform()
    found = driver.find_element("id", "details").text
    assert "Step 2 wrote it with probability 13%; entropy 0.26 nats." in found
    chosen = driver.find_elements("css selector", "#details tr.chosen")
    assert [row.text.split()[:2] for row in chosen] == [["·Tim", "✓"]]
    ActionChains(driver).move_to_element(units[0]).perform()
    assert "It stood there from the start." in driver.find_element("id", "details").text


def test_words_hold_together_what_belongs_together(driver, visit):
    visit([[ONE, MASK, MASK, MASK, MASK], [ONE, MASK, MASK, TIM, MASK], [ONE, HALF, OTHER_HALF, TIM, MY]])
    select(driver, "group", "word")
    assert shown(driver) == [["One", "given"], ["\u00a0", "mask"], ["\u00a0", "mask"]]
    script(driver, "document.activeElement.blur()")
    keys(driver, "\ue014")
    assert shown(driver) == [["One", "given"], ["\u00a0", "mask"], ["Tim▁", "mask"]]
    keys(driver, "\ue014")
    assert shown(driver) == [["One", "given"], ["é", "new"], ["Timmy", "new"]]


def test_heats_are_numbers_and_not_colour_alone(driver, visit):
    visit(STORY)
    keys(driver, "\ue010")
    select(driver, "colour", "order")
    values = script(
        driver,
        "return [...document.querySelectorAll('#text .unit')].map("
        "(unit) => [unit.style.getPropertyValue('--value'), unit.querySelector('sub')?.textContent])",
    )
    assert values == [["", None], ["", None], ["1.000", "4"], ["0.333", "2"], ["0.667", "3"], ["1.000", "4"]]
    select(driver, "colour", "confidence")
    unit = driver.find_elements("css selector", "#text .unit")[3]
    assert unit.get_dom_attribute("style") == "--masks: 1; --value: 0.130;"


@pytest.mark.parametrize("width", [375, 320])
def test_a_phone_shows_the_page_without_scrolling_sideways(driver, visit, width):
    long = [EVIL] * 3 + [MASK] * 90
    visit([long, [*long[:3], *[EVIL] * 90]], width=width, alternatives=5)
    keys(driver, "\ue014")
    for group in ("token", "word"):
        select(driver, "group", group)
        script(driver, "document.querySelectorAll('#text .unit')[1].click()")
        assert script(driver, "return document.documentElement.scrollWidth") <= width
        inside = "(e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.hidden')"
        assert script(driver, f"return [...document.querySelectorAll('body *')].filter({inside}).length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("colour", ["state", "confidence", "order"])
def test_text_stands_out_from_its_ground(driver, visit, dark, colour):
    """WCAG's 4.5 to 1, computed from what the browser paints, for the positions and the small print."""
    browser.set_dark(driver, dark)
    visit(STORY)
    keys(driver, "\ue014", "\ue014")
    select(driver, "colour", colour)
    time.sleep(0.3)  # the colours fade in
    worst = script(driver, CONTRAST)
    browser.set_dark(driver, False)
    assert len(worst) > 20
    assert min(worst)[0] >= 4.5, min(worst)


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour, under) => {
  canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data;
};
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
  }
  return "white";
};
const found = [];
for (const node of document.querySelectorAll(".unit, p, label, legend, dt, summary, h1, button:enabled, aside *")) {
  if (!node.textContent.trim() || !node.getClientRects().length) continue;
  const under = ground(node);
  const [a, b] = [light(rgba(under, "white")), light(rgba(getComputedStyle(node).color, under))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), node.className || node.nodeName, node.textContent]);
}
return found;
"""
