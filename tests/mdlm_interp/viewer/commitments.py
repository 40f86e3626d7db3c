"""Three commitments written by hand: a token, the two it depended on, and their graphs."""

from __future__ import annotations

from typing import Any

from mdlm_interp.viewer.commitments_page import CommitmentData, Dependence, Origins, Unfollowed
from mdlm_interp.viewer.graph_page import check_graph

FEATURE = "cross layer transcoder"
LENGTH = 5


def graph(position: int, tokens: list[str], weight: float) -> dict[str, Any]:
    """Every token, one feature and one prediction at a position, in circuit-tracer's form."""
    nodes: list[dict[str, Any]] = [
        {"node_id": f"E_{q}_{q}", "feature_type": "embedding", "layer": "E", "ctx_idx": q}
        for q in range(LENGTH)
    ]
    feature, prediction = f"0_7_{position}", f"2_9_{position}"
    nodes += [
        {"node_id": feature, "feature_type": FEATURE, "layer": "0", "ctx_idx": position, "activation": 1.5},
        {
            "node_id": prediction,
            "feature_type": "logit",
            "layer": "2",
            "ctx_idx": position,
            "token_prob": 0.5,
        },
    ]
    links = [{"source": "E_0_0", "target": feature, "weight": weight}]
    links += [{"source": feature, "target": prediction, "weight": 1.0}]
    return {"metadata": {"prompt_tokens": tokens}, "nodes": nodes, "links": links}


def commitment(
    step: int, position: int, token: str, weight: float, shares: list[float], **more: Any
) -> CommitmentData:
    """In a state whose first token is given, and whose others were written by the steps of `writers` or are masks."""
    writers = more.get("writers", [-1] * LENGTH)
    masked = [q > 0 and writers[q] < 0 for q in range(LENGTH)]
    tokens = ["[MASK]" if mask else f" w{q}" for q, mask in enumerate(masked)]
    tokens[0] = more.get("first", "One")
    given, committed, masks, errors = shares
    at = [given] + [0.0 if mask else committed / max(sum(w >= 0 for w in writers), 1) for mask in masked[1:]]
    at[position] += masks
    return CommitmentData(
        step=step,
        position=position,
        token=token,
        weight=weight,
        origins=Origins(given=given, committed=committed, masks=masks, errors=errors),
        shares=at,
        writers=writers,
        masked=masked,
        graph=check_graph(graph(position, tokens, weight)),
    )


def story(attack: str = "") -> tuple[list[CommitmentData], list[Dependence], list[Unfollowed]]:
    """Step 5 explained by steps 0 and 3; step 1 has no graph."""
    commitments = [
        commitment(
            5, 4, f" he{attack}", 1.0, [0.3, 0.4, 0.2, 0.1], writers=[-1, 0, 1, 3, -1], first=f"One{attack}"
        ),
        commitment(3, 3, " and", 0.3, [0.25, 0.5, 0.125, 0.125], writers=[-1, 0, 1, -1, -1]),
        commitment(0, 1, " boy", 0.19, [0.9, 0.0, 0.06, 0.04]),
    ]
    links = [
        Dependence(earlier=1, later=0, share=0.3),
        Dependence(earlier=2, later=0, share=0.1),
        Dependence(earlier=2, later=1, share=0.3),
    ]
    return commitments, links, [Unfollowed(step=1, position=2, token=f" a{attack}", weight=0.05)]
