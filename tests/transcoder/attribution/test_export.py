"""The viewers' JSON: its schema, its names, and that it says what the graph says."""

import json
from dataclasses import replace

import pytest
import torch
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

from mdlm_interp.errors import ConfigError, DataError, OutputExistsError
from transcoder.attribution import graph_json, prune, write_graph_json
from transcoder.attribution.export import cantor_pairing

TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}


def schema(properties, required=None):
    """An object with at least these entries."""
    return {"type": "object", "properties": properties, "required": list(required or properties)}


def many(items):
    return {"type": "array", "items": items}


# What Neuronpedia's graph-schema.json asks for, and the fields of circuit-tracer's graph_models.py.
NODE = {
    "node_id": TEXT,
    "feature": WHOLE,
    "layer": TEXT,
    "ctx_idx": WHOLE,
    "feature_type": {"enum": ["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]},
    "token_prob": NUMBER,
    "is_target_logit": {"type": "boolean"},
    "run_idx": WHOLE,
    "reverse_ctx_idx": WHOLE,
    "jsNodeId": TEXT,
    "clerp": TEXT,
    "influence": NUMBER,
    "activation": {"type": ["number", "null"]},
}
METADATA = {
    "slug": TEXT,
    "scan": TEXT,
    "transcoder_list": many(TEXT),
    "prompt_tokens": many(TEXT),
    "prompt": TEXT,
    "node_threshold": NUMBER,
    "schema_version": WHOLE,
    "info": schema({"description": TEXT, "generator": schema({"name": TEXT, "version": TEXT})}),
    "generation_settings": schema({}),
    "pruning_settings": schema({"node_threshold": NUMBER, "edge_threshold": NUMBER}),
}
Q_PARAMS = {
    "pinnedIds": many(TEXT),
    "supernodes": many(many(TEXT)),
    "linkType": TEXT,
    "clickedId": TEXT,
    "sg_pos": TEXT,
}
GRAPH = schema(
    {
        "metadata": schema(METADATA),
        "qParams": schema(Q_PARAMS),
        "nodes": many(schema(NODE)),
        "links": many(schema({"source": TEXT, "target": TEXT, "weight": NUMBER})),
    }
)


def errors_of(found):
    return [error.message for error in Draft7Validator(GRAPH).iter_errors(json.loads(json.dumps(found)))]


@pytest.fixture(scope="module")
def pruned(graph):
    return prune(graph, 0.8, 0.95)


@pytest.fixture
def settings(graph):
    return {
        "tokens": [f" t{token}" for token in graph.input_ids.tolist()],
        "logit_tokens": {token: f"<{token}>" for token in graph.logits[:, 1].tolist()},
        "slug": "a-graph",
        "scan": "tiny",
    }


@pytest.fixture
def found(graph, pruned, settings):
    return graph_json(graph, pruned, **settings, labels={(0, int(graph.features[0, 2])): "first"})


def test_the_json_fits_the_viewers_schema(found):
    assert errors_of(found) == []


@pytest.mark.parametrize("part", ["nodes", "links"])
def test_the_schema_sees_a_missing_and_a_wrong_field(found, part):
    for field in list(found[part][0]):
        without = {key: value for key, value in found[part][0].items() if key != field}
        assert errors_of(found | {part: [without]}) != []
        assert errors_of(found | {part: [found[part][0] | {field: ["x"]}]}) != []


def test_nodes_are_the_kept_ones_and_have_names_of_their_own(graph, pruned, found):
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(ids) == len(set(ids)) == int(pruned.nodes.sum())
    kinds = [node["feature_type"] for node in found["nodes"]]
    assert kinds.count("embedding") == graph.n_positions
    assert kinds.count("logit") == len(graph.logits)
    assert kinds.count("cross layer transcoder") == int(pruned.nodes[: graph.n_features].sum()) > 0
    assert kinds.count("mlp reconstruction error") > 0
    for node in found["nodes"]:
        if node["feature_type"] == "mlp reconstruction error":
            # Read as layer, feature and position: no feature is -1, so none has this name.
            parts = [int(part) for part in node["node_id"].split("_")]
            assert parts == [int(node["layer"]), -1, node["ctx_idx"]]


def test_links_are_the_kept_edges_with_their_weights(graph, pruned, found):
    nodes = dict(zip(pruned.nodes.nonzero()[:, 0].tolist(), found["nodes"], strict=True))
    expected = {
        (nodes[source]["node_id"], nodes[target]["node_id"]): float(graph.edges[target, source])
        for target, source in pruned.edges.nonzero().tolist()
    }
    assert {(link["source"], link["target"]): link["weight"] for link in found["links"]} == expected
    assert len(found["links"]) == len(expected) > 100


def test_a_feature_node_says_which_feature_it_is(graph, pruned, found):
    for node, written in zip(pruned.nodes.nonzero()[:, 0].tolist(), found["nodes"], strict=True):
        layer, position = graph.place(node)
        assert written["ctx_idx"] == position
        assert written["influence"] == pytest.approx(float(pruned.cumulative[node]))
        if written["feature_type"] == "cross layer transcoder":
            feature = int(graph.features[node, 2])
            assert unpaired(written["feature"]) == (layer, feature)
            assert written["node_id"] == f"{layer}_{feature}_{position}"
            assert written["activation"] == pytest.approx(float(graph.activations[node]))
        else:
            assert written["activation"] is None


def unpaired(number):
    """The inverse of the Cantor pairing, as the viewers compute it."""
    total = int(((8 * number + 1) ** 0.5 - 1) / 2)
    y = number - total * (total + 1) // 2
    return total - y, y


def test_pairs_of_large_numbers_come_back():
    for x, y in ((0, 0), (11, 98303), (25, 2_500_000), (3, 7)):
        assert unpaired(cantor_pairing(x, y)) == (x, y)


def test_logits_stand_at_their_masks_and_the_likeliest_of_each_is_the_target(graph, found):
    written = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert [(node["ctx_idx"], node["feature"]) for node in written] == [
        tuple(row) for row in graph.logits.tolist()
    ]
    for position in (0, 5, 9):
        here = [node for node in written if node["ctx_idx"] == position]
        best = max(here, key=lambda node: node["token_prob"])
        assert [node for node in here if node["is_target_logit"]] == [best]
        assert best["clerp"] == f'Output "<{best["feature"]}>" (p={best["token_prob"]:.3f})'


def test_labels_reach_their_features(graph, pruned, settings):
    node = int(pruned.nodes.nonzero()[0, 0])
    layer, _, feature = graph.features[node].tolist()
    found = graph_json(graph, pruned, **settings, labels={(layer, feature): "a name"})
    named = [one for one in found["nodes"] if one["clerp"] == "a name"]
    assert named
    assert all(one["feature"] == cantor_pairing(layer, feature) for one in named)


def test_files_are_listed_once_and_kept_unless_replaced(found, tmp_path):
    path = write_graph_json(found, tmp_path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    other = found | {"metadata": found["metadata"] | {"slug": "b"}}
    write_graph_json(other, tmp_path)
    with pytest.raises(OutputExistsError, match=r"a-graph.json exists"):
        write_graph_json(found, tmp_path)
    write_graph_json(found, tmp_path, overwrite=True)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["b", "a-graph"]


def test_what_cannot_be_written_is_refused(graph, pruned, settings, found, tmp_path):
    for slug in ("", "../x", "a b", ".x"):
        with pytest.raises(ConfigError, match="slug must be letters"):
            graph_json(graph, pruned, **(settings | {"slug": slug}))
    with pytest.raises(DataError, match=r"tokens must be the texts of 12 positions, got 1"):
        graph_json(graph, pruned, **(settings | {"tokens": ["x"]}))
    with pytest.raises(DataError, match="logit_tokens must have a text"):
        graph_json(graph, pruned, **(settings | {"logit_tokens": {}}))
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(DataError, match="lists no graphs"):
        write_graph_json(found, tmp_path)


def test_a_number_that_is_none_is_never_written(graph, pruned, settings, tmp_path):
    edges = graph.edges.clone()
    target, source = pruned.edges.nonzero()[0].tolist()
    edges[target, source] = torch.nan
    found = graph_json(replace(graph, edges=edges), pruned, **settings)
    with pytest.raises(ValueError, match="JSON"):
        write_graph_json(found, tmp_path)
    assert not list(tmp_path.iterdir())
