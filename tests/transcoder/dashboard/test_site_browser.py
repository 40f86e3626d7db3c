"""The pages in Chromium, opened from files as a reader would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mdlm_interp.viewer import browser
from tests.mdlm_interp.viewer.vocabulary import ATTACK, STORY, written
from tests.transcoder.dashboard.boards import WORDS, commitments, graph_json, made_up
from transcoder.dashboard import write_site

pytestmark = pytest.mark.skipif(bool(browser.WHY_NOT), reason=browser.WHY_NOT)

LEFT, RIGHT, UP, DOWN, ENTER, TAB, ESCAPE = (
    "\ue012",
    "\ue014",
    "\ue013",
    "\ue015",
    "\ue007",
    "\ue004",
    "\ue00c",
)
PAGES = (
    "index.html",
    "features.html",
    "features/1_50.html#f52",
    "graph.html",
    "commitments.html",
    "trajectory.html",
)
FIRST_PAINT_MS = 2000
"""Of any page of a transcoder with ten thousand features."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "pages"
    about = [("store", ATTACK)]
    return write_site(
        out,
        made_up(),
        WORDS,
        about=about,
        graph=graph_json(ATTACK),
        commitments=commitments(),
        trajectory=written(STORY),
    ).parent


@pytest.fixture
def visit(driver, site: Path) -> Iterator[Callable[..., None]]:
    """Opens a page; nothing on it may complain."""

    def visit(page: str, width: int = 1200) -> None:
        browser.resize(driver, width, 900)
        driver.get("about:blank")  # or another "#" would not load the page anew
        name, _, at = page.partition("#")
        driver.get((site / name).as_uri() + (f"#{at}" if at else ""))

    yield visit
    assert browser.complaints(driver) == []


def keys(driver: Any, *pressed: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*pressed).perform()


def script(driver: Any, statements: str, *arguments: Any) -> Any:
    return driver.execute_script(statements, *arguments)


def texts(driver: Any, selector: str) -> list[str]:
    found: list[str] = script(
        driver, "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )
    return found


def place(driver: Any) -> str:
    """The page and what stands behind its "#"."""
    return str(driver.current_url).rpartition("/pages/")[2]


def arrive(driver: Any, where: str) -> None:
    """Wait for a page that a script goes to, whose keys are not heard before it is there."""
    for _ in range(50):
        if place(driver) == where and script(driver, "return document.readyState") == "complete":
            return
        time.sleep(0.1)
    assert place(driver) == where


@pytest.mark.parametrize("page", PAGES[:5])  # a decoding's page has its own test
def test_an_attack_is_text_on_every_page(driver, visit, page):
    visit(page)
    for node in driver.find_elements("css selector", "#drawing .node"):
        script(driver, "arguments[0].dispatchEvent(new MouseEvent('click', { bubbles: true }))", node)
    time.sleep(0.2)
    assert "taken over" not in driver.title
    assert script(driver, "return document.images.length") == 0
    shown = script(driver, "return document.body.innerText + document.querySelector('main').textContent")
    assert "<img" in shown


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [375, 320])
def test_a_phone_shows_every_page_without_scrolling_sideways(driver, visit, page, width):
    visit(page, width)
    assert script(driver, "return document.documentElement.scrollWidth") <= width
    outside = "(e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.hidden, .scroll, #drawing')"
    assert script(driver, f"return [...document.querySelectorAll('body *')].filter({outside}).length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", PAGES[:5])
def test_text_stands_out_from_its_ground(driver, visit, page, dark):
    from tests.mdlm_interp.viewer.test_browser import CONTRAST

    browser.set_dark(driver, dark)
    visit(page)
    rule = CONTRAST.replace(".unit, p,", ".tok, .token, td, th, a, dd, figcaption, h2, h3, p,")
    worst = script(driver, rule)
    browser.set_dark(driver, False)
    assert len(worst) > 10
    assert min(worst)[0] >= 4.5, min(worst)


def test_a_commitments_feature_has_a_name_and_its_dashboard_is_a_click_away(driver, visit):
    visit("commitments.html")
    assert texts(driver, ".pages a[aria-current]") == ["Commitments"]
    driver.find_element("css selector", ".line[data-number='1']").click()
    (node,) = driver.find_elements("css selector", ".node:has(.mark.feature)")
    script(driver, "arguments[0].dispatchEvent(new MouseEvent('click', { bubbles: true }))", node)
    assert f"→{ATTACK},One" in texts(driver, "#details")[0]
    driver.find_element("id", "dashboard").click()
    arrive(driver, "features/1_0.html#f7")
    assert driver.title == "Feature 1/7"
    driver.back()
    arrive(driver, "commitments.html#commitment=1&node=1_7_3")
    assert (
        driver.find_element("css selector", ".line[aria-pressed='true']").get_attribute("data-number") == "1"
    )


