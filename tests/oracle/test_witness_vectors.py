"""The witness against SPEC's known answers: every claim here is exact.

The answers are written down a second time, so that neither the page nor the code can move alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle import witness, witness_blocks, witness_forward, witness_sampling

SPEC = Path(witness.__file__).with_name("SPEC.md")

VECTORS: tuple[dict[str, Any], ...] = (
    {
        "op": "linear",
        "x": "-0x1.5669b4p+0 -0x1.138284p+0 -0x1.036426p-5 0x1.234842p-1 -0x1.963108p-2",
        "weight": "-0x1.f627fcp+0 -0x1.78fcb4p-2 0x1.404cep-1 -0x1.e19ecap-1 -0x1.ef7b5ep+0",
        "bias": "0x1.333334p-2",
        "result": "0x1.c42e4ap+1",
    },
    {
        "op": "linear",
        "x": "0x1p+0 0x1p+0 0x1p+0",
        "weight": "0x1p+0 0x1p-24 0",
        "bias": "0",
        "result": "0x1p+0",
        "note": "a tie: to even",
    },
    {
        "op": "linear",
        "x": "0x1p+0 0x1p+0 0x1p+0",
        "weight": "0x1p+0 0x1p-24 0x1p-149",
        "bias": "0",
        "result": "0x1.000002p+0",
        "note": "just above the tie; binary64 accumulation rounds onto it",
    },
    {
        "op": "linear",
        "x": "0x1p+60 0x1p+0 -0x1p+60",
        "weight": "0x1p+60 0x1.79ca1p-67 0x1p+60",
        "bias": "0",
        "result": "0x1.79ca1p-67",
        "note": "cancellation",
    },
    {
        "op": "linear",
        "x": "0x1p-75 -0x1p-75",
        "weight": "0x1p-75 0x1.8p-74",
        "bias": "0",
        "result": "-0x1p-149",
        "note": "the smallest subnormal",
    },
    {
        "op": "linear",
        "x": "-0x1p-75",
        "weight": "0x1p-76",
        "bias": "0",
        "result": "0",
        "note": "a negative value that rounds to zero is +0",
    },
    {
        "op": "attention_scores",
        "q": "0x1.d1ac42p-3 0x1.cd61d6p-3 -0x1.0f66e8p-1 0x1.500baep-1 -0x1.0435a2p-1 -0x1.82d4c6p-2",
        "k": "0x1.bec89p-1 0x1.60c692p-3 0x1.482bfp-4 0x1.af70dep-1 -0x1.2ec35p-1 0x1.65bb2cp-2",
        "result": "0x1.7f16cep-2",
        "note": "d_head 6",
    },
    {
        "op": "softmax",
        "s": "0x1.333334p-2 -0x1.b33334p+0 0x1.2p+1 0x1.200002p+1 -0x1.4p+5 -0x1.ep+6",
        "result": "0x1.0d9a5cp-4 0x1.23e4f2p-7 0x1.d9bd1ep-2 0x1.d9bd24p-2 0x1.e921fep-63 0",
    },
    {"op": "softmax", "s": "0 0 0", "result": "0x1.555556p-2 0x1.555556p-2 0x1.555556p-2"},
    {
        "op": "layer_norm",
        "x": "0x1.602814p+1 -0x1.d4bccep-2 -0x1.ecd956p-3 -0x1.ec0f04p+0 0x1.c23c24p+1 -0x1.823ecep+0",
        "weight": "0x1.022a1p+0 0x1.64cc14p+0 0x1.4e667ap+0 0x1.c7a1dp-1 0x1.aa893ap-1 0x1.2d4b2ap+0",
        "scale": "0x1.f1853cp-2",
        "result": ("0x1.2c5d96p+0 -0x1.1a5484p-1 -0x1.841f92p-2 -0x1.f86fecp-1 0x1.4786c8p+0 -0x1.110f72p+0"),
    },
    {
        "op": "layer_norm",
        "x": "0x1.f40014p+9 0x1.f3ffdcp+9 0x1.f4002ep+9 0x1.f3ffecp+9 0x1.f40014p+9",
        "weight": "0x1p+0 0x1p+0 0x1p+0 0x1p+0 0x1p+0",
        "scale": "0x1.2fee6ep+8",
        "result": "0x1.09f0ap-3 -0x1.8ee8fp-2 0x1.7bea0ap-2 -0x1.ede372p-3 0x1.09f0ap-3",
        "note": "a large mean",
    },
    {
        "op": "layer_norm",
        "x": "0x1.666666p-1 0x1.666666p-1 0x1.666666p-1 0x1.666666p-1",
        "weight": "0x1p+0 0x1p+0 0x1p+0 0x1p+0",
        "scale": "0x1.3c3a4ep+8",
        "result": "0 0 0 0",
        "note": "a constant row",
    },
    {
        "op": "gelu_tanh",
        "x": (
            "0 0x1p+0 -0x1p+0 0x1.99999ap-4 -0x1.99999ap-4 0x1.8p+1 -0x1.8p+1 -0x1.6p+2 -0x1.2p+3 "
            "-0x1.cp+3 0x1.4p+4 0x1.4484cp-100 -0x1p-149 0x1.93e594p+99 -0x1.93e594p+99"
        ),
        "result": (
            "0 0x1.aeb0b8p-1 -0x1.453d22p-3 0x1.ba3a0ap-5 -0x1.78f92ap-5 0x1.7f88dp+1 -0x1.dcc2ap-9 "
            "-0x1.975826p-28 -0x1.52d53p-93 0 0x1.4p+4 0x1.4484cp-101 0 0x1.93e594p+99 0"
        ),
    },
    {
        "op": "silu",
        "x": (
            "0 0x1p+0 -0x1p+0 0x1.99999ap-4 -0x1.99999ap-4 0x1.8p+1 -0x1.8p+1 -0x1.4p+4 -0x1.68p+6 "
            "-0x1.b8p+6 0x1.4484cp-100 0x1.93e594p+99 -0x1.93e594p+99"
        ),
        "result": (
            "0 0x1.764d5p-1 -0x1.136562p-2 0x1.ae101ep-5 -0x1.852316p-5 0x1.6dc9d8p+1 -0x1.236272p-3 "
            "-0x1.621a7ep-25 -0x1.918314p-124 0 0x1.4484cp-101 0x1.93e594p+99 0"
        ),
    },
    {
        "op": "add",
        "a": "-0x1.58bee4p+0 -0x1.45b73ep-1 0x1.41116p-1 0x1p-149",
        "b": "0x1.7f9146p+0 -0x1.93897ap-2 -0x1.7d0d9ap-2 -0x1p-149",
        "result": "0x1.36931p-3 -0x1.07bdfep+0 0x1.051526p-2 0",
    },
    {
        "op": "mul",
        "a": "-0x1.58bee4p+0 -0x1.45b73ep-1 0x1.41116p-1 -0x1p-149",
        "b": "0x1.7f9146p+0 -0x1.93897ap-2 -0x1.7d0d9ap-2 0x1p-2",
        "result": "-0x1.02449cp+1 0x1.00b73p-2 -0x1.dde7eap-3 0",
    },
    {
        "op": "modulate",
        "x": "0x1.fd8242p-3 -0x1.5e3c42p+0 0x1.9dc296p-1 -0x1.00cad2p+0",
        "shift": "0x1.cb288p+0 0x1.02f5d2p+0 0x1.d14d76p-1 -0x1.27e7bep-3",
        "scale": "-0x1.0ce1b6p-5 -0x1.44f3dp-4 -0x1.0211fep-3 -0x1.29db96p-5",
        "result": "0x1.0460d2p+1 -0x1.fbea96p-3 0x1.9d7654p+0 -0x1.1c718ep+0",
    },
    {
        "op": "rotary_tables",
        "inv_freq": "0x1p+0 0x1.7ff222p-1 0x1.a36e2ep-14",
        "position": 1,
        "result": ["0x1.14a28p-1 0x1.76a96p-1 0x1p+0", "0x1.aed548p-1 0x1.5cf59cp-1 0x1.a36e2ep-14"],
        "note": "cosines, then sines",
    },
    {
        "op": "rotary_tables",
        "inv_freq": "0x1p+0 0x1.7ff222p-1 0x1.a36e2ep-14",
        "position": 7,
        "result": ["0x1.81ff7ap-1 0x1.05dcacp-1 0x1.fffff8p-1", "0x1.50608cp-1 -0x1.b7f7fp-1 0x1.6f0066p-11"],
        "note": "cosines, then sines",
    },
    {
        "op": "rotary_tables",
        "inv_freq": "0x1p+0 0x1.7ff222p-1 0x1.a36e2ep-14",
        "position": 1023,
        "result": ["0x1.99ab7ap-2 0x1.a88a02p-1 0x1.fd52bep-1", "-0x1.d53d92p-1 0x1.1e334p-1 0x1.a24a52p-4"],
        "note": "cosines, then sines",
    },
    {
        "op": "rotate",
        "x": "-0x1.918ac4p+0 -0x1.9b299p-1 -0x1.4c6362p+1 0x1.899d96p-1",
        "cos": "-0x1.fae04cp-1 0x1.ffc506p-1",
        "sin": "0x1.210386p-3 0x1.eb723ep-6",
        "result": "0x1.eb563ep+0 -0x1.a6c8b8p-1 0x1.2cbaa2p+1 0x1.7d1afep-1",
    },
    {"op": "time_features", "sigma": "0", "width": 6, "result": "0x1p+0 0x1p+0 0x1p+0 0 0 0"},
    {
        "op": "time_features",
        "sigma": "0x1.666666p-1",
        "width": 6,
        "result": "0x1.879966p-1 0x1.ffbad2p-1 0x1.ffffdap-1 0x1.49d6e6p-1 0x1.0a1ed4p-5 0x1.8b572p-10",
    },
    {
        "op": "time_features",
        "sigma": "0x1.b9999ap+2",
        "width": 6,
        "result": "0x1.a1a6b6p-1 0x1.e5f71p-1 0x1.fff184p-1 0x1.282944p-1 0x1.4260d4p-2 0x1.e71918p-7",
    },
    {
        "op": "time_features",
        "sigma": "0x1.2a05f2p+33",
        "width": 6,
        "result": ("0x1.bf098ap-1 -0x1.fe5ab2p-2 -0x1.5a182ep-2 -0x1.f334c8p-2 -0x1.bbe10ap-1 0x1.e1deb6p-1"),
    },
    {
        "op": "EXP",
        "x": "0 -0x1p-1 -0x1.14p+4 -0x1.5d33333333333p+6 0x1.cp+1 0x1.9p+6 -0x1.9p+9",
        "result": (
            "0x1p+0 0x1.368b2fc6f965cp-1 0x1.14f49dbc50742p-25 0x1.09874c0b9caafp-126 "
            "0x1.08ec721396bbcp+5 0x1.3494a9b171c0fp+144 0x1.7c8ab2288ca21p-1022"
        ),
        "note": "binary64",
    },
    {
        "op": "draw",
        "logits": "-0x1.e3cbp-1 -0x1.2e912cp+2 -0x1.46f8aap+0 0x1.4657d6p-6 0x1.e32c22p+0 0x1.c3c92ep-2",
        "excluded": 5,
        "temperature": "0x1p+0",
        "word": "0x0",
        "weights": [258944937146, 5893870987, 185729584823, 679557591669, 4398046511104, 0],
        "result": 0,
    },
    {
        "op": "draw",
        "logits": "-0x1.e3cbp-1 -0x1.2e912cp+2 -0x1.46f8aap+0 0x1.4657d6p-6 0x1.e32c22p+0 0x1.c3c92ep-2",
        "excluded": 5,
        "temperature": "0x1p+0",
        "word": "0x123456789abcdef0",
        "weights": [258944937146, 5893870987, 185729584823, 679557591669, 4398046511104, 0],
        "result": 2,
    },
    {
        "op": "draw",
        "logits": "-0x1.e3cbp-1 -0x1.2e912cp+2 -0x1.46f8aap+0 0x1.4657d6p-6 0x1.e32c22p+0 0x1.c3c92ep-2",
        "excluded": 5,
        "temperature": "0x1p+0",
        "word": "0xffffffffffffffff",
        "weights": [258944937146, 5893870987, 185729584823, 679557591669, 4398046511104, 0],
        "result": 4,
    },
    {
        "op": "draw",
        "logits": "-0x1.e3cbp-1 -0x1.2e912cp+2 -0x1.46f8aap+0 0x1.4657d6p-6 0x1.e32c22p+0 0x1.c3c92ep-2",
        "excluded": 5,
        "temperature": "0x1.999999999999ap-1",
        "word": "0x0",
        "weights": [127554071496, 1127679867, 84195020191, 426057172835, 4398046511104, 0],
        "result": 0,
    },
    {
        "op": "draw",
        "logits": "-0x1.e3cbp-1 -0x1.2e912cp+2 -0x1.46f8aap+0 0x1.4657d6p-6 0x1.e32c22p+0 0x1.c3c92ep-2",
        "excluded": 5,
        "temperature": "0x1.999999999999ap-1",
        "word": "0x123456789abcdef0",
        "weights": [127554071496, 1127679867, 84195020191, 426057172835, 4398046511104, 0],
        "result": 3,
    },
    {
        "op": "draw",
        "logits": "-0x1.e3cbp-1 -0x1.2e912cp+2 -0x1.46f8aap+0 0x1.4657d6p-6 0x1.e32c22p+0 0x1.c3c92ep-2",
        "excluded": 5,
        "temperature": "0x1.999999999999ap-1",
        "word": "0xffffffffffffffff",
        "weights": [127554071496, 1127679867, 84195020191, 426057172835, 4398046511104, 0],
        "result": 4,
    },
    {"op": "sigma", "masked": 1, "length": 4, "result": "0x1.263ec4p-2"},
    {"op": "sigma", "masked": 3, "length": 4, "result": "0x1.621fep+0"},
    {"op": "sigma", "masked": 48, "length": 48, "result": "0x1.ba18aap+2"},
    {
        "op": "digest",
        "name": "hook_embed",
        "shape": "1,2,3",
        "x": "0x1p+0 -0x1.4p+1 0 0x1.8p+1 0x1p+2 0x1.4p+2",
        "result": "84a28673fe39bb5f6a41510d962bfc74da1d4ad55f2a9d066ba4b3d95b572597",
        "fingerprint of this one line": ("474d5dba8821e2d37cf9e4af7d3aa8f23e327c539d5bc8583ae04d60b8cf966f"),
    },
)
"""SPEC section 7; a list of numbers is one string of C's hexadecimal notation."""

