"""Why a token was committed, and why the tokens before it were, as one HTML page.

A line for each commitment in the order of steps, arcs between those that depend on one another, and below the
attribution graph of the chosen one. Steps and positions count from 0, as in the trajectory's and the graphs' files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mdlm_interp.errors import DataError
from mdlm_interp.viewer.graph_page import VIEW_SCRIPTS, GraphData, view_data, with_graph_view
from mdlm_interp.viewer.page import Link, html_page
from mdlm_interp.viewer.text import visible


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Shares of an influence by where it begins; they add up to one."""

    given: float
    """At tokens that stood there from the start."""
    masks: float
    committed: float
    """At tokens that earlier steps committed."""
    errors: float
    """At error terms."""


@dataclass(frozen=True, kw_only=True)
class CommitmentData:
    """One committed token, with the graph of its logit in the state before its step."""

    step: int
    position: int
    token: str
    weight: float
    """Share of the explained token's influence that passes through this one; 1 for that token."""
    origins: Origins
    shares: Sequence[float]
    """Of its influence, at each position's embedding."""
    writers: Sequence[int]
    """Step that wrote what stands at each position of its state; -1 for what nothing wrote, masks among them."""
    masked: Sequence[bool]
    """Whether a position of its state is a mask."""
    graph: GraphData


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """A commitment that stands in the state of a later one; both by number."""

    earlier: int
    later: int
    share: float
    """Of the later one's influence that begins at the earlier one's embedding."""


@dataclass(frozen=True, kw_only=True)
class Unfollowed:
    """A commitment that influences the explained token and has no graph."""

    step: int
    position: int
    token: str
    weight: float


def commitments_page(
    commitments: Sequence[CommitmentData],
    links: Sequence[Dependence],
    left_out: Sequence[Unfollowed] = (),
    *,
    n_steps: int,
    title: str = "Why this token, and why those before it",
    feature_href: Callable[[int, int], str] | None = None,
    nav: Sequence[Link] = (),
) -> str:
    """A page that leads from a token to the tokens it depended on when it was committed, and to their graphs.

    Args:
        commitments: The explained token first.
        n_steps: Of the whole trajectory.
        feature_href: Where the dashboard of a feature (layer, number) is; none links to no dashboards.
        nav: Pages of the same site.
    Raises:
        DataError: If there is no commitment, a link names none, a state does not have its graph's length, or the
            page would be too large.
    """
    _check(commitments, links)
    return html_page(
        title=title,
        body=with_graph_view("commitments.html"),
        data={
            "nSteps": n_steps,
            "commitments": [_commitment(one, feature_href) for one in commitments],
            "links": [[link.earlier, link.later, link.share] for link in links],
            "origins": _origins(commitments, links),
            "leftOut": [{**asdict(one), "token": visible(one.token)} for one in left_out],
        },
        styles=["graph.css", "commitments.css"],
        scripts=[*VIEW_SCRIPTS, "commitments_timeline.js", "commitments.js"],
        nav=nav,
    )


def _check(commitments: Sequence[CommitmentData], links: Sequence[Dependence]) -> None:
    if not commitments:
        raise DataError("a page shows at least one commitment, got none; give the explained token's")
    for number, one in enumerate(commitments):
        lengths = {len(one.shares), len(one.writers), len(one.masked)}
        if lengths != {len(one.graph.tokens)}:
            raise DataError(
                f"commitment {number} has shares, writers and masks of {sorted(lengths)} positions, its graph "
                f"{len(one.graph.tokens)}; give those of its state"
            )
    for link in links:
        for number in (link.earlier, link.later):
            if not 0 <= number < len(commitments):
                raise DataError(
                    f"a link names commitment {number}, there are {len(commitments)}; they count from 0"
                )
        if commitments[link.earlier].step >= commitments[link.later].step:
            raise DataError(
                f"a link leads from commitment {link.earlier} of step {commitments[link.earlier].step} to "
                f"{link.later} of step {commitments[link.later].step}; a token depends on earlier steps only"
            )


def _commitment(one: CommitmentData, feature_href: Callable[[int, int], str] | None) -> dict[str, Any]:
    return {
        "step": one.step,
        "position": one.position,
        "token": visible(one.token),
        "weight": one.weight,
        "shares": [one.origins.given, one.origins.committed, one.origins.masks, one.origins.errors],
        "at": list(one.shares),
        "writers": list(one.writers),
        "masked": list(one.masked),
        "graph": view_data(one.graph, feature_href),
    }


def _origins(commitments: Sequence[CommitmentData], links: Sequence[Dependence]) -> list[dict[int, int]]:
    """Per commitment: position of a token in its state, and the number of the commitment that wrote it."""
    found: list[dict[int, int]] = [{} for _ in commitments]
    for link in links:
        found[link.later][commitments[link.earlier].position] = link.earlier
    return found
