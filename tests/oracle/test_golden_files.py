"""Golden files: recorded, recomputed by the engine and the witness, and seen to fail where they should."""

from __future__ import annotations

import copy
import errno
import json
import re
from pathlib import Path

import pytest
import torch

from mdlm_interp.errors import WriteError
from oracle import GoldenError, Oracle, golden
from oracle.fingerprint import combine, tensor_digest, weights_digest
from oracle.golden_file import FORMAT
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
        (json.dumps({"format": FORMAT, "source": "bundled"}), "lacks 'config'; record it again"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"format": ' + "9" * 5000 + "}", "is not valid JSON"),
    ):
        file.write_text(text)
        with pytest.raises(GoldenError, match=message):
            golden.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GoldenError, match="is not valid JSON"):
        golden.load(file)


def changed(*path_and_value):
    """The synthetic golden file with one entry replaced, or removed if the value is `...`."""
    content = json.loads(SYNTHETIC.read_text("utf-8"))
    *path, last, value = path_and_value
    target = content
    for key in path:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return content


DIGEST = "a SHA-256 of 64 hexadecimal digits, got "
IDS = "input_ids must be rows of one length of token ids, whole numbers from 0, got "
SIGMAS = "timesteps must be null or float32 numbers as hexadecimal text, such as '0x1.8000000000000p+0', got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("source", 5), "source must be the name of a model, as text, got 5"),
        (("source", None), "source must be the name of a model, as text, got None"),
        (("weights", "0" * 63), "weights must be " + DIGEST),
        (("fingerprint", None), "fingerprint must be " + DIGEST + "None"),
        (("fingerprint", "A" * 64), "fingerprint must be " + DIGEST),
        (("input_ids", "abc"), IDS + "'abc'"),
        (("input_ids", None), IDS + "None"),
        (("input_ids", []), IDS + "[]"),
        (("input_ids", [[]]), IDS + "[[]]"),
        (("input_ids", [1, 2]), IDS + "[1, 2]"),
        (("input_ids", [[1, 2], [3]]), IDS + "[[1, 2], [3]]"),
        (("input_ids", [[1.0, 2.0]]), IDS + "[[1.0, 2.0]]"),
        (("input_ids", [[True]]), IDS + "[[True]]"),
        (("input_ids", [[-1]]), IDS + "[[-1]]"),
        (("input_ids", [[10**30]]), IDS + "[[1000000000000000000000000000000]]"),
        (("timesteps", ["zz"]), SIGMAS + "['zz']"),
        (("timesteps", [0.5]), SIGMAS + "[0.5]"),
        (("timesteps", ["0x1p+100000"]), SIGMAS + "['0x1p+100000']"),
        (("timesteps", ["0x1.0000000000000p+200"]), SIGMAS),
        (("timesteps", ["nan"]), SIGMAS + "['nan']"),
        (("timesteps", "0x1p-1"), SIGMAS + "'0x1p-1'"),
        (
            ("timesteps", ["0x1.0000000000000p-1"]),
            "timesteps must have one for each of 2 rows of input_ids, got 1",
        ),
        (("points", []), "points must be an object of hook points, got []"),
        (("points", {}), "points must be an object of hook points, got {}"),
        (
            ("points", "hook_embed", "x"),
            "points['hook_embed'] must be an object of shape, sha256 and samples, got 'x'",
        ),
        (("points", "hook_embed", "sha256", ...), "points['hook_embed'].sha256 must be " + DIGEST + "None"),
        (
            ("points", "hook_embed", "shape", "x"),
            "points['hook_embed'].shape must be a list of sizes, got 'x'",
        ),
        (
            ("points", "hook_embed", "shape", ...),
            "points['hook_embed'].shape must be a list of sizes, got None",
        ),
        (
            ("points", "hook_embed", "shape", [2, -1]),
            "points['hook_embed'].shape must be a list of sizes, got [2, -1]",
        ),
        (
            ("points", "hook_embed", "samples", []),
            "points['hook_embed'].samples must be 24 float32 numbers as",
        ),
        (
            ("points", "hook_embed", "samples", ...),
            "points['hook_embed'].samples must be 24 float32 numbers as",
        ),
        (
            ("points", "hook_embed", "samples", [1.5] * 24),
            "points['hook_embed'].samples must be 24 float32 numbers as",
        ),
        (("config", 5), "config must be an object: the model's config.json, got 5"),
        (("config", "n_heads", ...), "config lacks 'n_heads', which fixes a weight's shape"),
        (("config", "n_heads", "3"), "config: n_heads must be int, got '3'"),
        (("config", ...), "lacks 'config'"),
        (("points", ...), "lacks 'points'"),
    ],
    ids=str,
)
def test_an_entry_of_the_wrong_kind_is_named(change, message, tmp_path):
    file = tmp_path / "g.json"
    file.write_text(json.dumps(changed(*change)))
    with pytest.raises(GoldenError, match=re.escape(message)) as caught:
        golden.load(file)
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).endswith("; record it again")
    assert "\n" not in str(caught.value)


def test_a_file_that_contradicts_its_own_digests_is_named(tmp_path, oracle):
    file = tmp_path / "g.json"
    for change in (("fingerprint", "0" * 64), ("points", "logits", "sha256", "0" * 64)):
        file.write_text(json.dumps(changed(*change)))
        with pytest.raises(
            GoldenError, match=r"contradicts itself: its fingerprint is .*, that of the digests it holds"
        ):
            golden.load(file)
    # Whoever made the content in memory is told in the result.
    found = golden.verify(changed("fingerprint", "0" * 64), oracle)
    assert not found.matches
    assert (found.first, found.detail) == (
        "the fingerprint",
        "which contradicts the file's own digests: they all match",
    )


@pytest.mark.parametrize(
    ("field", "value"), [("n_heads", 4), ("time_conditioning", False), ("vocab_size", 60), ("n_blocks", 3)]
)
def test_a_config_that_is_not_the_model_s_is_named(field, value, oracle):
    content = changed("config", field, value)
    message = (
        f"the model's config has {field} .*, the golden file was recorded with {value}; name the right model"
    )
    with pytest.raises(GoldenError, match=message):
        golden.verify(content, oracle)
    with pytest.raises(GoldenError, match=message):
        golden.verify_by_witness(content, oracle.model)


def test_a_config_that_changes_no_number_may_differ(oracle):
    assert golden.verify(changed("config", "dropout", 0.5), oracle).matches


def test_the_witness_refuses_other_weights_too(oracle):
    with pytest.raises(GoldenError, match=r"weights have SHA-256 .*, the golden file was recorded with 000"):
        golden.verify_by_witness(changed("weights", "0" * 64), oracle.model)


def test_a_file_gets_its_name_when_all_of_it_is_written(tmp_path, monkeypatch):
    content, file = json.loads(SYNTHETIC.read_text("utf-8")), tmp_path / "new" / "g.json"
    golden.save(content, file)
    assert file.read_bytes() == SYNTHETIC.read_bytes()

    def full(self, text, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(WriteError, match="cannot be written: No space left on device"):
        golden.save({**content, "source": "another"}, file)
    assert file.read_bytes() == SYNTHETIC.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["g.json"]


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


def test_a_fingerprint_covers_names_and_their_order():
    digests = {"a": "1", "b": "2", "logits": "3"}
    others = [{"b": "2", "a": "1", "logits": "3"}, {"a": "1", "b": "x", "logits": "3"}, {"a": "1", "b": "2"}]
    assert len({combine(digests), *map(combine, others)}) == 4


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
