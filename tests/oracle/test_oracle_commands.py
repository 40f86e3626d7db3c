"""`mdlm-interp oracle fingerprint | record | verify`, run as a user runs them."""

from __future__ import annotations

import json

import pytest
import torch

from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.__main__ import main
from oracle import Oracle, exact_sample, golden
from oracle.fingerprint import combine


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["oracle", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_verify_without_a_file_checks_what_comes_with_the_package(capsys):
    code, out, err = run(capsys, "verify", "--device", "cpu")
    assert (code, err) == (0, "")
    files = [file.name for file in golden.packaged_goldens()]
    assert [line.partition(": match, ")[0] for line in out.splitlines()] == files
    assert "synthetic.json: match, 67 hook points, 3e119cecca54722a" in out


def test_the_witness_is_asked_on_request(capsys):
    file = next(file for file in golden.packaged_goldens() if file.stem == "synthetic")
    code, out, _ = run(capsys, "verify", str(file), "--device", "cpu", "--witness")
    assert code == 0
    assert "compiled loops" in out.splitlines()[0] or "plain path" in out.splitlines()[0]
    assert "match, 67 hook points" in out.splitlines()[1]
    assert "(witness, " in out.splitlines()[1]


def test_a_recorded_file_verifies_and_a_changed_one_says_where(capsys, tmp_path):
    file = tmp_path / "deep" / "mine.json"
    code, out, _ = run(
        capsys, "record", str(file), "--model", "synthetic", "--ids", "1,2,60", "--sigma", "0.5"
    )
    assert code == 0
    assert out.startswith(f"{file}: 67 hook points, fingerprint ")
    assert run(capsys, "verify", str(file))[0] == 0
    content = json.loads(file.read_text())
    point = content["points"]["blocks.0.hook_resid_mid"]
    point["sha256"], point["samples"][0] = "0" * 64, "0x1.8000000000000p+0"
    content["fingerprint"] = combine({name: point["sha256"] for name, point in content["points"].items()})
    file.write_text(json.dumps(content))
    code, out, _ = run(capsys, "verify", str(file), "--device", "cpu")
    assert code == 1
    assert "mine.json: DIFFERENT" in out
    assert "first at blocks.0.hook_resid_mid: first sampled element that differs: [0, 0, 0], " in out
    code, _, err = run(capsys, "record", str(file), "--model", "synthetic")
    assert code == 2
    assert err.endswith("exists; record to another file or remove it first\n")


def test_an_edited_fingerprint_is_called_a_contradiction(capsys, tmp_path):
    content = json.loads(golden.packaged_goldens()[0].read_text("utf-8"))
    content["fingerprint"] = "0" * 64
    file = tmp_path / "g.json"
    file.write_text(json.dumps(content))
    code, out, err = run(capsys, "verify", str(file))
    assert (code, out) == (2, "")
    assert "contradicts itself" in err
    assert err.count("\n") == 1


def test_samples_are_the_exact_sampler_s_and_do_not_depend_on_how_many_there_are(capsys):
    given = ("sample", "One day,", "--length", "12", "--steps", "3", "--seed", "5")
    code, out, _ = run(capsys, *given, "--n", "2")
    assert code == 0
    first, second = out.split("---\n")
    assert first.startswith("One day,")
    assert first != second
    assert run(capsys, *given)[1] == first
    model, tokenizer = HookedMDLM.from_pretrained("bundled"), load_tokenizer("bundled")
    start = torch.full((1, 12), model.config.mask_id)
    prompt = tokenizer.encode_with_masks("One day,")
    start[0, : len(prompt)] = torch.tensor(prompt)
    ids = exact_sample(Oracle(model), start, steps=3, seed=5)
    assert tokenizer.decode(ids[0].tolist()) + "\n" == first


def test_fingerprint_prints_one_hash_and_on_request_all(capsys):
    code, out, _ = run(capsys, "fingerprint", "synthetic")
    assert code == 0
    assert (
        out.splitlines()[-1]
        == "fingerprint  3e119cecca54722a2480a8cffc7ca070066e2d6cafe2d9f90bc4fd420640054f"
    )
    code, out, _ = run(capsys, "fingerprint", "synthetic", "--ids", "3,60", "--sigma", "1.5", "--points")
    assert code == 0
    assert len(out.splitlines()) == 67 + 2
    assert out.splitlines()[0].endswith("  hook_embed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fingerprint", "synthetic", "--ids", "3"],
            "this model is time-conditioned: give --sigma, the noise level",
        ),
        (["fingerprint", "synthetic", "--text", "a", "--ids", "3"], "give either --text or --ids, not both"),
        (["fingerprint", "synthetic", "--text", "a"], "the synthetic model has no tokenizer; give --ids"),
        (["fingerprint", "synthetic", "--ids", "99", "--sigma", "1"], "token ids must be in [0, 61), got 99"),
        (["fingerprint", "synthetic", "--ids", "9" * 23, "--sigma", "1"], "in [0, 61), got 9999999999"),
        (["fingerprint", "synthetic", "--ids", "-1", "--sigma", "1"], "token ids must be in [0, 61), got -1"),
        (
            ["fingerprint", "--ids", ",".join("5" * 3000)],
            "--ids must be 1 to 128 tokens, the model's context, got 3000",
        ),
        (
            ["fingerprint", "synthetic", "--sigma", "0.5"],
            "the synthetic model's two have theirs; give --ids too",
        ),
        (
            ["fingerprint", "--ids", "1", "--sigma", "nan"],
            "is not time-conditioned and would not read --sigma",
        ),
        (
            ["fingerprint", "--ids", "1", "--sigma", "0.5"],
            "is not time-conditioned and would not read --sigma",
        ),
        *(
            (
                ["fingerprint", "synthetic", "--ids", "1", "--sigma", sigma],
                f"--sigma must be at least 0 and finite as float32, got {float(sigma)}",
            )
            for sigma in ("nan", "inf", "-1", "1e300")
        ),
        (["fingerprint", "--ids", "1", "--tokenizer", "x"], "--tokenizer is for a --text, and none is given"),
        (["fingerprint", "synthetic", "--tokenizer", "x"], "--tokenizer is for a --text, and none is given"),
        (["fingerprint"], "give the input: --text or"),
        (["fingerprint", "synthetic", "--device", "meta"], "which keeps shapes and no numbers"),
        (
            ["fingerprint", "synthetic", "--device", "potato"],
            "device must be cpu, cuda, cuda:1, mps or the like",
        ),
        (["verify", "--device", "meta"], "which keeps shapes and no numbers"),
        (["sample", "a", "--n", "0"], "n must be at least 1, got 0"),
        (["sample", "a", "--length", "0"], "[1, 128], the model's context, or none for all of it; got 0"),
        (["sample", "a b c d e f", "--length", "2"], "tokens, a sample 2; raise length"),
        (["sample", "a", "--length", "4", "--steps", "0"], "steps must be at least 1, got 0"),
        (
            ["sample", "a", "--length", "4", "--temperature", "nan"],
            "temperature must be at least 0 and finite, got nan",
        ),
        (["sample", "--model", "synthetic"], "the synthetic model has no tokenizer"),
        (["fingerprint", "synthetic", "--device", "cuda:99"], "torch finds no CUDA device; use cpu"),
        (["verify", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["verfy"], "unknown command 'oracle verfy'; did you mean 'oracle verify'?"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
