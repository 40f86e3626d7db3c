"""One directory of HTML pages about a transcoder, which needs no server and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mdlm_interp.atomic_files import replacing_directory
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.viewer.graph_page import GraphData, check_graph, graph_page
from mdlm_interp.viewer.page import Link, html_page, static
from mdlm_interp.viewer.text import Decoder, visible
from mdlm_interp.viewer.trajectory_page import check_tokenizer, trajectory_page
from transcoder.dashboard.features import Dashboards
from transcoder.dashboard.pages import DIRECTORY, dashboard_pages, feature_href, table_page

HOME, FEATURES, GRAPH, TRAJECTORY = "index.html", "features.html", "graph.html", "trajectory.html"
DECADES = 6
"""Of the density histogram: from one token in a million to every one."""
BINS_PER_DECADE = 2
NAME_TOKENS = 3
"""Promoted tokens that a feature of the graph is called by."""


def write_site(
    out: str | Path,
    boards: Dashboards,
    tokenizer: Decoder,
    *,
    about: Sequence[tuple[str, str]] = (),
    graph: Mapping[str, Any] | None = None,
    trajectory: Trajectory | None = None,
) -> Path:
    """Write all pages, or none; returns the first one to open.

    Args:
        out: Directory that does not exist yet, or is empty.
        tokenizer: Of the model.
        about: What was looked at, as names and values for the first page.
        graph: Attribution graph in circuit-tracer's JSON form, of the same transcoder.
        trajectory: Decoding by the same model.
    Raises:
        OutputExistsError: If something is at `out`.
        DataError: If the graph has another form or other features, or the trajectory another tokenizer.
        WriteError: If the disk refuses.
    """
    out = Path(out)
    # Asked before anything is written, since a site is there whole or not at all.
    shape = (boards.config.n_layers, boards.config.n_features)
    checked = None if graph is None else check_graph(graph, features=shape)
    if trajectory is not None:
        check_tokenizer(trajectory, tokenizer)
    names = {HOME: "Run", FEATURES: "Features"}
    names |= {GRAPH: "Attribution graph"} if graph is not None else {}
    names |= {TRAJECTORY: "Decoding"} if trajectory is not None else {}

    def nav(current: str, prefix: str = "") -> list[Link]:
        return [Link(name, prefix + file, file == current) for file, name in names.items()]

    with replacing_directory(out) as partial:
        (partial / DIRECTORY).mkdir()
        _write(partial / HOME, _home_page(boards, about, nav(HOME)))
        _write(partial / FEATURES, table_page(boards, tokenizer, nav(FEATURES)))
        for file, page in dashboard_pages(boards, tokenizer, nav("", "../")):
            _write(partial / file, page)
        if checked is not None:
            named = _named(checked, boards, tokenizer)
            page = graph_page(named, feature_href=feature_href, nav=nav(GRAPH))
            _write(partial / GRAPH, page)
        if trajectory is not None:
            _write(partial / TRAJECTORY, trajectory_page(trajectory, tokenizer, nav=nav(TRAJECTORY)))
    return out / HOME


def _write(path: Path, page: str) -> None:
    path.write_text(page, encoding="utf-8")


def _named(graph: GraphData, boards: Dashboards, tokenizer: Decoder) -> GraphData:
    """The graph with promoted tokens as the names of features that have none."""

    def name(node: dict[str, Any]) -> dict[str, Any]:
        if node["kind"] != "feature" or node["text"]:
            return node
        tokens = boards.written.promoted[node["layer"], node["number"], :NAME_TOKENS].tolist()
        return {**node, "text": "→" + ",".join(visible(tokenizer.token(token)) for token in tokens)}

    return replace(graph, nodes=[name(node) for node in graph.nodes])


def _home_page(boards: Dashboards, about: Sequence[tuple[str, str]], nav: Sequence[Link]) -> str:
    found, config = boards.occurrences, boards.config
    density = found.density
    edges = 10.0 ** (np.arange(-DECADES * BINS_PER_DECADE, 1) / BINS_PER_DECADE)
    edges[0] = 0.0  # rarer ones count with the rarest
    edges[-1] = 1.0 + 1e-9
    data = {
        "about": [[name, visible(value)] for name, value in about],
        "pages": [[link.name, link.href] for link in nav if not link.current],
        "nRows": found.n_rows,
        "nSequences": found.n_sequences,
        "nFeatures": config.n_features,
        "maskedRows": int(found.rows[1].sum()),
        "decades": DECADES,
        "layers": [
            {
                "silent": int((shares == 0).sum()),
                "median": float(np.median(shares[shares > 0])) if (shares > 0).any() else None,
                "dense": int((shares > 0.1).sum()),
                "active": float(shares.sum()),
                "histogram": np.histogram(shares[shares > 0], edges)[0].tolist(),
            }
            for shares in density
        ],
    }
    return html_page(
        title="Transcoder",
        body=static("site.html"),
        data=data,
        styles=["features.css", "site.css"],
        scripts=["tokens.js", "svg.js", "site.js"],
        nav=nav,
    )
