"""The page of commitments in Chromium, with a mouse, without one, and on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdlm_interp.viewer import write_page
from mdlm_interp.viewer.commitments_page import commitments_page
from tests.mdlm_interp.viewer import browser
from tests.mdlm_interp.viewer.commitments import story
from tests.mdlm_interp.viewer.vocabulary import ATTACK

pytestmark = pytest.mark.skipif(bool(browser.WHY_NOT), reason=browser.WHY_NOT)

UP, DOWN, ENTER, TAB, HOME = "\ue013", "\ue015", "\ue007", "\ue004", "\ue011"


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = Path(tmp_path_factory.mktemp("page")) / "commitments.html"
    write_page(path, commitments_page(*story(ATTACK), n_steps=8))
    return path


@pytest.fixture
def visit(driver, page: Path) -> Iterator[Callable[..., None]]:
    """Opens the page; nothing on it may complain."""

    def visit(at: str = "", width: int = 1200) -> None:
        browser.resize(driver, width, 800)
        driver.get("about:blank")
        driver.get(page.as_uri() + at)

    yield visit
    assert browser.complaints(driver) == []
    assert driver.title == "Why this token, and why those before it"


def keys(driver: Any, *pressed: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*pressed).perform()


def texts(driver: Any, selector: str) -> list[str]:
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )
    return found


def chosen(driver: Any) -> int:
    """The commitment that is shown; its line, its heading, its graph and the address must agree."""
    (line,) = driver.find_elements("css selector", ".line[aria-pressed='true']")
    number = int(line.get_attribute("data-number"))
    step, position = [(5, 4), (3, 3), (0, 1)][number]
    (name,) = texts(driver, "#name")
    assert f"at {position}, committed in step {step};" in name
    (logit,) = driver.find_elements("css selector", ".node:has(.mark.logit)")
    assert f"position {position}" in logit.get_attribute("aria-label")
    assert f"#commitment={number}" in driver.current_url
    return number


def test_the_timeline_goes_through_the_steps_and_ends_with_the_explained_token(driver, visit):
    visit()
    assert texts(driver, ".line .step") == ["step 0", "step 3", "step 5"]
    assert texts(driver, ".line .word")[:2] == ["·boy at 1", "·and at 3"]
    assert texts(driver, ".line .weight") == ["19%", "30%", "100%"]
    assert chosen(driver) == 0
    splits = [one.get_attribute("aria-label") for one in driver.find_elements("css selector", ".line .split")]
    assert splits[2] == "given 30%, committed 40%, masks 20%, errors 10%"
    assert texts(driver, "#left-out summary") == ["1 more committed token has a weight and no graph here"]
    assert len(driver.find_elements("css selector", "#arcs .arc")) == 3
    assert len(driver.find_elements("css selector", "#arcs .arc.chosen")) == 2


def test_parts_of_a_bar_are_as_wide_as_their_shares(driver, visit):
    visit()
    widths = driver.execute_script(
        "const all = [...document.querySelectorAll('.split')].at(-1); const own = all.clientWidth;"
        "return [...all.children].map((e) => e.getBoundingClientRect().width / own)"
    )
    assert widths == pytest.approx([0.3, 0.4, 0.2, 0.1], abs=0.01)


def test_a_press_shows_another_commitments_state_and_graph(driver, visit):
    visit()
    driver.find_element("css selector", ".line[data-number='1']").click()
    assert chosen(driver) == 1
    assert "30% of the explained token's influence passes through it" in texts(driver, "#shares")[0]
    assert texts(driver, "#before td.number") == ["30%"]
    assert texts(driver, "#after td.number") == ["30%"]
    assert texts(driver, "#state .at") == ["One", "·w1 0", "·w2 1", "·and", "▢"]
    driver.find_element("css selector", "#before button").click()
    assert chosen(driver) == 2
    assert texts(driver, "#before caption") == ["Begins at none of the earlier ones shown"]


def test_a_token_of_the_state_or_the_graph_leads_to_its_own_commitment(driver, visit):
    visit()
    buttons = driver.find_elements("css selector", "#state button.at")
    assert [button.text for button in buttons] == ["·w1 0", "·w3 3"]  # the one of step 1 has no graph
    buttons[1].click()
    assert chosen(driver) == 1
    visit("#commitment=1&node=E_1_1")
    assert chosen(driver) == 1
    driver.find_element("id", "origin").click()
    assert chosen(driver) == 2
    assert driver.find_elements("id", "origin") == []


def test_the_page_needs_no_mouse(driver, visit):
    visit()
    for _ in range(6):
        keys(driver, TAB)
        if driver.execute_script("return document.activeElement.classList.contains('line')"):
            break
    keys(driver, UP)
    assert chosen(driver) == 1
    keys(driver, UP, UP)
    assert chosen(driver) == 2
    keys(driver, DOWN)
    assert chosen(driver) == 1
    keys(driver, HOME)
    assert chosen(driver) == 2
    keys(driver, DOWN, ENTER)
    assert driver.execute_script("return document.activeElement.id") == "name"
    visit("#commitment=0&node=E_3_3")
    for _ in range(40):
        keys(driver, TAB)
        if driver.execute_script("return document.activeElement.classList.contains('node')"):
            break
    keys(driver, "c")
    assert chosen(driver) == 1


def test_pins_of_a_graph_are_there_when_one_comes_back_to_it(driver, visit):
    visit("#commitment=1&pin=E_1_1")
    assert len(texts(driver, "#pinned li")) == 1
    driver.find_element("css selector", ".line[data-number='2']").click()
    assert texts(driver, "#pinned li") == []
    driver.find_element("css selector", ".line[data-number='1']").click()
    assert len(texts(driver, "#pinned li")) == 1


@pytest.mark.parametrize(
    "address", ["#commitment=9", "#commitment=", "#commitment=9&node=E_1_1&pin=%E0%A4%A"]
)
def test_an_address_that_names_no_commitment_shows_the_explained_token(driver, visit, address):
    visit(address)
    assert chosen(driver) == 0


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_cut_off_and_fingers_hit_what_they_aim_at(driver, visit, width, dark):
    browser.set_dark(driver, dark)
    visit(width=width)
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    small = driver.execute_script(
        "return [...document.querySelectorAll('.line, button.at')].map((e) => e.getBoundingClientRect().height)"
    )
    assert min(small) >= 24
    arcs, first = driver.execute_script(
        "return [document.getElementById('arcs').getBoundingClientRect().right,"
        "document.querySelector('.line').getBoundingClientRect().left]"
    )
    assert arcs <= first + 1
    stops = driver.execute_script(
        "const middle = (e) => e.getBoundingClientRect().y + e.getBoundingClientRect().height / 2;"
        "const lines = [...document.querySelectorAll('.line')], stops = [...document.querySelectorAll('.stop')];"
        "return lines.map((line, i) => middle(line) - middle(stops[i]))"
    )
    assert stops == pytest.approx([0, 0, 0], abs=1)
    browser.set_dark(driver, False)
