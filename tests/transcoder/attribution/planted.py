"""A model whose circuit is known, because its weights were written by hand, and transcoders that are right about it.

Three blocks, one head. Every direction that anything is written to is (1, -1) / sqrt 2 on two dimensions of its own, so
the residual stream has mean zero and LayerNorm only scales it. Attention of block 0 looks everywhere alike and copies
"A is here" and "B is here"; the other blocks' attention writes nothing. The MLPs' units are ReLUs (GELU of a number so
large that it is one):

    layer 0    f0: this is a mask and A is about    f1: this is a mask and B is about
    layer 1    g0 = f0 + f1                         g1 = f1
    layer 2    h = g0 - g1 / 2

h writes the logit of token C, g1 that of token D. The per-layer transcoder has these five features. The cross-layer one
has no g0: f0 and f1 write to layer 1's output, by themselves, what g0 would.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.layers import Block
from transcoder.config import Connectivity, TranscoderConfig
from transcoder.model import CrossLayerTranscoder

D_MODEL, N_LAYERS, N_FEATURES = 32, 3, 4
A, B, C, D, FILLER, MASK = 0, 1, 2, 3, 4, 5
STATE = [A, FILLER, B, MASK, FILLER]
POSITION = STATE.index(MASK)
MODULATION, GATE = 2.0, 0.5
"""One plus adaLN's scale, and its gate, of every MLP."""
SHARP = 1e4
"""GELU(SHARP x) / SHARP is ReLU(x) to the last bit or two, for |x| above 0.001."""
NAMES = ["a", "b", "filler", "mask", "sees_a", "sees_b", "f0", "f1", "g0", "g1", "c", "d"]
F0, F1, G0, G1, H = (0, 3), (0, 1), (1, 2), (1, 0), (2, 1)
"""Layer and number of each feature; nothing makes these numbers special."""
WRITES = 0.3
"""Length of every decoder."""


def direction(name: str) -> Tensor:
    found = torch.zeros(D_MODEL, dtype=torch.float64)
    at = 2 * NAMES.index(name)
    found[at], found[at + 1] = math.sqrt(0.5), -math.sqrt(0.5)
    return found


UNITS: dict[tuple[int, int], tuple[dict[str, float], float, dict[str, float]]] = {
    F0: ({"sees_a": 1.0, "mask": 1.0}, -7.0, {"f0": WRITES}),
    F1: ({"sees_b": 1.0, "mask": 1.0}, -7.0, {"f1": WRITES}),
    G0: ({"f0": 1.0, "f1": 1.0}, 0.0, {"g0": WRITES}),
    G1: ({"f1": 1.0}, 0.0, {"g1": WRITES, "d": WRITES}),
    H: ({"g0": 1.0, "g1": -0.5}, 0.0, {"c": WRITES}),
}
"""What each unit reads, its bias, and what it writes to the residual stream."""


def combined(parts: dict[str, float]) -> Tensor:
    return torch.stack([weight * direction(name) for name, weight in parts.items()]).sum(0)


@torch.no_grad()
def planted_model() -> HookedMDLM:
    config = MDLMConfig(
        vocab_size=MASK + 1,
        model_length=8,
        hidden_dim=D_MODEL,
        cond_dim=4,
        n_blocks=N_LAYERS,
        n_heads=1,
        time_conditioning=False,
    )
    model = HookedMDLM(config).double().eval()
    backbone = model.backbone
    for token, name in ((A, "a"), (B, "b"), (FILLER, "filler"), (MASK, "mask")):
        backbone.vocab_embed.embedding[token] = direction(name)
    for token in (C, D):
        backbone.vocab_embed.embedding[token] = direction("filler")
    for layer, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        assert block.adaLN_modulation.bias is not None
        assert block.mlp.first.bias is not None
        block.attn_qkv.weight.zero_()
        block.attn_out.weight.copy_(torch.eye(D_MODEL))
        if layer == 0:
            copies = [torch.outer(direction("sees_" + name), direction(name)) for name in "ab"]
            block.attn_qkv.weight[2 * D_MODEL :] = torch.stack(copies).sum(0)
        shift, scale, gate = torch.zeros(D_MODEL), torch.full((D_MODEL,), MODULATION - 1), torch.ones(D_MODEL)
        block.adaLN_modulation.weight.zero_()
        block.adaLN_modulation.bias.copy_(torch.cat([shift, shift, gate, shift, scale, GATE * gate]))
        for parameter in block.mlp.parameters():
            parameter.zero_()
        for (home, unit), (reads, bias, writes) in UNITS.items():
            if home == layer:
                block.mlp.first.weight[unit] = SHARP * combined(reads)
                block.mlp.first.bias[unit] = SHARP * bias
                block.mlp.second.weight[:, unit] = combined(writes) / (GATE * SHARP)
    backbone.output_layer.linear.weight[C] = direction("c")
    backbone.output_layer.linear.weight[D] = direction("d")
    return model


