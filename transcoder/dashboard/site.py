"""One directory of HTML pages about a transcoder, which needs no server and no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdlm_interp.atomic_files import replacing_directory
from mdlm_interp.decoding.trajectory import Trajectory
from mdlm_interp.errors import DataError
from mdlm_interp.viewer.graph_page import GraphData, check_graph, graph_page
from mdlm_interp.viewer.page import Link, html_page, static
from mdlm_interp.viewer.text import Decoder, visible
from mdlm_interp.viewer.trajectory_page import check_tokenizer, trajectory_page
from transcoder.attribution.influence import Pruned
from transcoder.attribution.pages import check_commitments, commitment_graph_page
from transcoder.attribution.steps import CommitmentGraph
from transcoder.dashboard.features import Dashboards
from transcoder.dashboard.pages import DIRECTORY, dashboard_pages, feature_href, table_page

HOME, FEATURES, GRAPH = "index.html", "features.html", "graph.html"
COMMITMENTS, TRAJECTORY = "commitments.html", "trajectory.html"
DECADES = 6
"""Of the density histogram: from one token in a million to every one."""
BINS_PER_DECADE = 2
NAME_TOKENS = 3
"""Promoted tokens that a feature of a graph is called by."""


@dataclass(frozen=True, kw_only=True)
class Commitments:
    """A commitment graph of the site's trajectory."""

    found: CommitmentGraph
    row: int = 0
    """Of the trajectory's batch."""
    pruned: Sequence[Pruned] | None = None
    """Kept part of each commitment's graph, in their order; `prune`'s defaults if none."""


def write_site(
    out: str | Path,
    boards: Dashboards,
    tokenizer: Decoder,
    *,
    about: Sequence[tuple[str, str]] = (),
    graph: Mapping[str, Any] | None = None,
    commitments: Commitments | None = None,
    trajectory: Trajectory | None = None,
) -> Path:
    """Write all pages, or none; returns the first one to open.

    Args:
        out: Directory that does not exist yet, or is empty.
        tokenizer: Of the model.
        about: What was looked at, as names and values for the first page.
        graph: Attribution graph in circuit-tracer's JSON form, of the same transcoder.
        commitments: Why the trajectory's tokens were committed, by features of the same transcoder.
        trajectory: Decoding by the same model.
    Raises:
        OutputExistsError: If something is at `out`.
        DataError: If a graph has another form, other features or is of another trajectory, or the trajectory has
            another tokenizer.
        WriteError: If the disk refuses.
    """
    out = Path(out)
    # Asked before anything is written, since a site is there whole or not at all.
    shape = (boards.config.n_layers, boards.config.n_features)
    checked = None if graph is None else check_graph(graph, features=shape)
    if trajectory is not None:
        check_tokenizer(trajectory, tokenizer)
    if commitments is not None:
        if trajectory is None:
            raise DataError("commitments are shown with the trajectory that they are of; give it too")
        check_commitments(commitments.found, trajectory, tokenizer, row=commitments.row, features=shape)
    names = {HOME: "Run", FEATURES: "Features"}
    names |= {GRAPH: "Attribution graph"} if graph is not None else {}
    names |= {COMMITMENTS: "Commitments"} if commitments is not None else {}
    names |= {TRAJECTORY: "Decoding"} if trajectory is not None else {}

    def nav(current: str, prefix: str = "") -> list[Link]:
        return [Link(name, prefix + file, file == current) for file, name in names.items()]

    feature_name = _by_promoted_tokens(boards, tokenizer)
    with replacing_directory(out) as partial:
        (partial / DIRECTORY).mkdir()
        _write(partial / HOME, _home_page(boards, about, nav(HOME)))
        _write(partial / FEATURES, table_page(boards, tokenizer, nav(FEATURES)))
        for file, page in dashboard_pages(boards, tokenizer, nav("", "../")):
            _write(partial / file, page)
        if checked is not None:
            named = _named(checked, feature_name)
            page = graph_page(named, feature_href=feature_href, nav=nav(GRAPH))
            _write(partial / GRAPH, page)
        if commitments is not None and trajectory is not None:
            page = commitment_graph_page(
                commitments.found,
                trajectory,
                tokenizer,
                row=commitments.row,
                pruned=commitments.pruned,
                feature_name=feature_name,
                feature_href=feature_href,
                nav=nav(COMMITMENTS),
            )
            _write(partial / COMMITMENTS, page)
        if trajectory is not None:
            _write(partial / TRAJECTORY, trajectory_page(trajectory, tokenizer, nav=nav(TRAJECTORY)))
    return out / HOME


def _write(path: Path, page: str) -> None:
    path.write_text(page, encoding="utf-8")


def _by_promoted_tokens(boards: Dashboards, tokenizer: Decoder) -> Callable[[int, int], str]:
    """What a feature (layer, number) is called that nobody named."""

    def name(layer: int, number: int) -> str:
        tokens = boards.written.promoted[layer, number, :NAME_TOKENS].tolist()
        return "→" + ",".join(visible(tokenizer.token(token)) for token in tokens)

    return name


def _named(graph: GraphData, feature_name: Callable[[int, int], str]) -> GraphData:
    """The graph with names for features that have none."""

    def named(node: dict[str, Any]) -> dict[str, Any]:
        if node["kind"] != "feature" or node["text"]:
            return node
        return {**node, "text": feature_name(node["layer"], node["number"])}

    return replace(graph, nodes=[named(node) for node in graph.nodes])


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
