"""`mdlm-interp oracle fingerprint | record | verify`, run as a user runs them."""

from __future__ import annotations

import json

import pytest

from mdlm_interp.__main__ import main
from oracle import golden


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
    point["sha256"], point["samples"][0] = "0" * 64, "0x1.8p+0"
    file.write_text(json.dumps(content))
    code, out, _ = run(capsys, "verify", str(file), "--device", "cpu")
    assert code == 1
    assert "mine.json: DIFFERENT" in out
    assert "first at blocks.0.hook_resid_mid: first sampled element that differs: [0, 0, 0], " in out
    code, _, err = run(capsys, "record", str(file), "--model", "synthetic")
    assert code == 2
    assert err.endswith("exists; record to another file or remove it first\n")


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
