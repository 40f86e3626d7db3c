"""An attribution graph as one HTML page, from the JSON of circuit-tracer's form.

    metadata    prompt_tokens: text of each position
    qParams     pinnedIds: nodes; supernodes: lists of a name and its nodes; both optional
    nodes       node_id, feature_type, layer, ctx_idx; a feature's node_id is LAYER_NUMBER_POSITION; optional: clerp
                (its description), activation, token_prob, influence (share of all influence that it and the
                stronger nodes make up)
    links       source, target: node_ids; weight: direct effect of the source on the target

Source:
    decoderesearch/circuit-tracer, circuit_tracer/frontend/graph_models.py and utils/create_graph_files.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mdlm_interp.errors import DataError
from mdlm_interp.viewer.page import Link, html_page, static
from mdlm_interp.viewer.text import visible

Kind: TypeAlias = Literal["feature", "error", "embedding", "logit"]

KINDS: dict[str, Kind] = {
    "cross layer transcoder": "feature",
    "mlp reconstruction error": "error",
    "embedding": "embedding",
    "logit": "logit",
}
"""By feature_type."""
_FEATURE_ID = re.compile(r"(\d+)_(\d+)_(\d+)")
EMBEDDING_LAYER = -1
VIEW_SCRIPTS = ("tokens.js", "svg.js", "graph_model.js", "graph_drawing.js", "graph_details.js", "graph.js")
"""The view of a graph; a page's own script follows them."""


@dataclass(frozen=True, kw_only=True)
class GraphData:
    """A graph whose form was checked, as the page's script reads it."""

    tokens: list[str]
    nodes: list[dict[str, Any]]
    links: list[tuple[int, int, float]]
    """Numbers of source and target, and the weight."""
    pinned: list[int]
    groups: list[tuple[str, list[int]]]


def read_graph(path: str | Path) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: If it is not there, or no JSON object.
    """
    path = Path(path)
    try:
        graph = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a graph's JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is no JSON ({error}); name a graph's JSON file") from None
    if not isinstance(graph, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(graph).__name__}; is it a graph?")
    return graph


def check_graph(graph: Mapping[str, Any], *, features: tuple[int, int] | None = None) -> GraphData:
    """Read what the page shows, and refuse anything of another form.

    Args:
        features: Layers and features of a layer that there are; none takes any.
    Raises:
        DataError: If a part is missing or of another form, or a link names no node.
    """
    metadata = _part(graph, "metadata", dict)
    tokens = [visible(str(token)) for token in _part(metadata, "prompt_tokens", list)]
    nodes = [_node(node, len(tokens), features) for node in _part(graph, "nodes", list)]
    top = max((node["layer"] for node in nodes if node["kind"] != "logit"), default=0) + 1
    for node in nodes:
        if node["kind"] == "logit":  # some writers leave a row between them and the last layer
            node["layer"] = top
    number = {node["id"]: index for index, node in enumerate(nodes)}
    if len(number) != len(nodes):
        raise DataError("nodes must have different node_ids, two have the same; write the graph again")

    def of(name: Any, where: str) -> int:
        if not isinstance(name, str) or name not in number:
            raise DataError(f"{where} names the node {name!r}, which the graph does not have")
        return number[name]

    links = []
    for link in _part(graph, "links", list):
        weight = _number(link, "weight", "a link")
        if weight is None:
            raise DataError(f"a link has no weight: {link!r}; write the graph again")
        links.append((of(link.get("source"), "a link"), of(link.get("target"), "a link"), weight))
    params = _part(graph, "qParams", dict) if graph.get("qParams") else {}
    pinned = [of(name, "pinnedIds") for name in params.get("pinnedIds") or []]
    groups = []
    for group in params.get("supernodes") or []:
        if not isinstance(group, list) or len(group) < 2:
            raise DataError(f"a supernode must be a list of a name and nodes, got {group!r}")
        groups.append((visible(str(group[0])), [of(member, "a supernode") for member in group[1:]]))
    return GraphData(tokens=tokens, nodes=nodes, links=links, pinned=pinned, groups=groups)


def graph_page(
    graph: GraphData | Mapping[str, Any],
    *,
    title: str = "Attribution graph",
    feature_href: Callable[[int, int], str] | None = None,
    nav: Sequence[Link] = (),
) -> str:
    """A page to look at a graph: zoom, choose, pin and group nodes, and follow links to features.

    Args:
        graph: As JSON of circuit-tracer's form, or checked already.
        feature_href: Where the dashboard of a feature (layer, number) is; none links to no dashboards.
        nav: Pages of the same site.
    Raises:
        DataError: If the graph has another form, or is too large for a page.
    """
    data = graph if isinstance(graph, GraphData) else check_graph(graph)
    return html_page(
        title=title,
        body=with_graph_view("graph.html"),
        data=view_data(data, feature_href),
        styles=["graph.css"],
        scripts=[*VIEW_SCRIPTS, "graph_start.js"],
        nav=nav,
    )


def with_graph_view(name: str) -> str:
    """Markup of a page that shows graphs, with the view of them in its place."""
    return static(name).replace("{graph}", static("graph_view.html"))


def view_data(data: GraphData, feature_href: Callable[[int, int], str] | None = None) -> dict[str, Any]:
    """What the view's script reads of one graph."""
    nodes = [
        {
            **node,
            "href": None
            if feature_href is None or node["kind"] != "feature"
            else feature_href(node["layer"], node["number"]),
        }
        for node in data.nodes
    ]
    return {
        "tokens": data.tokens,
        "nodes": nodes,
        "links": data.links,
        "pinned": data.pinned,
        "groups": data.groups,
    }


