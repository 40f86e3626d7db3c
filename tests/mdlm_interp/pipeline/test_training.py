"""The training loop: what it optimises, that it learns, and that stopping it changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from mdlm_interp import HookedMDLM, MDLMConfig
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, nelbo_per_token, stratified_times
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.evaluation import nelbo
from mdlm_interp.randomness import uniforms
from mdlm_interp.training.baselines import unigram_probabilities
from mdlm_interp.training.checkpoint import LOG, saved_step
from mdlm_interp.training.data import consecutive_blocks, is_held_out, read_streams
from mdlm_interp.training.mdlm import MDLMRecipe
from mdlm_interp.training.sampling import WindowSampler
from mdlm_interp.training.text import VALIDATION_SEED
from mdlm_interp.training.text_report import table
from mdlm_interp.training.trainer import Trainer, train


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def bounds(trainer: Trainer) -> dict:
    """What a validation measures."""
    assert isinstance(trainer.recipe, MDLMRecipe)
    return trainer.recipe.bounds(trainer.average)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(
    config, tokenizer, streams, dropout
):
    config = replace(config, model=replace(config.model, dropout=dropout))
    whole = weights(train(config, tokenizer, streams))
    stopped = replace(config, out=config.out.with_name("stopped"))
    train(replace(stopped, steps=7), tokenizer, streams)
    resumed = weights(train(stopped, tokenizer, streams))
    assert same(whole, resumed)


def test_dropout_takes_part_in_training(config, tokenizer, streams):
    dropping = replace(config, out=config.out.with_name("drop"), model=replace(config.model, dropout=0.5))
    assert not same(weights(train(config, tokenizer, streams)), weights(train(dropping, tokenizer, streams)))


def test_an_interrupted_run_continues_from_its_last_checkpoint_with_the_same_log(
    config, tokenizer, streams, monkeypatch
):
    whole = train(config, tokenizer, streams)
    broken = replace(config, out=config.out.with_name("broken"))
    step = Trainer.step

    def interrupted(self: Trainer) -> tuple[float, float]:
        if self.step_number == 8:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(broken, tokenizer, streams)
    monkeypatch.setattr(Trainer, "step", step)
    assert saved_step(broken.out) == 5
    assert same(weights(whole), weights(train(broken, tokenizer, streams)))

    def entries(directory: Path) -> list[dict]:
        lines = [json.loads(line) for line in (directory / LOG).read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]

    # After a resume the running mean starts at the checkpoint, so only the steps that are logged must agree.
    assert [line["step"] for line in entries(broken.out)] == [line["step"] for line in entries(config.out)]


def test_one_step_is_adamw_on_the_bound(config, tokenizer, streams):
    """Bounded: the same step written out with torch's own optimiser, to rounding."""
    trainer = Trainer(replace(config, warmup_steps=0, grad_clip=1e9), tokenizer, streams)
    twin = HookedMDLM(config.model, seed=config.seed).train()
    optimiser = torch.optim.AdamW(twin.parameters(), lr=config.lr, betas=config.betas, weight_decay=0.0)
    x_0 = trainer.recipe.batch(0)["x_0"]
    t = stratified_times(torch.from_numpy(uniforms(config.seed, "train:t", 0, config.batch_size)))
    x_t = corrupt(
        x_0, LogLinearSchedule().move_chance(t), config.model.mask_id, seed=config.seed, indices=range(4)
    )
    loss = nelbo_per_token(twin(x_t), x_0, x_t, t, config.model.mask_id).mean()
    loss.backward()
    optimiser.step()
    reported, _ = trainer.step()
    assert reported == pytest.approx(float(loss.detach()), rel=1e-6)
    expected = dict(twin.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)


def test_training_lowers_the_held_out_bound(config, tokenizer, streams):
    """Behavioural: far below the uniform guess, and below where it started."""
    longer = replace(config, steps=150, batch_size=16, ema_decay=0.9, short_share=0.0)
    before = bounds(Trainer(longer, tokenizer, streams))
    after = bounds(train(longer, tokenizer, streams))
    guess = torch.tensor(float(config.model.vocab_size - 1)).log().item()
    for form in ("wrapped", "bare"):
        assert before[form].nats_per_token == pytest.approx(guess, rel=0.15)
        assert after[form].nats_per_token < before[form].nats_per_token - 1.5


