"""Graphs to disk and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdlm_interp.errors import DataError, OutputExistsError
from transcoder.attribution import Graph
from transcoder.attribution.storage import PLAIN_FIELDS, SETTINGS, TENSOR_FIELDS, TENSORS


@pytest.fixture
def saved(graph, tmp_path):
    graph.save(tmp_path / "graph")
    return tmp_path / "graph"


def test_a_graph_comes_back_bit_for_bit(graph, saved):
    loaded = Graph.load(saved)
    for name in TENSOR_FIELDS:
        assert torch.equal(getattr(loaded, name), getattr(graph, name)), name
    assert {name: getattr(loaded, name) for name in PLAIN_FIELDS} == {
        name: getattr(graph, name) for name in PLAIN_FIELDS
    }
    assert {*TENSOR_FIELDS, *PLAIN_FIELDS} == set(vars(graph))  # no field is forgotten


def test_nothing_is_overwritten(graph, saved):
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        graph.save(saved)


def damage_byte(directory):
    content = bytearray((directory / TENSORS).read_bytes())
    content[-5] ^= 1
    (directory / TENSORS).write_bytes(bytes(content))


def change_settings(**changes):
    def change(directory):
        settings = json.loads((directory / SETTINGS).read_text()) | changes
        (directory / SETTINGS).write_text(json.dumps(settings))

    return change


def drop_a_tensor(directory):
    tensors = load_file(directory / TENSORS)
    del tensors["edges"]
    save_file(tensors, directory / TENSORS)
    import hashlib

    change_settings(sha256=hashlib.sha256((directory / TENSORS).read_bytes()).hexdigest())(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, "its SHA-256 differs; save it again"),
        (drop_a_tensor, "other tensors than a graph's, first 'edges'"),
        (lambda directory: (directory / TENSORS).unlink(), "has no graph.safetensors"),
        (lambda directory: (directory / SETTINGS).unlink(), "is it an attribution graph?"),
        (lambda directory: (directory / SETTINGS).write_text("{"), "not valid JSON"),
        (change_settings(format="x"), "is not the settings of an attribution graph"),
        (change_settings(version=2), "has version 2, this program reads 1"),
        (change_settings(mask_id="x"), "mask_id must be int, got 'x'"),
        (change_settings(n_layers=4), r"a graph of \d+ nodes has edges"),
    ],
)
def test_damage_is_told(saved, damage, message):
    damage(saved)
    with pytest.raises(DataError, match=message):
        Graph.load(saved)
