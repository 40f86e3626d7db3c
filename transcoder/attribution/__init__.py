"""Attribution graphs: which tokens and features made a prediction at a masked position, and through which others.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdlm_interp.lazy_exports import lazily

if TYPE_CHECKING:
    from transcoder.attribution.ablations import Ablations, ablate
    from transcoder.attribution.building import attribute
    from transcoder.attribution.export import graph_json, write_graph_json
    from transcoder.attribution.graph import Graph
    from transcoder.attribution.influence import Pruned, Scores, prune, scores
    from transcoder.attribution.steps import CommitmentGraph, commitment_graph
    from transcoder.attribution.targets import Targets
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "attribute": "transcoder.attribution.building",
            "Targets": "transcoder.attribution.targets",
            "Graph": "transcoder.attribution.graph",
            "prune": "transcoder.attribution.influence",
            "Pruned": "transcoder.attribution.influence",
            "scores": "transcoder.attribution.influence",
            "Scores": "transcoder.attribution.influence",
            "ablate": "transcoder.attribution.ablations",
            "Ablations": "transcoder.attribution.ablations",
            "commitment_graph": "transcoder.attribution.steps",
            "CommitmentGraph": "transcoder.attribution.steps",
            "graph_json": "transcoder.attribution.export",
            "write_graph_json": "transcoder.attribution.export",
        },
    )

__all__ = [
    "attribute",
    "Targets",
    "Graph",
    "prune",
    "Pruned",
    "scores",
    "Scores",
    "ablate",
    "Ablations",
    "commitment_graph",
    "CommitmentGraph",
    "graph_json",
    "write_graph_json",
]