def _node(node: Any, n_positions: int, features: tuple[int, int] | None) -> dict[str, Any]:
    name = node.get("node_id") if isinstance(node, dict) else None
    if not isinstance(name, str):
        raise DataError(f"a node must be an object with a node_id, got {node!r}")
    kind = KINDS.get(node.get("feature_type", ""))
    if kind is None:
        raise DataError(
            f"node {name} has feature_type {node.get('feature_type')!r}, known are {', '.join(KINDS)}"
        )
    position = node.get("ctx_idx")
    if type(position) is not int or not 0 <= position < n_positions:
        raise DataError(f"node {name} has ctx_idx {position!r}, the prompt has {n_positions} tokens")
    layer, number = _layer(node, name), None
    if kind == "feature":
        found = _FEATURE_ID.fullmatch(name)
        if found is None:
            raise DataError(f"node {name} is a feature, whose node_id is LAYER_NUMBER_POSITION; it is not")
        layer, number = int(found[1]), int(found[2])
        if features is not None and (layer >= features[0] or number >= features[1]):
            raise DataError(
                f"node {name} is feature {number} of layer {layer}, the transcoder has {features[0]} layers of "
                f"{features[1]}; is the graph another transcoder's?"
            )
    return {
        "id": name,
        "kind": kind,
        "layer": layer,
        "number": number,
        "position": position,
        "text": visible(str(node.get("clerp") or "")),
        "activation": _number(node, "activation", f"node {name}"),
        "influence": _number(node, "influence", f"node {name}"),
        "probability": _number(node, "token_prob", f"node {name}") if kind == "logit" else None,
    }


def _layer(node: Mapping[str, Any], name: str) -> int:
    layer = str(node.get("layer"))
    if layer == "E":
        return EMBEDDING_LAYER
    if not layer.isdecimal():
        raise DataError(f"node {name} has layer {layer!r}, expected a number or 'E'")
    return int(layer)


def _part(whole: Mapping[str, Any], name: str, kind: type) -> Any:
    part = whole.get(name)
    if not isinstance(part, kind):
        raise DataError(
            f"a graph needs {name}, a JSON {'object' if kind is dict else 'list'}, got "
            f"{type(part).__name__}; is it JSON of circuit-tracer's form?"
        )
    return part


def _number(whole: Any, name: str, where: str) -> float | None:
    value = whole.get(name) if isinstance(whole, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where} has {name} {value!r}, expected a finite number")
    return float(value)
