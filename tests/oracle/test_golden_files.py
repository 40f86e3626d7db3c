"""Golden files: recorded, recomputed by the engine and the witness, and seen to fail where they should."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from oracle import GoldenError, Oracle, golden
from oracle.fingerprint import Fingerprint, combine, tensor_digest, weights_digest
from tests.mdlm_interp.test_golden import build, load_golden

SYNTHETIC = next(file for file in golden.packaged_goldens() if file.stem == "synthetic")
TINY = Path(__file__).with_name("exact_mdlm_tiny_a.json")
"""Recorded on upstream's golden model; `python tests/oracle/test_golden_files.py` writes it again."""


def tiny_model():
    return build(load_golden("mdlm_tiny_a"), torch.float32)


@pytest.mark.parametrize("file", golden.packaged_goldens(), ids=lambda file: file.stem)
def test_packaged_goldens_match_here(file, path):
    content = golden.load(file)
    found = golden.verify(content, Oracle(golden.load_source(content["source"])))
    assert found.matches, f"{found.first}: {found.detail}"
    assert found.n_points == len(content["points"])


def test_packaged_goldens_match_by_the_witness():
    content = golden.load(SYNTHETIC)
    assert content["source"] == golden.SYNTHETIC
    assert golden.verify_by_witness(content, golden.synthetic_model()).matches


def test_the_golden_of_upstream_s_model_matches(path):
    found = golden.verify(golden.load(TINY), Oracle(tiny_model()))
    assert found.matches, f"{found.first}: {found.detail}"


def test_the_native_pass_does_not_match():
    """The control: native arithmetic in the oracle's place is found out at the first product."""
    content = golden.load(SYNTHETIC)
    oracle = Oracle(golden.synthetic_model())
    from mdlm_interp.arithmetic import NativeArithmetic

    oracle.model.arithmetic = NativeArithmetic()
    found = golden.verify(content, oracle)
    assert not found.matches
    assert found.first is not None


def test_the_first_difference_is_named_with_its_element(oracle):
    content = golden.load(SYNTHETIC)
    with oracle.hooks({"blocks.1.mlp.hook_pre": lambda x, hook: nudge(x)}):
        found = golden.verify(content, oracle)
    assert not found.matches
    assert found.first == "blocks.1.mlp.hook_pre"
    assert found.detail.startswith("first sampled element that differs: [0, 0, 0], ")
    with oracle.hooks({"blocks.1.mlp.hook_pre": lambda x, hook: nudge(x, 1)}):
        found = golden.verify(content, oracle)
    assert (found.first, found.detail) == (
        "blocks.1.mlp.hook_pre",
        "in elements other than the 24 that the file samples",
    )


def nudge(x: torch.Tensor, place: int = 0) -> torch.Tensor:
    x.view(torch.int32).view(-1)[place] ^= 1
    return x


def test_hook_points_and_shapes_that_differ_are_named(oracle):
    content = golden.load(SYNTHETIC)
    fewer = copy.deepcopy(content)
    del fewer["points"]["blocks.0.attn.hook_z"]
    found = golden.verify(fewer, oracle)
    assert (found.first, found.detail) == ("blocks.0.attn.hook_z", "the file has no such hook point")
    more = copy.deepcopy(content)
    more["points"]["hook_new"] = more["points"]["hook_embed"]
    found = golden.verify(more, oracle)
    assert (found.first, found.detail) == ("hook_new", "this version has no such hook point")
    shorter = copy.deepcopy(content)
    shorter["input_ids"] = [row[:-1] for row in shorter["input_ids"]]
    found = golden.verify(shorter, oracle)
    assert (found.first, found.detail) == ("hook_embed", "its shape is [2, 23, 96], recorded [2, 24, 96]")


def test_other_weights_are_named_before_anything_is_computed():
    model = golden.synthetic_model()
    with torch.no_grad():
        model.get_parameter("backbone.blocks.0.norm1.weight")[7] += 2.0**-20
    with pytest.raises(
        GoldenError, match=r"the model's weights have SHA-256 .* name the right model with --model"
    ):
        golden.verify(golden.load(SYNTHETIC), Oracle(model))


def test_files_that_are_no_goldens_are_refused(tmp_path):
    file = tmp_path / "g.json"
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "expected format 'mdlm-interp exact golden 1', got 'list'"),
        ('{"format": "mdlm-interp exact golden 9"}', "got 'mdlm-interp exact golden 9'"),
        (json.dumps({"format": golden.FORMAT, "source": "bundled"}), "lacks 'fingerprint'; record it again"),
    ):
        file.write_text(text)
        with pytest.raises(GoldenError, match=message):
            golden.load(file)


def test_recording_again_gives_the_packaged_file(tmp_path, oracle, inputs):
    ids, sigma = inputs
    golden.save(golden.record(oracle, golden.SYNTHETIC, ids, sigma), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == SYNTHETIC.read_bytes()


def test_a_digest_covers_name_type_shape_and_every_bit():
    x = torch.arange(6.0).reshape(2, 3)
    flipped = x.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        tensor_digest("b", x),
        tensor_digest("a", x.double()),
        tensor_digest("a", x.reshape(3, 2)),
        tensor_digest("a", flipped),
        tensor_digest("a", torch.where(x == 0, -0.0, x)),
    ]
    digest = tensor_digest("a", x)
    assert digest not in others
    assert len(set(others)) == len(others)
    assert tensor_digest("a", x.T.contiguous().T) == digest
    assert tensor_digest("a", torch.stack((x, x), -1)[..., 0]) == digest


def test_a_fingerprint_covers_the_order_and_finds_the_first_difference():
    digests = {"a": "1", "b": "2", "logits": "3"}
    whole = Fingerprint(combine(digests), digests)
    swapped = {"b": "2", "a": "1", "logits": "3"}
    assert combine(swapped) != whole.sha256
    assert whole.first_difference(Fingerprint("", {**digests, "b": "x"})) == "b"
    assert whole.first_difference(Fingerprint("", {"a": "1"})) == "b"
    assert whole.first_difference(Fingerprint("", {**digests, "c": "4"})) == "c"
    assert whole.first_difference(whole) is None


def test_the_weights_digest_is_that_of_values_not_of_files(synthetic):
    state = synthetic.state_dict()
    shuffled = dict(reversed(list(state.items())))
    assert weights_digest(state) == weights_digest(shuffled)
    changed = {**state, "backbone.rotary_emb.inv_freq": state["backbone.rotary_emb.inv_freq"] * 2}
    assert weights_digest(state) != weights_digest(changed)


if __name__ == "__main__":
    inputs = load_golden("mdlm_tiny_a")
    content = golden.record(
        Oracle(tiny_model()), "tests/golden/mdlm_tiny_a", inputs.short_input_ids, inputs.sigma
    )
    golden.save(content, TINY)