NOT_NUMBERS = ("op", "note", "word", "name", "shape")
"""Texts that stand in both places as they are, as a digest's hexadecimal result does."""


def numbers(text: str) -> list[float]:
    return [float.fromhex(part) for part in text.split()]


def row(text: str) -> witness_blocks.F32:
    values = np.array(numbers(text))
    assert np.array_equal(values.astype(np.float32).astype(np.float64), values)
    return values.astype(np.float32)


def same_bits(found: witness_blocks.F32, expected: str) -> bool:
    return found.dtype == np.float32 and found.tobytes() == row(expected).tobytes()


def linear(v):
    x, weight, bias = row(v["x"]), row(v["weight"]), row(v["bias"])
    assert same_bits(witness.linear(x, weight[None], bias), v["result"])
    if bias == 0:
        assert same_bits(witness.linear(x, weight[None]), v["result"])


def attention_scores(v):
    q, k = (row(v[name])[None, None, None] for name in "qk")
    assert same_bits(witness.attention_scores(q, k)[0, 0, 0], v["result"])


def softmax(v):
    assert same_bits(witness.softmax(row(v["s"])), v["result"])


def layer_norm(v):
    x, weight, expected = row(v["x"])[None], row(v["weight"]), v["result"]
    normalized, scale = witness.layer_norm(x, weight)
    assert same_bits(scale[0], v["scale"])
    assert same_bits(normalized[0], expected)
    assert same_bits(witness.layer_norm(x, weight, scale)[0][0], expected)


