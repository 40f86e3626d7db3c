"""`ppl` by likelihood, in steps, of corpora; `sample` from a config file and with figures of what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdlm_interp import HookedMDLM, load_tokenizer
from mdlm_interp.__main__ import main
from mdlm_interp.commands import PerplexityConfig
from mdlm_interp.decoding.commands import SampleConfig
from mdlm_interp.errors import ConfigError
from mdlm_interp.evaluation import judge_samples, order_likelihood, sample_statistics
from mdlm_interp.evaluation.packing import text_sequences

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "mdlm_interp" / "assets" / "demo.txt"
SHORT = ("--length", "16", "--max-sequences", "3")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ppl_by_order_prints_the_likelihood(capsys):
    code, out, _ = run(capsys, "ppl", DEMO, *SHORT, "--estimator", "order", "--per-step", 4)
    model, tokenizer = HookedMDLM.from_pretrained("bundled"), load_tokenizer("bundled")
    expected = order_likelihood(model, text_sequences(DEMO, tokenizer, 16, max_sequences=3), per_step=4)
    assert code == 0
    assert f"perplexity       = {expected.perplexity:.6g}\n" in out
    assert f"nats per token   = {expected.nats_per_token:.4f} +- {expected.standard_error:.4f}\n" in out
    assert out.endswith("estimator: exact likelihood by left_to_right, 4 tokens a step\n")


def test_ppl_s_form_of_the_text_changes_it(capsys):
    outputs = {
        options: run(capsys, "ppl", DEMO, *SHORT, *options)[1]
        for options in ((), ("--no-insert-eos",), ("--n-steps", "8"), ("--text-form", "wikitext"))
    }
    assert "estimator: discrete-time bound in 8 steps, 4 stratified times" in outputs["--n-steps", "8"]
    assert outputs[()] != outputs["--n-steps", "8"]
    file = run(capsys, "ppl", DEMO, *SHORT)[1]
    assert file == outputs[()]


def test_ppl_takes_a_config_file(capsys, tmp_path):
    config = tmp_path / "ppl.yaml"
    config.write_text(f"files: [{DEMO}]\nlength: 16\nmax_sequences: 3\nestimator: order\n", "utf-8")
    assert run(capsys, "ppl", config) == run(capsys, "ppl", DEMO, *SHORT, "--estimator", "order")


def test_sample_takes_a_config_file_and_prints_figures(capsys, tmp_path):
    config = tmp_path / "sample.yaml"
    config.write_text("n: 2\nlength: 12\nsteps: 4\nprompt: One day,\n", "utf-8")
    code, out, _ = run(capsys, "sample", config, "--metrics", "--judge", "bundled")
    assert code == 0
    texts = [part.removesuffix("\n") for part in out.split("---\n")]
    assert len(texts) == 3
    plain = run(capsys, "sample", "One day,", "--n", 2, "--length", 12, "--steps", 4)[1]
    assert out.startswith(plain)
    judged = judge_samples(texts[:2], "bundled")
    assert f"perplexity under bundled  {judged.perplexity:.4g}" in texts[2]
    assert "estimator: continuous-time bound" in texts[2]
    assert "unigram entropy" in texts[2]
    assert sum(line.startswith(("rep-", "distinct-")) for line in texts[2].splitlines()) == 8


def test_the_oracle_draws_by_every_sampler(capsys):
    given = ("One day,", "--length", 10, "--by", "margin", "--steps", 3, "--top-p", 0.9)
    code, out, _ = run(capsys, "oracle", "sample", *given)
    assert code == 0
    assert out.startswith("One day,")
    assert "[MASK]" not in out
    assert out == run(capsys, "oracle", "sample", *given, "--n", 2, "--batch-size", 2)[1].split("---\n")[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_step": 2}, "per_step has no effect with estimator 'nelbo', got 2; leave it out"),
        (
            {"estimator": "order", "n_steps": 3},
            "n_steps has no effect with estimator 'order', got 3; leave it out",
        ),
        ({"estimator": "order", "order": "margin", "positions": (0,)}, "positions are an order of their own"),
        ({"n_steps": 0}, "n_steps must be at least 1, got 0"),
    ],
)
def test_options_of_ppl_that_would_change_nothing_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        PerplexityConfig(files=(DEMO,), **given)


def test_a_judge_never_speaks_alone():
    with pytest.raises(
        ConfigError, match="is printed beside entropy and repetition, or it would mislead; add --metrics"
    ):
        SampleConfig(judge="bundled")


def test_samples_have_the_figures_that_the_library_gives(capsys):
    out = run(capsys, "sample", "--n", 3, "--length", 10, "--steps", 2, "--metrics")[1]
    from mdlm_interp.decoding import Ancestral, Sampler, sample, start_tokens

    model = HookedMDLM.from_pretrained("bundled")
    final = sample(model, start_tokens(model, 10, n=3), Sampler(schedule=Ancestral(steps=2))).final
    found = sample_statistics(final.tolist())
    assert f"unigram entropy  {found.entropy:.4f} +- {found.entropy_error:.4f} nats" in out
    assert f"rep-2            {found.rep[2]:.4f}" in out