@torch.no_grad()
def transcoder_of(connectivity: Connectivity) -> CrossLayerTranscoder:
    """The five features, or four where layer 0 writes to layer 1 what G0 would."""
    shape = TranscoderConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_features=N_FEATURES,
        connectivity=connectivity,
        activation="relu",
    )
    clt = CrossLayerTranscoder(shape).double()
    for parameter in clt.parameters():
        parameter.zero_()
    is_clt = connectivity == "clt"
    for (layer, feature), (reads, bias, writes) in UNITS.items():
        if is_clt and (layer, feature) == G0:
            continue
        clt.W_enc[layer, feature] = combined(reads)
        clt.b_enc[layer, feature] = bias
        clt.W_dec[layer][feature, 0] = combined(writes)
    if is_clt:
        for layer, feature in (F0, F1):
            clt.W_dec[layer][feature, 1] = MODULATION * norm_scales()[1] * WRITES * WRITES * direction("g0")
    return clt.requires_grad_(False)


def residuals() -> list[dict[str, float]]:
    """By hand: what is in the residual stream of the mask before each MLP, and before the output layer."""
    seen = math.sqrt(1 / (1 / D_MODEL + 1e-5)) / len(STATE)
    found = [{"mask": 1.0, "sees_a": seen, "sees_b": seen}]
    for layer in range(N_LAYERS):
        now = found[-1]
        after = dict(now)
        scale = MODULATION / math.sqrt(sum(x * x for x in now.values()) / D_MODEL + 1e-5)
        for (home, _), (reads, bias, writes) in UNITS.items():
            if home == layer:
                value = scale * sum(weight * now.get(name, 0.0) for name, weight in reads.items()) + bias
                for name, weight in writes.items():
                    after[name] = after.get(name, 0.0) + weight * max(value, 0.0)
        found.append(after)
    return found


def norm_scales() -> list[float]:
    """By hand: the LayerNorms' scales at the mask, before each MLP and before the output layer."""
    return [1 / math.sqrt(sum(x * x for x in now.values()) / D_MODEL + 1e-5) for now in residuals()]


def activation(name: str) -> float:
    """By hand: what a unit that writes only to one direction of its own is."""
    return residuals()[-1][name] / WRITES


def true_edges(connectivity: Connectivity) -> dict[tuple[str, str], float]:
    """By hand: every direct effect between embeddings and features at the mask; sources, then targets."""
    first, second, third, _ = (MODULATION * scale for scale in norm_scales())
    seen = residuals()[0]["sees_a"]
    f0, f1, g1 = activation("f0"), activation("f1"), activation("g1")
    found = {
        ("A", "f0"): first * seen,
        ("mask", "f0"): first,
        ("B", "f1"): first * seen,
        ("mask", "f1"): first,
        ("f1", "g1"): second * WRITES * f1,
        ("g1", "h"): -0.5 * third * WRITES * g1,
    }
    relayed = second * WRITES * WRITES * third
    if connectivity == "clt":
        return found | {("f0", "h"): relayed * f0, ("f1", "h"): relayed * f1}
    g0 = activation("g0")
    return found | {
        ("f0", "g0"): second * WRITES * f0,
        ("f1", "g0"): second * WRITES * f1,
        ("g0", "h"): third * WRITES * g0,
    }
