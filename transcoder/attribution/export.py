"""Graphs as the JSON that the viewers of circuit-tracer and Neuronpedia read.

    SLUG.json              metadata, qParams, nodes, links: the kept part of a pruned graph
    graph-metadata.json    the metadata of all graphs in the directory, from which the viewer lists them

A node's "feature" is the Cantor pairing of its layer and number; its "influence" is cumulative, as `prune` has it, so
that the viewers' slider prunes further. Logits stand at the positions they predict, which need not be the last.

Source:
    circuit-tracer, frontend/graph_models.py and utils/create_graph_files.py; Neuronpedia, graph-schema.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdlm_interp import __version__
from mdlm_interp.atomic_files import replacing
from mdlm_interp.errors import ConfigError, DataError, OutputExistsError
from transcoder.attribution.graph import Graph
from transcoder.attribution.influence import Pruned

INDEX = "graph-metadata.json"
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cantor_pairing(x: int, y: int) -> int:
    """One number for two, both at least 0.

    >>> [cantor_pairing(x, y) for x, y in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))]
    [0, 1, 2, 3, 4, 5]
    """
    return (x + y) * (x + y + 1) // 2 + y


def graph_json(
    graph: Graph,
    pruned: Pruned,
    tokens: Sequence[str],
    *,
    logit_tokens: Mapping[int, str],
    slug: str,
    scan: str,
    prompt: str | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> dict[str, Any]:
    """The kept part of a graph as the viewers' JSON.

    Args:
        tokens: Text of each position.
        logit_tokens: Text of each token that a logit node predicts, by id.
        slug: Name of the graph, which becomes the file's.
        scan: What the viewer calls the model and transcoder.
        prompt: Text of the state; the tokens put together if none.
        labels: What features are called, by layer and number.
    Raises:
        ConfigError: If the slug is no plain file name.
        DataError: If there is not one text for each token.
    """
    if not SLUG.fullmatch(slug):
        raise ConfigError(
            f"slug must be letters, digits, '.', '_' and '-', and start with one of the first two, got {slug!r}"
        )
    if len(tokens) != graph.n_positions:
        raise DataError(f"tokens must be the texts of {graph.n_positions} positions, got {len(tokens)}")
    missing = sorted(set(graph.logits[:, 1].tolist()) - set(logit_tokens))
    if missing:
        raise DataError(f"logit_tokens must have a text for each logit's token, got none for {missing[0]}")
    kept = pruned.nodes.nonzero()[:, 0].tolist()
    nodes = {
        node: _node(graph, node, tokens, logit_tokens, labels or {}, float(pruned.cumulative[node]))
        for node in kept
    }
    links = [
        {
            "source": nodes[source]["node_id"],
            "target": nodes[target]["node_id"],
            "weight": float(graph.edges[target, source]),
        }
        for target, source in pruned.edges.nonzero().tolist()
    ]
    prompt = "".join(tokens) if prompt is None else prompt
    metadata = _metadata(graph, pruned, slug, scan, list(tokens), prompt)
    q_params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": q_params, "nodes": list(nodes.values()), "links": links}


def write_graph_json(found: Mapping[str, Any], directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write what `graph_json` made, and list it in the directory's index.

    Raises:
        OutputExistsError: If a graph of this slug is there and `overwrite` was not said.
        DataError: If the directory's index is none.
        WriteError: If the disk refuses.
    """
    directory, slug = Path(directory), found["metadata"]["slug"]
    path = directory / f"{slug}.json"
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another slug, or replace it")
    listed = [one for one in _listed(directory / INDEX) if one.get("slug") != slug]
    with replacing(path) as partial:
        partial.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    with replacing(directory / INDEX) as partial:
        partial.write_text(json.dumps({"graphs": [*listed, found["metadata"]]}), encoding="utf-8")
    return path


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); remove it") from None
    graphs = found.get("graphs") if isinstance(found, dict) else None
    if not isinstance(graphs, list) or not all(isinstance(one, dict) for one in graphs):
        raise DataError(f"{path} lists no graphs under 'graphs'; remove it")
    return graphs


def _metadata(
    graph: Graph, pruned: Pruned, slug: str, scan: str, tokens: list[str], prompt: str
) -> dict[str, Any]:
    shares = {"node_threshold": pruned.node_share, "edge_threshold": pruned.edge_share}
    return {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": prompt,
        "node_threshold": pruned.node_share,
        "schema_version": 1,
        "info": {
            "description": f"masked state at sigma {graph.sigma}, logits centred by {graph.centre}",
            "generator": {"name": "mdlm-interp", "version": __version__},
        },
        "generation_settings": {**graph.about, "centre": graph.centre, "feature_nodes": graph.n_features},
        "pruning_settings": shares,
    }


def _node(
    graph: Graph,
    node: int,
    tokens: Sequence[str],
    logit_tokens: Mapping[int, str],
    labels: Mapping[tuple[int, int], str],
    influence: float,
) -> dict[str, Any]:
    """A node with the fields of the viewers' kinds."""
    layer, position = graph.place(node)
    common: dict[str, Any] = {
        "ctx_idx": position,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "token_prob": 0.0,
        "is_target_logit": False,
    }
    common |= {"influence": influence, "activation": None, "clerp": ""}
    kind = graph.kind(node)
    if kind == "feature":
        feature = int(graph.features[node, 2])
        return common | {
            "node_id": f"{layer}_{feature}_{position}",
            "jsNodeId": f"{layer}_{feature}-0",
            "feature": cantor_pairing(layer, feature),
            "layer": str(layer),
            "feature_type": "cross layer transcoder",  # the viewers have this name for every transcoder
            "activation": float(graph.activations[node]),
            "clerp": labels.get((layer, feature), ""),
        }
    if kind == "error":
        # Not 0_{layer}_{position}, as circuit-tracer once had it: that is also a feature's name.
        return common | {
            "node_id": f"{layer}_-1_{position}",
            "jsNodeId": f"{layer}_-1-{position}",
            "feature": -1,
            "layer": str(layer),
            "feature_type": "mlp reconstruction error",
        }
    if kind == "embedding":
        token = int(graph.input_ids[position])
        return common | {
            "node_id": f"E_{token}_{position}",
            "jsNodeId": f"E_{token}-{position}",
            "feature": position,
            "layer": "E",
            "feature_type": "embedding",
            "clerp": f'token "{tokens[position]}"',
        }
    return common | _logit(graph, node - graph.logit_start, logit_tokens)


def _logit(graph: Graph, number: int, logit_tokens: Mapping[int, str]) -> dict[str, Any]:
    position, token = graph.logits[number].tolist()
    probability = float(graph.probabilities[number])
    here = graph.probabilities[graph.logits[:, 0] == position]
    layer = str(graph.n_layers + 1)
    return {
        "node_id": f"{layer}_{token}_{position}",
        "jsNodeId": f"L_{token}-{position}",
        "feature": token,
        "layer": layer,
        "feature_type": "logit",
        "token_prob": probability,
        "is_target_logit": probability == float(here.max()),
        "clerp": f'Output "{logit_tokens[token]}" (p={probability:.3f})',
    }