@pytest.mark.parametrize(
    ("wrap_share", "forms"), [(1.0, ["wrapped"]), (0.0, ["bare"]), (0.5, ["wrapped", "bare"])]
)
def test_held_out_text_is_measured_in_each_form_that_is_trained(
    config, tokenizer, streams, wrap_share, forms
):
    config = replace(config, wrap_share=wrap_share, steps=2)
    trainer = train(config, tokenizer, streams)
    measured = bounds(trainer)
    lines = [json.loads(line) for line in (config.out / LOG).read_text().splitlines()]
    logged = {line["form"]: line["held_out_nats"] for line in lines if "held_out_nats" in line}
    assert list(measured) == list(logged) == forms
    length = config.model.model_length
    for form, bound in measured.items():
        eos = tokenizer.eos_id if form == "wrapped" else None
        blocks = consecutive_blocks(streams.held_out, length, config.validation_sequences, wrap_with=eos)
        expected = nelbo(
            cast(HookedMDLM, trainer.average), blocks, seed=VALIDATION_SEED, times_per_sequence=2
        )
        assert logged[form] == bound.nats_per_token == expected.nats_per_token
    if wrap_share == 0.5:
        assert logged["wrapped"] != logged["bare"]


def test_held_out_blocks_are_the_stream_in_order_with_end_of_texts_around_wrapped_ones(streams, tokenizer):
    bare = consecutive_blocks(streams.held_out, 20)
    wrapped = consecutive_blocks(streams.held_out, 20, wrap_with=tokenizer.eos_id)
    assert bare.flatten().tolist() == streams.held_out[: bare.numel()].tolist()
    inner = wrapped[:, 1:-1]
    assert inner.flatten().tolist() == streams.held_out[: inner.numel()].tolist()
    assert len(streams.held_out) - inner.numel() < 18
    assert bool((wrapped[:, [0, -1]] == tokenizer.eos_id).all())
    spread = consecutive_blocks(streams.held_out, 20, 3, wrap_with=tokenizer.eos_id)
    assert spread.tolist() == [
        wrapped[row].tolist() for row in (0, (len(wrapped) - 1) // 2, len(wrapped) - 1)
    ]
    with pytest.raises(DataError, match=r"has 19 tokens, fewer than one block of 20; give more text"):
        consecutive_blocks(streams.held_out[:19], 20)


def test_the_final_report_names_each_form_and_counts_its_text_once(config, tokenizer, streams):
    """In a wrapped sequence the two added end-of-texts are positions, but no bytes of text."""
    trainer = Trainer(config, tokenizer, streams)
    trainer.step()
    report = trainer.recipe.evaluate(trainer.average)
    assert list(report) == ["wrapped", "bare"]
    train_share = unigram_probabilities(streams.train, config.model.vocab_size)
    for form, figures in report.items():
        wrapped = form == "wrapped"
        blocks = consecutive_blocks(streams.held_out, 24, wrap_with=tokenizer.eos_id if wrapped else None)
        text = blocks[:, 1:-1] if wrapped else blocks
        n_bytes = text.numel() * streams.held_out_bytes / len(streams.held_out)
        bound = nelbo(cast(HookedMDLM, trainer.average), blocks, times_per_sequence=8)
        nats = figures["nats_per_token"]
        assert nats["model"] == bound.nats_per_token
        assert nats["unigram"] == pytest.approx(-np.log(train_share[text]).sum() / blocks.numel())
        for name, value in nats.items():
            bits = value * blocks.numel() / math.log(2)
            assert figures["bits_per_byte"][name] == pytest.approx(bits / n_bytes)
        assert figures["tokens"] == blocks.numel()
        assert ("end-of-texts at both ends" in figures["estimator"]) == wrapped
    printed = table(report)
    assert printed.index("wrapped sequences") < printed.index("bare sequences")


def test_figures_over_too_little_text_are_null_in_log_and_report(config, tokenizer, streams):
    """JSON has no nan; a strict reader would stop at one."""
    config = replace(config, steps=2, validation_sequences=1, wrap_share=1.0)
    few = replace(streams, held_out=streams.held_out[:22])
    trainer = train(config, tokenizer, few)
    lines = (config.out / LOG).read_text().splitlines()
    report = trainer.recipe.evaluate(trainer.average)["wrapped"]
    assert [json.loads(line, parse_constant=pytest.fail)["error"] for line in lines[1:]] == [None]
    assert report["standard_error_nats"] is None
    assert None in report["masked_cross_entropy_by_time"]
    assert "standard error unknown from one sequence" in table({"wrapped": report})


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(config, tokenizer, streams):
    trainer = Trainer(replace(config, grad_clip=1e-3), tokenizer, streams)
    _, norm = trainer.step()
    after = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    assert norm > 1e-2
    assert float(after) == pytest.approx(1e-3, rel=1e-3)


def test_the_average_ramps_up_and_follows_the_weights(config, tokenizer, streams):
    trainer = Trainer(replace(config, ema_decay=0.5), tokenizer, streams)
    name = "backbone.output_layer.linear.bias"
    average = dict(trainer.average.named_parameters())[name].clone()
    trainer.step()
    decay = min(0.5, 2 / 11)
    current = dict(trainer.model.named_parameters())[name]
    expected = decay * average + (1 - decay) * current
    torch.testing.assert_close(dict(trainer.average.named_parameters())[name], expected.detach())


def test_bfloat16_matrix_products_leave_weights_and_loss_in_float32(config, tokenizer, streams):
    trainer = Trainer(replace(config, precision="bfloat16"), tokenizer, streams)
    loss, _ = trainer.step()
    exact, _ = Trainer(config, tokenizer, streams).step()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert loss == pytest.approx(exact, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(config, tokenizer, streams):
    trainer = Trainer(config, tokenizer, streams)
    with torch.no_grad():
        dict(trainer.model.named_parameters())["backbone.output_layer.linear.bias"].fill_(torch.nan)
    with pytest.raises(
        CheckpointError, match=r"the loss of step 0 is nan; start anew .* lower lr .* \(batch 0 of seed 0\)"
    ):
        trainer.step()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(config, tokenizer, streams, monkeypatch):
    trainer = Trainer(config, tokenizer, streams)
    before = weights(trainer)
    hook = next(trainer.model.parameters()).register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(CheckpointError, match=r"the gradient's norm of step 0 is (nan|inf); start anew"):
        trainer.step()
    hook.remove()
    assert same(before, {name: tensor for name, tensor in weights(trainer).items() if name in before})


def test_batches_are_a_pure_function_of_seed_and_step(streams, tokenizer):
    def sampler(seed: int) -> WindowSampler:
        return WindowSampler(
            stream=streams.train,
            length=20,
            batch_size=3,
            eos_id=tokenizer.eos_id,
            seed=seed,
            wrap_share=0.5,
            short_share=0.0,
        )

    first = [sampler(1).batch(step) for step in (0, 1, 2)]
    assert torch.equal(sampler(1).batch(2), first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(sampler(2).batch(0), first[0])


def test_windows_are_pieces_of_the_stream_and_wrapped_ones_stand_between_end_of_texts(streams, tokenizer):
    text = " ".join(map(str, streams.train.tolist()))
    for share in (0.0, 1.0):
        sampler = WindowSampler(
            stream=streams.train,
            length=20,
            batch_size=8,
            eos_id=tokenizer.eos_id,
            seed=0,
            wrap_share=share,
            short_share=0.0,
        )
        for row in sampler.batch(5).tolist():
            inner = row[1:-1] if share else row
            assert " ".join(map(str, inner)) in text
            assert not share or row[0] == row[-1] == tokenizer.eos_id


def test_short_steps_are_shorter_and_as_frequent_as_asked(streams, tokenizer):
    sampler = WindowSampler(
        stream=streams.train,
        length=40,
        batch_size=1,
        eos_id=tokenizer.eos_id,
        seed=0,
        wrap_share=0.0,
        short_share=0.25,
    )
    lengths = [sampler.batch(step).shape[1] for step in range(400)]
    assert set(lengths) == {16, 32, 40}
    assert 0.18 < sum(length < 40 for length in lengths) / 400 < 0.32


def test_documents_are_split_by_their_own_text(text_file, tokenizer, tmp_path):
    twice = read_streams([text_file, text_file], tokenizer, 0.2)
    once = read_streams([text_file], tokenizer, 0.2)
    assert len(twice.train) == 2 * len(once.train)
    assert twice.held_out.tolist() == once.held_out.tolist()
    texts = text_file.read_text().strip().split("\n\n")
    held_out = [text for text in texts if is_held_out(text, 0.2)]
    expected = [token for text in held_out for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert once.held_out.tolist() == expected
    assert once.held_out_bytes == sum(len(text.encode()) for text in held_out)


def test_text_too_small_for_a_window_or_a_split_is_refused(tmp_path, tokenizer, config):
    path = tmp_path / "one.txt"
    path.write_text("the old fox")
    with pytest.raises(DataError, match=r"no document fell on the .* side"):
        read_streams([path], tokenizer, 0.2)


def test_a_tokenizer_of_another_size_is_refused(config, tokenizer, streams):
    other = replace(config, model=MDLMConfig(**{**vars(config.model), "vocab_size": 301}))
    with pytest.raises(DataError, match=r"the tokenizer has 300 ids and model.vocab_size is 301"):
        Trainer(other, tokenizer, streams)


def test_the_learning_rate_rises_holds_and_falls(config):
    config = replace(config, steps=100, warmup_steps=10, decay="linear", decay_steps=20, lr=1.0)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
