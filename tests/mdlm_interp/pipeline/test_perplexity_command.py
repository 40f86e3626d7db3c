"""What ppl prints: for one file and several, for one sequence, and when a number is beyond what floats hold."""

from __future__ import annotations

import math
import re

import pytest
import torch

from mdlm_interp.commands import _figures
from mdlm_interp.evaluation import Nelbo, nelbo, pooled
from tests.mdlm_interp.pipeline.conftest import LENGTH, sentences
from tests.mdlm_interp.pipeline.test_model_commands import refused, run


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(0, 250, (12, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def two_files(tmp_path):
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    for number, file in enumerate(files):
        file.write_text("\n\n".join(sentences(60)[20 * number : 20 + 40 * number]), "utf-8")
    return files


def figures(line: str) -> list[float]:
    return [float(value) for value in re.findall(r"<= ([\d.]+)", line)]


def test_a_file_named_twice_is_refused(capsys, model_directory, two_files):
    error = refused(capsys, "ppl", *two_files, two_files[0], "--model", model_directory)
    assert f"each file may be named once, {two_files[0]} is named twice; leave one of them out" in error


def test_every_file_has_its_line_and_all_together_the_table(capsys, model_directory, two_files):
    options = ("--model", model_directory, "--times", 2)
    code, out, _ = run(capsys, "ppl", *two_files, *options)
    first, second, header, *table = out.splitlines()
    alone = run(capsys, "ppl", two_files[0], *options)[1].splitlines()
    assert code == 0
    assert first.startswith(f"{two_files[0]}: perplexity <= ")
    assert second.startswith(f"{two_files[1]}: perplexity <= ")
    assert header == "all 2 files together:"
    assert figures(first) == [figures(line)[0] for line in alone[:3]]
    counts = [int(line.partition(" over ")[2].split()[0]) for line in (first, second, f" {table[3]}")]
    assert counts[0] + counts[1] == counts[2]
    assert counts[0] != counts[1]
    nats = [figures(line)[1] for line in (first, second)]
    # Bounded: four printed decimals.
    assert figures(table[1])[0] == pytest.approx(
        (nats[0] * counts[0] + nats[1] * counts[1]) / counts[2], abs=1e-4
    )


def test_one_file_has_no_line_of_its_own(capsys, model_directory, two_files):
    out = run(capsys, "ppl", two_files[0], "--model", model_directory)[1]
    assert out.startswith("perplexity      <= ")
    assert "together" not in out


def test_max_sequences_is_for_each_file(capsys, model_directory, two_files):
    out = run(capsys, "ppl", *two_files, "--model", model_directory, "--max-sequences", 3)[1]
    assert out.count("over 3 sequences\n") == 2
    assert f"over 6 sequences of {LENGTH} tokens" in out


def test_a_file_too_short_for_a_sequence_is_named(capsys, model_directory, two_files, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    assert (
        f"{short} is shorter than one sequence of {LENGTH} tokens; lower length or leave it out"
        in refused(capsys, "ppl", two_files[0], short, "--model", model_directory)
    )


def test_one_sequence_has_no_standard_error_and_bins_may_be_empty(capsys, model_directory, two_files):
    out = run(capsys, "ppl", two_files[0], "--model", model_directory, "--max-sequences", 1, "--times", 1)[1]
    assert "(no standard error: that takes two sequences)" in out
    assert f"over 1 sequence of {LENGTH} tokens" in out
    assert out.count("no token was masked at these t") == 9
    assert "nan" not in out


def bound(nats: float, sequences: int = 5) -> Nelbo:
    return Nelbo(nats_per_token=nats, standard_error=0.1, n_sequences=sequences, n_tokens=10, by_time=())


@pytest.mark.parametrize(
    ("nats", "shown"),
    [
        (2.0, "7.389"),
        (20.0, "485165195.410"),
        (100.0, "2.688e+43"),
        (709.7, "1.655e+308"),
        (709.8, "exp of the nats per token, more than float64 holds"),
        (math.inf, "inf"),
    ],
)
def test_a_perplexity_of_any_size_is_shown_as_it_is(nats, shown):
    assert _figures(bound(nats), 20)["perplexity"] == shown
    assert bound(nats).perplexity == (math.inf if nats > 709.79 else math.exp(nats))


def test_an_infinite_bound_says_that_it_has_no_error():
    infinite = Nelbo(nats_per_token=math.inf, standard_error=math.nan, n_sequences=2, n_tokens=10, by_time=())
    shown = _figures(infinite, 20)
    assert shown["nats per token"] == "inf (no standard error: the bound is not finite)"
    assert shown["bits per byte"] == "inf"


def test_pooled_estimates_are_the_estimate_over_all(tiny_model, blocks):
    """Bounded: the same draws and losses, added in another order."""
    whole = nelbo(tiny_model, blocks, times_per_sequence=2)
    parts = [
        nelbo(tiny_model, blocks[start:stop], first=start, times_per_sequence=2)
        for start, stop in ((0, 1), (1, 8), (8, 12))
    ]
    together = pooled(parts)
    assert (together.n_sequences, together.n_tokens) == (whole.n_sequences, whole.n_tokens)
    assert together.masked_by_time == whole.masked_by_time
    assert sum(whole.masked_by_time) > 0
    for name in ("nats_per_token", "standard_error", "by_time"):
        assert getattr(together, name) == pytest.approx(getattr(whole, name), rel=1e-5, nan_ok=True), name


def test_numbers_of_sequences_decide_their_draws(tiny_model, blocks):
    default = nelbo(tiny_model, blocks[:3])
    zero, three = (nelbo(tiny_model, blocks[:3], first=first) for first in (0, 3))
    assert zero.nats_per_token == default.nats_per_token != three.nats_per_token


def test_pooling_with_an_empty_bin_takes_the_others():
    parts = [
        Nelbo(
            nats_per_token=1.0,
            standard_error=math.nan,
            n_sequences=1,
            n_tokens=4,
            by_time=by_time,
            masked_by_time=masked,
        )
        for by_time, masked in (((math.nan, 3.0, math.nan), (0, 1, 0)), ((2.0, 5.0, math.nan), (2, 3, 0)))
    ]
    assert pooled(parts).by_time == pytest.approx((2.0, 4.5, math.nan), nan_ok=True)
    assert pooled(parts).standard_error == 0.0
    assert math.isnan(pooled(parts[:1]).standard_error)
