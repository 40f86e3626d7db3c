"""Graphs in circuit-tracer's form: what the page takes, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from mdlm_interp.errors import DataError
from mdlm_interp.viewer import graph_page
from mdlm_interp.viewer.graph_page import check_graph, read_graph

FEATURE = "cross layer transcoder"
GRAPH: dict[str, Any] = {
    "metadata": {"prompt_tokens": ["One", "\u202e"]},
    "qParams": {"pinnedIds": ["0_5_0"], "supernodes": [["both", "0_5_0", "E_3_0"]]},
    "nodes": [
        {"node_id": "E_3_0", "feature_type": "embedding", "layer": "E", "ctx_idx": 0},
        {
            "node_id": "0_5_0",
            "feature_type": FEATURE,
            "layer": "0",
            "ctx_idx": 0,
            "activation": 2,
            "influence": 0.5,
        },
        {
            "node_id": "3_9_1",
            "feature_type": "logit",
            "layer": "3",
            "ctx_idx": 1,
            "token_prob": 0.5,
            "clerp": "<b>",
        },
    ],
    "links": [{"source": "0_5_0", "target": "3_9_1", "weight": -1.5}],
}


def test_nodes_and_links_become_numbers_and_places():
    found = check_graph(GRAPH, features=(1, 6))
    assert found.tokens == ["One", "<U+202E>"]
    assert [(node["kind"], node["layer"], node["position"]) for node in found.nodes] == [
        ("embedding", -1, 0),
        ("feature", 0, 0),
        ("logit", 1, 1),  # right above the last layer, wherever the file has it
    ]
    assert found.nodes[1]["number"] == 5
    assert found.nodes[1]["activation"] == 2.0
    assert found.nodes[2]["probability"] == 0.5
    assert found.links == [(1, 2, -1.5)]
    assert (found.pinned, found.groups) == ([1], [("both", [1, 0])])


def test_features_lead_to_their_dashboards_and_text_is_escaped():
    page = graph_page(GRAPH, title="<i>", feature_href=lambda layer, number: f"{layer}-{number}.html")
    (text,) = re.findall('id="page-data">(.*)</script>\n', page)
    assert [node["href"] for node in json.loads(text)["nodes"]] == [None, "0-5.html", None]
    assert "<b>" not in page
    assert "<h1>&lt;i&gt;</h1>" in page
    (text,) = re.findall('id="page-data">(.*)</script>\n', graph_page(GRAPH))
    assert [node["href"] for node in json.loads(text)["nodes"]] == [None] * 3


def changed(*path: Any, to: Any) -> dict[str, Any]:
    graph = copy.deepcopy(GRAPH)
    part: Any = graph
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (changed("metadata", to=None), "a graph needs metadata, a JSON object, got NoneType"),
        (changed("metadata", "prompt_tokens", to="One"), "a graph needs prompt_tokens, a JSON list, got str"),
        (changed("nodes", 0, to="E"), "a node must be an object with a node_id, got 'E'"),
        (changed("nodes", 0, "feature_type", to="neuron"), "node E_3_0 has feature_type 'neuron', known are"),
        (changed("nodes", 0, "ctx_idx", to=2), "node E_3_0 has ctx_idx 2, the prompt has 2 tokens"),
        (changed("nodes", 0, "ctx_idx", to="0"), "node E_3_0 has ctx_idx '0'"),
        (changed("nodes", 0, "layer", to="x"), "node E_3_0 has layer 'x', expected a number or 'E'"),
        (
            changed("nodes", 1, "node_id", to="0_5"),
            "node 0_5 is a feature, whose node_id is LAYER_NUMBER_POSITION",
        ),
        (
            changed("nodes", 1, "node_id", to="0_6_0"),
            "node 0_6_0 is feature 6 of layer 0, the transcoder has 1 layers of 6",
        ),
        (
            changed("nodes", 1, "activation", to=float("nan")),
            "node 0_5_0 has activation nan, expected a finite number",
        ),
        (changed("nodes", 0, "node_id", to="0_5_0"), "nodes must have different node_ids"),
        (
            changed("links", 0, "source", to="1_1_1"),
            "a link names the node '1_1_1', which the graph does not have",
        ),
        (changed("links", 0, "weight", to=None), "a link has no weight"),
        (
            changed("links", 0, "source", to=["0_5_0"]),
            "a link names the node ['0_5_0'], which the graph does not",
        ),
        (changed("qParams", to=[1]), "a graph needs qParams, a JSON object, got list"),
        (changed("qParams", "supernodes", to=[1]), "a supernode must be a list of a name and nodes, got 1"),
        (changed("qParams", "pinnedIds", to=["x"]), "pinnedIds names the node 'x'"),
    ],
)
def test_another_form_is_refused(graph, message):
    with pytest.raises(DataError, match=re.escape(message)):
        check_graph(graph, features=(1, 6))


def test_files_that_hold_no_graph_are_told(tmp_path):
    file = tmp_path / "graph.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_graph(file)
    file.write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        read_graph(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object, got list"):
        read_graph(file)
    file.write_text(json.dumps(GRAPH))
    assert read_graph(file) == GRAPH
