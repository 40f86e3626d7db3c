"""The learner's recipe: its loss, its times, that it learns, and that kill -9 costs nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdlm_interp.__main__ import main
from mdlm_interp.evaluation import nelbo
from mdlm_interp.learner import HookedLearner
from mdlm_interp.tokenizers import load_tokenizer
from mdlm_interp.training.checkpoint import LOG, STATE, saved_step
from mdlm_interp.training.learner import LearnerRecipe
from mdlm_interp.training.token_cache import mapped_streams
from mdlm_interp.training.trainer import Trainer, train

ROOT = Path(__file__).parents[3]


@pytest.fixture
def recipe(learner_config, tokenizer, streams) -> LearnerRecipe:
    return LearnerRecipe(learner_config, tokenizer, streams)


def test_the_loss_is_the_published_one(recipe):
    """Bounded: 1e-6 in float32: mean over rows of 1 / t, times the sum of the masked cross-entropy, over T."""
    model = recipe.build().eval()
    with torch.no_grad():
        model.norm_final.weight.mul_(20.0)  # logits that differ
    batch = recipe.batch(2)
    x_0, x_t, t = batch["x_0"], batch["x_t"], batch["t"]
    logits = model(x_t, -torch.log1p(-t).float())
    expected = 0.0
    for row in range(len(x_0)):
        total = 0.0
        for position in range(x_0.shape[1]):
            if int(x_t[row, position]) == recipe.mask_id:
                log_probs = logits[row, position].detach().log_softmax(-1)
                total -= float(log_probs[x_0[row, position]])
        expected += total / float(t[row]) / x_0.shape[1] / len(x_0)
    loss = recipe.loss_sum(model, batch, 2) / recipe.weight(batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_a_token_is_masked_with_probability_t(recipe):
    """Behavioural: within five deviations, over the windows of forty epochs; unmasked tokens are untouched."""
    masked = expected = variance = 0.0
    for step in range(40 * recipe.sampler.steps_per_epoch):
        batch = recipe.batch(step)
        is_masked = batch["x_t"] == recipe.mask_id
        assert torch.equal(batch["x_t"][~is_masked], batch["x_0"][~is_masked])
        chance = batch["t"][:, None].expand(is_masked.shape)
        masked += float(is_masked.sum())
        expected += float(chance.sum())
        variance += float((chance * (1 - chance)).sum())
    assert abs(masked - expected) < 5 * math.sqrt(variance)


def test_times_are_spread_over_a_window_or_drawn_one_by_one(learner_config, tokenizer, streams):
    spread = LearnerRecipe(learner_config, tokenizer, streams)
    alone = LearnerRecipe(replace(learner_config, times="independent"), tokenizer, streams)
    for step in range(20):
        assert sorted((7 * (spread.times(step, 7) - 1e-3) / 0.999).long().tolist()) == list(range(7))
    drawn = torch.cat([alone.times(step, 100) for step in range(200)])
    assert float(drawn.min()) == pytest.approx(1e-3)  # clamped, as published: one in a thousand
    clamped = int((drawn == 1e-3).sum())
    assert abs(clamped - 20) < 5 * 20**0.5
    assert any(len(set((7 * alone.times(step, 7)).long().tolist())) < 7 for step in range(20))
    assert torch.equal(alone.times(3, 7), alone.times(3, 7))


@pytest.mark.parametrize("time_conditioning", [True, False])
def test_it_learns(learner_config, tokenizer, streams, time_conditioning):
    """Behavioural: far below the uniform guess in nats, with the time factor and without it."""
    config = replace(
        learner_config,
        model=replace(learner_config.model, hidden_dim=32, time_conditioning=time_conditioning),
        steps=70,
        batch_size=16,
        lr=1e-2,
        decay="cosine",
        decay_steps=60,
        ema_decay=0.9,
    )
    trainer = train(config, tokenizer, streams)
    report = trainer.recipe.evaluate(trainer.average)["bare"]["nats_per_token"]
    assert report["model"] < math.log(299) - 1.5
    assert report["model"] < report["unigram"]


def test_the_command_makes_a_model_that_loads_and_names_what_it_was(
    learner_config, text_file, tokenizer_directory, tmp_path, capsys
):
    out = tmp_path / "run"
    arguments = ["--files", text_file, "--tokenizer", tokenizer_directory, "--out", out, "--steps", 4]
    arguments += ["--token-cache", tmp_path / "tokens", "--model.vocab-size", 300, "--model.model-length", 24]
    arguments += ["--decay-steps", 2, "--warmup-steps", 1, "--held-out-share", 0.2, "--log-every", 2]
    config = ROOT / "configs" / "train_learner.yaml"
    assert main(["train-lm", str(config), *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert "training tokens" in printed.out
    assert "ideal-loss estimate: " in printed.err
    model = HookedLearner.from_pretrained(out / "model")
    report = json.loads((out / "model" / "training.json").read_text())
    assert report["config"]["recipe"] == "learner"
    length = model.config.model_length
    held_out = LearnerRecipe(
        replace(learner_config, model=model.config),
        load_tokenizer(out / "model"),
        _streams(tmp_path, text_file),
    ).held_out_blocks()["bare"]
    assert held_out.shape[1] == length == 24
    bound = nelbo(model, held_out, times_per_sequence=8)
    assert report["held_out"]["bare"]["nats_per_token"]["model"] == pytest.approx(
        bound.nats_per_token, rel=1e-6
    )
    opening = json.loads((out / LOG).read_text().splitlines()[0])
    assert opening["step"] == 0
    assert opening["compressor"] == "lzma"


def _streams(tmp_path, text_file):
    return mapped_streams(tmp_path / "tokens", [text_file], load_tokenizer(tmp_path / "run" / "model"), 0.2)


# Resuming


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(learner_config, tokenizer, streams):
    """Exact, with everything on that could differ: dropout, pieces, autocast, partial windows, averages."""
    config = replace(
        learner_config,
        model=replace(learner_config.model, dropout=0.3),
        micro_batch_size=3,
        precision="bfloat16",
        decay="cosine",
        decay_steps=6,
    )
    whole = train(config, tokenizer, streams).tensors()
    stopped = replace(config, out=config.out.with_name("stopped"), checkpoint_every=1)
    step = Trainer.step
    for end in (3, 6):

        def killed(self: Trainer, end: int = end) -> tuple[float, float]:
            if self.step_number == end:
                raise MemoryError
            return step(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", killed)
            with pytest.raises(MemoryError):
                train(stopped, tokenizer, streams)
        assert saved_step(stopped.out) == end
    resumed = train(stopped, tokenizer, streams).tensors()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_kill_nine_costs_no_bit(text_file, tokenizer_directory, tmp_path):
    """Exact: a process that is killed without warning at whatever it does then, and the weights it ends with."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"recipe: learner\nfiles: [{text_file}]\ntokenizer: {tokenizer_directory}\nout: {tmp_path / 'run'}\n"
        "model: {vocab_size: 300, model_length: 24, hidden_dim: 16, n_blocks: 1, n_heads: 2}\n"
        "steps: 60\nbatch_size: 5\nmicro_batch_size: 2\nwarmup_steps: 2\nheld_out_share: 0.2\norder: packed\n"
        "wrap_share: 0.0\nvalidate_every: 1000\nvalidation_sequences: 4\ncheckpoint_every: 2\n"
        f"token_cache: {tmp_path / 'tokens'}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mdlm_interp", "train-lm", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while (saved_step(tmp_path / "run") or 0) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 4 <= (saved_step(tmp_path / "run") or 0) < 60
    for out in ("run", "whole"):
        assert main(["train-lm", str(path), "--out", str(tmp_path / out)]) == 0
    for name in (STATE, "model/model.safetensors"):
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "run"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
