"""The attribution graph's page in Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mdlm_interp.viewer import browser
from tests.transcoder.dashboard.boards import WORDS, graph_json, made_up
from tests.transcoder.dashboard.test_site_browser import (
    DOWN,
    ENTER,
    ESCAPE,
    UP,
    arrive,
    keys,
    script,
    texts,
)
from transcoder.dashboard import write_site

pytestmark = pytest.mark.skipif(bool(browser.WHY_NOT), reason=browser.WHY_NOT)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "pages"
    return write_site(out, made_up(), WORDS, graph=graph_json()).parent


@pytest.fixture
def visit(driver, site: Path) -> Iterator[Callable[..., None]]:
    def visit(at: str = "", width: int = 1200) -> None:
        browser.resize(driver, width, 900)
        driver.get("about:blank")
        driver.get((site / "graph.html").as_uri() + at)

    yield visit
    assert browser.complaints(driver) == []


def nodes(driver: Any) -> set[str]:
    """Keys of the nodes that are drawn."""
    return set(script(driver, "return [...document.querySelectorAll('.node')].map((e) => e.dataset.key)"))


def choose(driver: Any, key: object) -> None:
    from selenium.webdriver import ActionChains

    node = driver.find_element("css selector", f".node[data-key='{key}'] .hit")
    ActionChains(driver).move_to_element(node).click().perform()


def chosen(driver: Any) -> str | None:
    found: list[str] = script(
        driver, "return [...document.querySelectorAll('.node.chosen')].map((e) => e.dataset.key)"
    )
    assert len(found) <= 1
    return found[0] if found else None


def rows(driver: Any, caption: str) -> list[list[str]]:
    """Names and weights of a table of the panel."""
    found: list[list[str]] = script(
        driver,
        "const t = [...document.querySelectorAll('#details table')].find((t) => t.caption.textContent.startsWith("
        "arguments[0])); return [...t.querySelectorAll('tr')].map((r) => [...r.cells].map((c) => c.textContent))",
        caption,
    )
    return found


# Nodes by number: tokens 0 and 1, features 2 (0/5), 3 (0/7), 4 (1/52), error 5, prediction 6.


def test_all_nodes_and_links_are_drawn_and_a_choice_shows_both_sides(driver, visit):
    visit()
    assert nodes(driver) == set("0123456")
    assert texts(driver, "#kept") == ["7 nodes, 7 links"]
    choose(driver, 4)
    assert chosen(driver) == "4"
    assert [weight for _, weight in rows(driver, "From")] == ["2.00", "−0.250"]
    assert [weight for _, weight in rows(driver, "To")] == ["1.25"]
    assert len(driver.find_elements("css selector", "#drawing .link.chosen.positive")) == 2
    assert len(driver.find_elements("css selector", "#drawing .link.chosen.negative")) == 1
    choose(driver, 6)
    assert "probability 75%" in texts(driver, "#details")[0]


def test_a_feature_leads_to_its_dashboard_and_the_graph_comes_back(driver, visit):
    visit()
    choose(driver, 4)
    driver.find_element("id", "dashboard").click()
    arrive(driver, "features/1_50.html#f52")
    assert driver.title == "Feature 1/52"
    driver.back()
    assert chosen(driver) == "4"


def test_influence_and_errors_decide_what_is_shown_and_predictions_stay(driver, visit):
    visit()
    script(
        driver,
        "const i = document.getElementById('influence'); i.value = 50; i.dispatchEvent(new Event('input'))",
    )
    assert nodes(driver) == {"0", "2", "4", "6"}
    script(
        driver,
        "const i = document.getElementById('influence'); i.value = 100; i.dispatchEvent(new Event('input'))",
    )
    driver.find_element("id", "errors").click()
    assert nodes(driver) == set("012346")


def test_groups_stand_for_their_members_and_the_address_keeps_them(driver, visit):
    visit()
    for key in (2, 3):
        choose(driver, key)
        driver.find_element("id", "pin").click()
    driver.find_element("id", "group-name").send_keys("a:b & c")
    driver.find_element("css selector", "#grouping button").click()
    assert nodes(driver) == {"0", "1", "4", "5", "6", "g0"}
    assert chosen(driver) == "g0"
    # The members' links, added up: 2 - 0.25 to the feature above.
    assert [weight for _, weight in rows(driver, "To")] == ["1.75", "0.500"]
    assert [weight for _, weight in rows(driver, "From")] == ["1.00", "0.500"]
    address = driver.current_url
    visit(address[address.index("#") :])
    assert nodes(driver) == {"0", "1", "4", "5", "6", "g0"}
    assert texts(driver, "#groups span") == ["Group a:b & c"]
    driver.find_element("id", "only").click()
    assert nodes(driver) == {"g0"}
    driver.find_element("id", "only").click()
    driver.find_element("css selector", "#groups button").click()
    assert nodes(driver) == set("0123456")
    assert len(texts(driver, "#pinned li")) == 2  # the members are pinned in its place


@pytest.mark.parametrize("address", ["#pin=%E0%A4%A", "#group=x", "#node=no&pin=,,&group=:", "#&&=&pin"])
def test_an_address_that_was_cut_off_shows_the_graph(driver, visit, address):
    visit(address)
    assert nodes(driver) == set("0123456")


def test_the_graph_needs_no_mouse(driver, visit):
    visit()
    for _ in range(20):
        keys(driver, "\ue004")  # tab
        if script(driver, "return document.activeElement.classList.contains('node')"):
            break
    assert chosen(driver) == "0"
    keys(driver, UP)
    assert chosen(driver) == "2"
    keys(driver, UP, UP)
    assert chosen(driver) == "6"
    keys(driver, DOWN)
    assert chosen(driver) == "4"
    assert (
        script(driver, "return getComputedStyle(document.activeElement.querySelector('.halo')).stroke")
        != "none"
    )
    keys(driver, ENTER)
    assert len(texts(driver, "#pinned li")) == 1
    keys(driver, "p")
    assert texts(driver, "#pinned li") == []
    before = script(driver, "return document.querySelector('#drawing > g').getAttribute('transform')")
    keys(driver, "+")
    assert script(driver, "return document.querySelector('#drawing > g').getAttribute('transform')") != before
    keys(driver, "0")
    keys(driver, "f")
    arrive(driver, "features/1_50.html#f52")
    driver.back()
    keys(driver, ESCAPE)
    assert chosen(driver) is None


def test_dragging_and_the_wheel_move_and_zoom(driver, visit):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    visit()
    where = "return document.querySelector(\".node[data-key='6']\").getBoundingClientRect().x"
    size = "return document.querySelector('#drawing > g').transform.baseVal[1].matrix.a"
    drawing = driver.find_element("id", "drawing")
    before, scale = script(driver, where), script(driver, size)
    ActionChains(driver).move_to_element_with_offset(drawing, -250, 150).click_and_hold().move_by_offset(
        80, 0
    ).release().perform()
    assert script(driver, where) == pytest.approx(before + 80, abs=1)
    assert chosen(driver) is None
    ActionChains(driver).scroll_from_origin(ScrollOrigin.from_element(drawing), 0, -200).perform()
    assert script(driver, size) > 1.2 * scale
    driver.find_element("id", "fit").click()
    assert script(driver, size) == pytest.approx(scale)
    assert script(driver, where) == pytest.approx(before, abs=1)