def element_wise(v):
    names = [name for name in ("x", "a", "b", "shift", "scale") if name in v]
    result = getattr(witness, v["op"])(*(row(v[name]) for name in names))
    assert same_bits(result, v["result"])


def rotary_tables(v):
    cos, sin = witness.rotary_tables(row(v["inv_freq"]), v["position"] + 1)
    assert same_bits(cos[-1], v["result"][0])
    assert same_bits(sin[-1], v["result"][1])


def rotate(v):
    x = row(v["x"])[None, None]
    assert same_bits(witness.rotate(x, row(v["cos"])[None], row(v["sin"])[None])[0, 0], v["result"])


def time_features(v):
    assert same_bits(witness.time_features(row(v["sigma"]), v["width"])[0], v["result"])


def exponential(v):
    assert witness_blocks.exp(np.array(numbers(v["x"]))).tobytes() == np.array(numbers(v["result"])).tobytes()


def draw(v):
    logits, excluded = row(v["logits"]), v["excluded"]
    temperature = float.fromhex(v["temperature"])
    assert witness_sampling.draw_weights(logits, excluded, temperature) == v["weights"]
    assert witness_sampling.draw(logits, excluded, temperature, int(v["word"], 16)) == v["result"]


def sigma(v):
    assert witness_sampling.sigma_of(v["masked"], v["length"]) == float.fromhex(v["result"])


