"""Dashboards of made-up features, and a graph of them, for tests of the pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from capture.schema import T_BINS
from tests.mdlm_interp.viewer.vocabulary import EVIL, MASK, MY, NEWLINE, RULER, STORY, TIM, WORDS
from transcoder.attribution import Graph
from transcoder.attribution.graph import CONSTANTS
from transcoder.attribution.steps import Commitment, CommitmentGraph, Link
from transcoder.config import TranscoderConfig
from transcoder.dashboard import Commitments, Dashboards, Occurrences, Written

__all__ = ["EVIL", "WORDS", "commitments", "graph_json", "made_up"]


def made_up(n_layers: int = 2, n_features: int = 60, n_examples: int = 3, context: int = 12) -> Dashboards:
    """Features whose tokens and figures are drawn; feature 1 of each layer is silent."""
    draw = np.random.default_rng(0)
    shape = (n_layers, n_features)
    active = draw.integers(0, 50, (*shape, 2, T_BINS))
    active[:, 1] = 0
    seqs = np.tile(np.arange(n_examples), (*shape, 1))
    seqs[:, 1] = -1
    place = (*shape, n_examples, 2 * context + 1)
    clean = draw.integers(0, MASK, place).astype(np.int32)
    clean[..., :3] = -1
    clean[..., context - 1 : context + 2] = [EVIL, RULER, NEWLINE]
    acts = draw.random(place).astype(np.float32)
    values = -np.sort(-draw.random((*shape, n_examples)).astype(np.float32) - 1)
    acts[..., context] = values
    ranks = np.tile([EVIL, *range(5)], (*shape, 1))
    found = Occurrences(
        n_sequences=n_examples,
        rows=np.full((2, T_BINS), 1000),
        active=active,
        total=active.astype(np.float64) / 2,
        values=np.where(seqs >= 0, values, np.float32(np.nan)),
        seqs=seqs,
        positions=np.where(seqs >= 0, 20, -1),
        times=np.where(seqs >= 0, 0.4, np.nan),
        starts=np.where(seqs >= 0, 20 - context, -1),
        clean=clean,
        read=np.where((clean >= 0) & (draw.random(place) < 0.4), np.int32(MASK), clean),
        acts=acts,
    )
    nearest = np.stack([np.zeros((*shape, 4), np.int64), np.tile(np.arange(4), (*shape, 1))], axis=-1)
    write = Written(
        norms=[np.ones((n_features, n_layers - layer), np.float32) for layer in range(n_layers)],
        promoted=ranks,
        promoted_by=np.tile(np.linspace(2, 1, 6, dtype=np.float32), (*shape, 1)),
        suppressed=ranks[..., ::-1],
        suppressed_by=np.tile(np.linspace(-2, -1, 6, dtype=np.float32), (*shape, 1)),
        nearest=nearest,
        cosines=np.tile(np.linspace(0.9, 0.3, 4, dtype=np.float32), (*shape, 1)),
    )
    config = TranscoderConfig(n_layers=n_layers, n_features=n_features, d_model=8, k=2)
    return Dashboards(config=config, occurrences=found, written=write)


def graph_json(attack: str = "") -> dict[str, Any]:
    """Two tokens, three features, an error and a prediction, in circuit-tracer's form."""

    def node(name: str, kind: str, layer: str, position: int, **more: Any) -> dict[str, Any]:
        return {"node_id": name, "feature_type": kind, "layer": layer, "ctx_idx": position, **more}

    feature = "cross layer transcoder"
    nodes = [
        node("E_3_0", "embedding", "E", 0, influence=0.5),
        node("E_4_1", "embedding", "E", 1, influence=0.6),
        node("0_5_0", feature, "0", 0, activation=1.5, influence=0.3),
        node("0_7_1", feature, "0", 1, activation=2.5, influence=0.9),
        node("1_52_1", feature, "1", 1, activation=0.5, influence=0.2, clerp=attack),
        node("1_-1_1", "mlp reconstruction error", "1", 1, influence=0.95),
        node("3_9_1", "logit", "3", 1, token_prob=0.75, clerp=f'Output "{attack}" (p=0.750)'),
    ]
    weights = [
        ("E_3_0", "0_5_0", 1.0),
        ("E_4_1", "0_7_1", 0.5),
        ("0_5_0", "1_52_1", 2.0),
        ("0_7_1", "1_52_1", -0.25),
        ("0_5_0", "3_9_1", 0.5),
        ("1_52_1", "3_9_1", 1.25),
        ("1_-1_1", "3_9_1", -0.75),
    ]
    return {
        "metadata": {"prompt_tokens": [f"One{attack}", "[MASK]"]},
        "qParams": {"pinnedIds": [], "supernodes": []},
        "nodes": nodes,
        "links": [
            {"source": source, "target": target, "weight": weight} for source, target, weight in weights
        ],
    }


def commitments(number: int = 52) -> Commitments:
    """Of the story: its step 2 at position 4 and, before it, step 1 at position 3, each by a feature of layer 1."""
    later, earlier = _commitment(2, 4, MY, 1.0, number), _commitment(1, 3, TIM, 0.25, 7)
    link = Link(earlier=1, later=0, share=0.25, embedding_node=later.graph.embedding_node(3))
    return Commitments(found=CommitmentGraph([later, earlier], [link], []))


def _commitment(step: int, position: int, token: int, weight: float, number: int) -> Commitment:
    """From every token of the state through one feature to the prediction; 0.25 of it begins at each of four."""
    state = torch.tensor(STORY[step])
    n_nodes = 1 + 3 * len(state) + 1  # errors of two layers and the embeddings lie between
    edges = torch.zeros(n_nodes, n_nodes)
    edges[0, 1 + 2 * len(state) : 1 + 2 * len(state) + 4] = 0.5
    edges[-1, 0] = 1.0
    graph = Graph(
        input_ids=state,
        mask_id=MASK,
        sigma=0.5,
        n_layers=2,
        features=torch.tensor([[1, position, number]]),
        activations=torch.tensor([2.0]),
        logits=torch.tensor([[position, token]]),
        probabilities=torch.tensor([0.5], dtype=torch.float64),
        values=torch.tensor([1.0]),
        edges=edges,
        constants=torch.zeros(n_nodes, len(CONSTANTS)),
        centre="mean",
    )
    shares = {"given": 0.5, "committed": 0.5, "masks": 0.0, "errors": 0.0}
    if step == 1:
        shares |= {"committed": 0.25, "masks": 0.25}
    return Commitment(step=step, position=position, token=token, weight=weight, graph=graph, **shares)
