"""SPEC.md's known answers, its constants and its list of hook points, against the engine. Every claim is exact."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from mdlm_interp.model import all_hook_names
from oracle import elementwise, ops, recipes, tables
from oracle.fingerprint import combine, tensor_digest
from oracle.sampling import counts, draw

TEXT = (Path(ops.__file__).with_name("SPEC.md")).read_text("utf-8")
VECTORS = json.loads(re.findall(r"```json\n(.*?)```", TEXT, re.S)[0])


def values(hexadecimal, dtype=torch.float32):
    if isinstance(hexadecimal, list):
        return torch.stack([values(part, dtype) for part in hexadecimal])
    return torch.tensor(float.fromhex(hexadecimal), dtype=dtype)


def compute(vector: dict):
    """What the engine gives for one vector."""
    given = {
        key: values(v)
        for key, v in vector.items()
        if isinstance(v, list) and key != "weights" and key != "result"
    }
    match vector["op"]:
        case "linear":
            return ops.linear(given["x"][None], given["weight"][None], values(vector["bias"])[None])[0, 0]
        case "attention_scores":
            return ops.attention_scores(
                given["q"].reshape(1, 1, 1, -1), given["k"].reshape(1, 1, 1, -1)
            ).flatten()[0]
        case "softmax":
            return ops.softmax(given["s"])
        case "layer_norm":
            normalized, scale = ops.layer_norm(given["x"][None, None], given["weight"])
            assert scale.item() == float.fromhex(vector["scale"])
            return normalized[0, 0]
        case "gelu_tanh" | "silu":
            return getattr(ops, vector["op"])(given["x"])
        case "add" | "mul":
            return getattr(ops, vector["op"])(given["a"], given["b"])
        case "modulate":
            return ops.modulate(*(given[key][None, None] for key in ("x", "shift", "scale")))[0, 0]
        case "rotary_tables":
            pair = ops.rotary_tables(given["inv_freq"], vector["position"] + 1)
            return torch.stack([table[-1] for table in pair])
        case "rotate":
            return ops.rotate(
                given["x"].reshape(1, 1, 1, -1), given["cos"][None], given["sin"][None]
            ).flatten()
        case "time_features":
            return ops.time_features(values(vector["sigma"])[None], vector["width"])[0]
        case "EXP":
            return elementwise.exp_(values(vector["x"], torch.float64))
        case "sigma":
            return torch.tensor(tables.sigma_of_masked(vector["masked"], vector["length"]))
        case "draw":
            weights = counts(given["logits"][None], vector["excluded"], float.fromhex(vector["temperature"]))
            assert weights[0].tolist() == vector["weights"]
            return draw(weights, [int(vector["word"], 16)])[0]
        case other:
            raise AssertionError(other)


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["op"] != "digest"], ids=lambda v: v["op"])
def test_the_engine_gives_the_known_answer(vector, path):
    expected = vector["result"]
    if vector["op"] == "draw":
        assert compute(vector).item() == expected
        return
    found = compute(vector)
    wanted = values(expected, found.dtype)
    assert found.shape == wanted.shape
    kind = torch.int64 if found.dtype == torch.float64 else torch.int32
    assert torch.equal(found.reshape(-1).view(kind), wanted.reshape(-1).view(kind))


def test_every_operation_has_a_known_answer():
    missing = set(ops.__all__) - {"matmul", "mix", "attention"} - {vector["op"] for vector in VECTORS}
    assert missing == set()


def test_the_digest_is_the_known_one():
    vector = next(v for v in VECTORS if v["op"] == "digest")
    shape = [int(size) for size in vector["shape"].split(",")]
    digest = tensor_digest(vector["name"], values(vector["x"]).reshape(shape))
    assert digest == vector["result"]
    assert combine({vector["name"]: digest}) == vector["fingerprint of this one line"]
    line = f"mdlm-interp exact 1\nhook_embed {digest}\n".encode()
    assert hashlib.sha256(line).hexdigest() == vector["fingerprint of this one line"]


def test_the_page_prints_the_constants_that_are_used():
    printed = {
        float.fromhex(number) for number in re.findall(r"-?0x1\.[0-9a-f]{13}p[+-]\d+", TEXT.split("## 7")[0])
    }
    used = {*recipes.EXP_COEFFICIENTS, recipes.LOG2E, recipes.GELU_CUBE, recipes.GELU_LINE, recipes.EPS}
    assert used <= printed
    assert f"{recipes.RSQRT_SEED:#018X}".replace("0X", "0x") in TEXT
    assert f"version {recipes.SPEC_VERSION}" in TEXT.splitlines()[0]


def test_the_page_names_every_hook_point():
    last = {name.rpartition(".")[2] for name in all_hook_names(1)}
    assert {name for name in last if name not in TEXT} <= {
        "hook_scale_attn",
        "hook_gate_attn",
        "hook_shift_mlp",
        "hook_scale_mlp",
        "hook_gate_mlp",
    }