def digest(v):
    tensor = row(v["x"]).reshape([int(size) for size in v["shape"].split(",")])
    found = witness_forward.digest(v["name"], tensor)
    assert found == v["result"]
    # A forward pass ends with its logits; this answer is of the first two lines alone.
    lines = f"mdlm-interp exact 1\n{v['name']} {found}\n"
    assert hashlib.sha256(lines.encode()).hexdigest() == v["fingerprint of this one line"]


CHECKS = {
    "linear": linear,
    "attention_scores": attention_scores,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "gelu_tanh": element_wise,
    "silu": element_wise,
    "add": element_wise,
    "mul": element_wise,
    "modulate": element_wise,
    "rotary_tables": rotary_tables,
    "rotate": rotate,
    "time_features": time_features,
    "EXP": exponential,
    "draw": draw,
    "sigma": sigma,
    "digest": digest,
}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["op"])
def test_the_witness_gives_the_known_answer(vector):
    CHECKS[vector["op"]](vector)


def test_the_answers_here_are_those_of_the_page():
    text = SPEC.read_text("utf-8")
    on_the_page = json.loads(text[text.index("```json\n") + 8 : text.rindex("```")])
    assert [plain(vector) for vector in VECTORS] == [plain(vector) for vector in on_the_page]


def plain(vector: dict[str, Any]) -> dict[str, Any]:
    """A known answer in a form that does not depend on how its numbers are written."""
    as_they_are = (*NOT_NUMBERS, "result") if vector["op"] == "digest" else NOT_NUMBERS
    return {
        key: value if key in as_they_are or key.startswith("fingerprint") else _flat(value)
        for key, value in vector.items()
    }


def _flat(value: Any) -> list[float]:
    if isinstance(value, str):
        return numbers(value)
    return [number for item in value for number in _flat(item)] if isinstance(value, list) else [value]


def test_a_change_of_one_bit_is_noticed():
    changed = dict(next(vector for vector in VECTORS if vector["op"] == "softmax"))
    changed["result"] = changed["result"].replace("0x1.0d9a5cp-4", "0x1.0d9a5ep-4")
    with pytest.raises(AssertionError):
        softmax(changed)
