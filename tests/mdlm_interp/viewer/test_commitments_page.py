"""What the page of commitments holds, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from mdlm_interp.errors import DataError
from mdlm_interp.viewer.commitments_page import Dependence, commitments_page
from tests.mdlm_interp.viewer.commitments import story
from tests.mdlm_interp.viewer.vocabulary import ATTACK


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall('id="page-data">(.*)</script>\n', page)
    found: dict[str, Any] = json.loads(text)
    return found


def test_each_commitment_comes_with_its_graph_and_where_its_tokens_came_from():
    commitments, links, left_out = story()
    found = data_of(commitments_page(commitments, links, left_out, n_steps=8))
    assert [(one["step"], one["position"]) for one in found["commitments"]] == [(5, 4), (3, 3), (0, 1)]
    assert found["commitments"][0]["shares"] == [0.3, 0.4, 0.2, 0.1]  # given, committed, masks, errors
    assert found["origins"] == [{"3": 1, "1": 2}, {"1": 2}, {}]
    assert found["links"] == [[1, 0, 0.3], [2, 0, 0.1], [2, 1, 0.3]]
    assert found["leftOut"] == [{"step": 1, "position": 2, "token": " a", "weight": 0.05}]
    graphs = [one["graph"] for one in found["commitments"]]
    assert [graph["nodes"][-1]["position"] for graph in graphs] == [4, 3, 1]
    assert [graph["links"][0][2] for graph in graphs] == [1.0, 0.3, 0.19]


def test_no_text_of_the_data_becomes_markup_and_features_can_lead_to_dashboards():
    commitments, links, left_out = story(ATTACK)
    page = commitments_page(
        commitments, links, left_out, n_steps=8, feature_href=lambda layer, number: f"{layer}-{number}.html"
    )
    assert "<img" not in page
    found = data_of(page)
    assert found["commitments"][0]["token"].endswith(ATTACK)
    assert [node["href"] for node in found["commitments"][0]["graph"]["nodes"]][-2:] == ["0-7.html", None]


def test_what_does_not_fit_together_is_refused():
    commitments, links, _ = story()
    with pytest.raises(DataError, match="a page shows at least one commitment, got none"):
        commitments_page([], [], n_steps=8)
    with pytest.raises(DataError, match="a link names commitment 3, there are 3"):
        commitments_page(commitments, [Dependence(earlier=3, later=0, share=0.1)], n_steps=8)
    backwards = Dependence(earlier=0, later=1, share=0.1)
    with pytest.raises(DataError, match="from commitment 0 of step 5 to 1 of step 3"):
        commitments_page(commitments, [backwards], n_steps=8)
    short = replace(commitments[1], shares=[0.5])
    with pytest.raises(DataError, match=r"commitment 1 has shares, writers and masks of \[1, 5\] positions"):
        commitments_page([commitments[0], short], links[:1], n_steps=8)