def test_search_finds_by_promoted_token_place_and_layer(driver, visit):
    visit("features.html")
    # The silent ones are left out unless asked for.
    assert texts(driver, "#found") == ["118 of 120 features, the first 60 shown"]
    query = driver.find_element("id", "query")
    query.send_keys("1/52")
    assert texts(driver, "#rows a") == ["1/52"]
    query.clear()
    query.send_keys("nowhere")
    assert texts(driver, "#rows a") == []
    query.clear()
    query.send_keys("DAY")
    assert texts(driver, "#found") == ["118 of 120 features, the first 60 shown"]
    script(
        driver,
        "const l = document.getElementById('layer'); l.value = '1'; l.dispatchEvent(new Event('input'));"
        "const o = document.getElementById('order'); o.value = 'number'; o.dispatchEvent(new Event('input'));",
    )
    assert texts(driver, "#rows a")[:3] == ["1/0", "1/2", "1/3"]
    driver.find_element("id", "silent").click()
    assert texts(driver, "#rows a")[:3] == ["1/0", "1/1", "1/2"]


def test_orders_are_by_the_figure_that_they_name(driver, visit):
    visit("features.html")
    found = made_up().occurrences
    counts = {
        f"{layer}/{number}": int(found.active[layer, number].sum())
        for layer in (0, 1)
        for number in range(60)
    }
    script(
        driver,
        "const o = document.getElementById('order'); o.value = 'active'; o.dispatchEvent(new Event('input'));",
    )
    driver.find_element("id", "more").click()
    shown = [counts[name] for name in texts(driver, "#rows a")]
    assert len(shown) == 118
    assert shown == sorted(shown, reverse=True)


def test_the_table_and_the_dashboards_need_no_mouse(driver, visit):
    visit("features.html")
    keys(driver, "/", "1/49", DOWN, ENTER)
    arrive(driver, "features/1_0.html#f49")
    keys(driver, RIGHT)
    arrive(driver, "features/1_50.html#f50")
    assert driver.title == "Feature 1/50"
    keys(driver, LEFT)
    arrive(driver, "features/1_0.html#f49")
    keys(driver, LEFT)
    arrive(driver, "features/1_0.html#f48")
    visit("features/0_50.html#f59")
    keys(driver, RIGHT)
    arrive(driver, "features/1_0.html#f0")  # the next layer's first
    visit("features/1_50.html#f59")
    assert driver.find_element("id", "after").get_dom_attribute("href") is None


def test_a_dashboard_shows_the_contexts_as_the_model_read_them(driver, visit):
    visit("features/1_50.html#f52")
    found = made_up().occurrences
    lists = script(
        driver,
        "return [...document.querySelectorAll('.words')].map((line) => [...line.children].filter("
        "(e) => e.matches('.tok')).map((e) => [e.classList.contains('masked'), e.style.getPropertyValue('--value')]))",
    )
    for example, shown in enumerate(lists):
        read, acts = found.read[1, 52, example, 3:], found.acts[1, 52, example, 3:]
        assert [masked for masked, _ in shown] == (read == WORDS.mask_id).tolist()
        share = acts / found.values[1, 52, 0]
        assert [float(value) for _, value in shown] == pytest.approx(share.tolist(), abs=2e-3)
    assert len(lists) == 3
    assert len(texts(driver, ".tok.peak")) == 3 + 1  # and the legend's
    assert texts(driver, "#times figcaption") == ["where the model read the token", "where it read a mask"]
    title = texts(driver, "#times title")[13]
    assert title.startswith(
        f"t 0.3 to 0.4: active at {100 * found.active[1, 52, 1, 3] / 1000:.1f}% of 1,000 tokens"
    )
    visit("features/1_50.html#f99999")  # an address cut wrong shows the last
    assert driver.title == "Feature 1/59"
    visit("features/1_0.html#f1")
    assert texts(driver, "#contexts") == ["Silent: nowhere active in the store."]


def test_ten_thousand_features_are_painted_within_two_seconds(driver, tmp_path):
    """Bounded: first paint and the last of the first rows, as the browser's own clock has them."""
    boards = made_up(n_layers=5, n_features=2000, n_examples=4, context=8)
    out = write_site(tmp_path / "site", boards, WORDS, graph=graph_json()).parent
    browser.resize(driver, 1200, 900)
    slowest = {}
    for page in ("index.html", "features.html", "features/4_1950.html", "graph.html"):
        driver.get((out / page).as_uri())
        paint, loaded = script(
            driver,
            "return [performance.getEntriesByName('first-contentful-paint')[0]?.startTime,"
            "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd]",
        )
        for _ in range(20):
            if paint is not None:
                break
            time.sleep(0.1)
            paint = script(
                driver, "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            )
        slowest[page] = max(paint, loaded)
        if page == "features.html":
            assert texts(driver, "#found") == ["9,995 of 10,000 features, the first 60 shown"]
            took = script(
                driver,
                "const q = document.getElementById('query'), from = performance.now(); q.value = 'one';"
                "q.dispatchEvent(new Event('input')); return performance.now() - from",
            )
            assert took <= 500, took
    print("first paint, ms:", slowest)  # noqa: T201
    assert max(slowest.values()) <= FIRST_PAINT_MS, slowest
    assert browser.complaints(driver) == []
