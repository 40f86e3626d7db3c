"""The frame of every page: complete, and with nothing in it that text could become."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mdlm_interp.viewer.page as page_module
from mdlm_interp.errors import DataError, OutputExistsError
from mdlm_interp.viewer import html_page, write_page
from mdlm_interp.viewer.page import script_json
from tests.mdlm_interp.viewer.vocabulary import ATTACK, STORY, WORDS, written

STATIC = sorted((Path(page_module.__file__).parent / "static").iterdir())


@given(st.dictionaries(st.text(), st.lists(st.text())))
def test_data_come_back_as_they_were_and_hold_no_markup(value):
    text = script_json({"value": value})
    assert json.loads(text) == {"value": value}
    assert text.isascii()
    assert not set(text) & set("<>&\n")


def test_text_in_the_title_and_the_data_is_text():
    page = html_page(title=ATTACK, body="", data={"token": ATTACK})
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert page.count("&lt;/script&gt;&lt;img") == 2


def test_the_policy_allows_the_pages_own_style_and_script_only():
    from mdlm_interp.viewer import trajectory_page

    page = trajectory_page(written(STORY), WORDS)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for name, pattern in {
        "style-src": "<style>(.*)</style>",
        "script-src": '<script type="module">(.*)</script>',
    }.items():
        (inside,) = re.findall(pattern, page, re.DOTALL)
        digest = b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert parts.pop(name) == f"'sha256-{digest}'"
    assert parts == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@pytest.mark.parametrize("file", STATIC, ids=lambda file: file.name)
def test_the_files_of_pages_load_nothing_and_make_no_markup_from_text(file):
    text = file.read_text("utf-8")
    loads = r"https?:|//\w+\.|@import|url\(|fetch\(|import\("
    makes_markup = r"</script|</style|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\("
    text = text.replace('"http://www.w3.org/2000/svg"', "")  # the name of a language, which nothing fetches
    assert re.findall(f"{loads}|{makes_markup}|\r", text) == []
    assert len(text.splitlines()) < 300


def test_what_json_has_no_form_for_is_refused(monkeypatch):
    with pytest.raises(DataError, match=r"must be what JSON can hold: .*; use null for NaN"):
        script_json({"value": float("nan")})
    with pytest.raises(DataError, match="must be what JSON can hold"):
        script_json({"value": object()})
    monkeypatch.setattr(page_module, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="at most 1 MiB, got 2 MiB; show fewer sequences"):
        script_json({"value": "x" * (2 << 20)})


def test_a_page_is_never_written_over_another_file_unasked(tmp_path):
    file = tmp_path / "new" / "page.html"
    write_page(file, "one")
    with pytest.raises(OutputExistsError, match=r"page.html exists; choose another path, or replace it with"):
        write_page(file, "two")
    assert file.read_text() == "one"
    write_page(file, "two", overwrite=True)
    assert file.read_text() == "two"
    with pytest.raises(OutputExistsError, match="is a directory; give the page a file name in it"):
        write_page(tmp_path, "three", overwrite=True)
