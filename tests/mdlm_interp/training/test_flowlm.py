"""The FlowLM recipe on small BERTs and ModernBERTs: what it corrupts, that it learns, resumes and rewrites."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from mdlm_interp.__main__ import main
from mdlm_interp.config_files import load_config
from mdlm_interp.decoding import Draw, Rewrite, Sampler
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.training import flowlm as flowlm_module
from mdlm_interp.training.chat import Message
from mdlm_interp.training.checkpoint import LOG
from mdlm_interp.training.dllm_answers import Chatbot
from mdlm_interp.training.flowlm import FlowLMRecipe, SoftEncoder, TrainFlowLMConfig
from mdlm_interp.training.flowlm_loss import symmetric_kl
from mdlm_interp.training.flowlm_noise import flip_probability, view_scale
from mdlm_interp.training.trainer import Trainer, train
from tests.mdlm_interp.training.dllm_encoders import (
    ANIMALS,
    COLOURS,
    KINDS,
    LONGEST,
    PLACES,
    answer,
    question,
    write_chats,
    write_encoder,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    return {
        kind: write_encoder(tmp_path_factory.mktemp("encoder") / kind, kind, dropout=0.1) for kind in KINDS
    }


@pytest.fixture(params=KINDS)
def config(request, chats, encoders, tmp_path) -> TrainFlowLMConfig:
    """A run of a second."""
    return TrainFlowLMConfig(
        files=(chats,),
        encoder=encoders[request.param],
        out=tmp_path / "run",
        steps=6,
        batch_size=8,
        lr=3e-3,
        max_length=LONGEST,
        flip=(0.1, 0.9),
        held_out_share=0.15,
        validate_every=100,
        checkpoint_every=4,
        log_every=2,
    )


@pytest.fixture
def inputs(config):
    return FlowLMRecipe.read(config)


@pytest.fixture
def recipe(config, inputs):
    return FlowLMRecipe(config, *inputs)


def frozen(recipe: FlowLMRecipe) -> torch.nn.Module:
    return recipe.build().eval().requires_grad_(False)


def test_an_encoder_reads_one_hots_as_it_reads_ids(recipe):
    """Bounded: a product with a one-hot is the row itself, 1e-5."""
    batch, module = recipe.batch(0), frozen(recipe)
    assert isinstance(module, SoftEncoder)
    encoder: Any = module.encoder
    hot = torch.nn.functional.one_hot(batch["ids"], recipe.encoder.vocab_size).float()
    found = module(hot, batch["attention_mask"])
    expected = encoder(input_ids=batch["ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tokens_are_flipped_as_often_as_asked(recipe):
    """Behavioural: over 800 rows within 4.5 standard deviations of the rows' own probabilities."""
    flipped = expected = variance = 0.0
    for step in range(100):
        batch = recipe.batch(step)
        chance = flip_probability(batch["level"], recipe.encoder.vocab_size, "variance_preserving")
        assert bool(((chance > 0.1 - 1e-9) & (chance < 0.9 + 1e-9)).all())
        changed = (recipe.soften(batch, 0, 1e-8).argmax(-1) != batch["ids"]) & batch["noised"]
        lengths = batch["noised"].sum(1)
        flipped += float(changed.sum())
        expected += float((chance * lengths).sum())
        variance += float((chance * (1 - chance) * lengths).sum())
    assert abs(flipped - expected) < 4.5 * variance**0.5


def test_all_but_padding_is_noised_as_published_or_the_answers_alone(config, inputs, recipe):
    batch = recipe.batch(0)
    assert torch.equal(batch["noised"], batch["attention_mask"].bool())
    answers = FlowLMRecipe(replace(config, noised="answers"), *inputs)
    only = answers.batch(0)
    soft = answers.soften(only, 0, 1.0)
    hot = torch.nn.functional.one_hot(only["ids"], recipe.encoder.vocab_size).float()
    assert torch.equal(soft[~only["noised"]], hot[~only["noised"]])
    assert not bool((soft[only["noised"]] == hot[only["noised"]]).all(-1).any())
    assert 0 < int(only["noised"].sum()) < int(batch["noised"].sum())


@pytest.mark.parametrize("weighting", ["relative", "published", "none"])
@pytest.mark.parametrize("divergence", ["corrected", "published"])
def test_the_loss_is_the_weighed_divergence_of_the_noised_tokens(config, inputs, weighting, divergence):
    """Bounded: 1e-5, rows one by one against the batch."""
    config = replace(config, weighting=weighting, divergence=divergence, anneal_steps=10)
    recipe = FlowLMRecipe(config, *inputs)
    batch, module = recipe.batch(2), frozen(recipe)
    soft = recipe.soften(batch, config.seed, 1e-3 * (1 - 4 / 10) + 1e-8)
    found, vocab_size, expected = recipe.loss_sum(module, batch, 4), recipe.encoder.vocab_size, 0.0
    for row in range(8):
        length = int(batch["attention_mask"][row].sum())
        logits = module(soft[row : row + 1, :length], torch.ones(1, length, dtype=torch.int64))
        terms = symmetric_kl(
            logits, batch["ids"][row : row + 1, :length], as_published=divergence == "published"
        )
        scale = float(view_scale(batch["level"], vocab_size)[row])
        weight = {"none": 1.0, "published": scale, "relative": scale * vocab_size}[weighting]
        expected += weight * float(terms.sum())
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert recipe.weight(batch) == float(batch["attention_mask"].sum())


def test_a_rows_noise_does_not_depend_on_its_batch(recipe):
    whole = recipe.batch(1)
    part = {name: tensor[3:5] for name, tensor in whole.items()}
    assert torch.equal(recipe.soften(part, 0, 0.1), recipe.soften(whole, 0, 0.1)[3:5])
    assert not torch.equal(recipe.soften(part, 1, 0.1), recipe.soften(part, 0, 0.1))


def test_a_window_cut_in_pieces_has_the_gradient_of_one_batch(config, inputs):
    """Bounded: 1e-5 of the largest gradient; dropout is off."""
    whole, cut = Trainer(config, *inputs), Trainer(replace(config, micro_batch_size=3), *inputs)
    for trainer in (whole, cut):
        trainer.model.eval()
        trainer.accumulate(trainer.recipe.batch(0))
    for (name, one), other in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
            continue
        assert other.grad is not None, name
        torch.testing.assert_close(
            one.grad, other.grad, rtol=0, atol=1e-5 * float(one.grad.abs().max()) + 1e-9
        )


def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(config, inputs):
    config = replace(config, anneal_steps=10)
    whole = train(config, *inputs).tensors()
    stopped = replace(config, out=config.out.with_name("stopped"))
    train(replace(stopped, steps=3), *inputs)
    resumed = train(stopped, *FlowLMRecipe.read(stopped)).tensors()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_validation_does_not_depend_on_its_batches(recipe, monkeypatch):
    """Bounded: 1e-5, the order of float32 sums."""
    module = frozen(recipe)
    (first,) = recipe.validate(module)
    monkeypatch.setattr(flowlm_module, "VALIDATION_ROWS", 2)
    (second,) = recipe.validate(module)
    for name in ("held_out_nats", "symmetric_kl_nats", "accuracy_flipped"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)


def test_a_final_report_counts_what_it_says(recipe):
    report = recipe.evaluate(frozen(recipe))
    assert report["tokens"] == sum(len(example.ids) for example in recipe.examples.held_out)
    assert abs(report["flipped"] - report["flipped_expected"]) < 4.5 * (0.25 / report["tokens"]) ** 0.5
    json.dumps(report, allow_nan=False)
    assert f"{report['nats']:10.4f}" in recipe.table(report)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_an_encoder_that_writes_answers_over_random_tokens(
    kind, chats, encoders, tmp_path, capsys
):
    """Behavioural: 300 small steps; then answers from random tokens by both published rewriting orders."""
    out = tmp_path / "run"
    arguments = {"files": chats, "encoder": encoders[kind], "out": out, "steps": 300, "decay-steps": 250}
    arguments |= {"batch-size": 16, "micro-batch-size": 16, "precision": "float32", "lr": 4e-3}
    arguments |= {"max-length": LONGEST, "held-out-share": 0.15, "flip": "0.4,0.98", "noised": "answers"}
    options = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert main(["train-lm", str(ROOT / "configs/train_flowlm.yaml"), *options]) == 0
    log = [json.loads(line) for line in (out / LOG).read_text("utf-8").splitlines()]
    losses = [line["loss_nats"] for line in log if "loss_nats" in line]
    assert losses[-1] < 0.3 * losses[0]
    report = json.loads((out / "model/training.json").read_text("utf-8"))["held_out"]
    assert report["nats"] < 0.5 * report["unigram_nats"]
    assert "held-out answers" in capsys.readouterr().out

    chatbot = Chatbot.from_pretrained(out / "model")
    most = Rewrite(version="most_confident", steps=40)
    least = Rewrite(version="least_confident", steps=40, threshold=1.0)
    for schedule in (most, least):
        assert rewritten(chatbot, schedule) >= 20  # of 24, by chance 3
    # The published threshold passes over random tokens for which the model is sure of others.
    assert rewritten(chatbot, replace(least, threshold=0.5)) <= 6


def rewritten(chatbot: Chatbot, schedule: Rewrite) -> int:
    """How many of 24 answers, started from random tokens, name the right place."""
    right = 0
    for animal, colour in product(ANIMALS, COLOURS[:3]):
        length = len(chatbot.encoder.tokenizer(answer(colour, animal), add_special_tokens=False)["input_ids"])
        sampler = Sampler(schedule=schedule, draw=Draw(temperature=0.0))
        found = chatbot.answer([Message("user", question(colour, animal))], length, sampler)
        states = found.trajectory.states[:, 0, found.start : found.start + length]
        assert not bool(torch.isin(states, torch.tensor(chatbot.encoder.control_ids())).any())
        right += PLACES[animal] in found.text
    return right


def test_the_loss_curve_says_that_its_lines_are_of_two_quantities():
    """What is trained on is no cross-entropy, which is what held-out text is measured by."""
    trained, held_out = FlowLMRecipe.QUANTITY.split(";")
    assert "symmetric KL" in trained
    assert "cross-entropy" in held_out


def test_flip_probabilities_above_chance_are_refused_when_the_run_starts(config, inputs):
    with pytest.raises(DataError, match=r"flip probabilities must be between 0 and 1 - 1/\d+"):
        FlowLMRecipe(replace(config, flip=(0.5, 0.999)), *inputs)


def test_published_levels_are_taken_as_they_are(config, inputs):
    recipe = FlowLMRecipe(replace(config, level=(0.03, 0.15)), *inputs)
    level = torch.cat([recipe.batch(step)["level"] for step in range(50)])
    assert 0.03 <= float(level.min()) < 0.035
    assert 0.145 < float(level.max()) <= 0.15
    assert float(level.mean()) == pytest.approx(0.09, abs=0.01)


def test_the_shipped_config_is_the_recipe_with_its_corrections():
    config = load_config(TrainFlowLMConfig, ROOT / "configs/train_flowlm.yaml")
    assert (config.divergence, config.weighting, config.mixing) == (
        "corrected",
        "relative",
        "variance_preserving",
    )
    assert config.level is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": (0.5, 0.2)}, r"flip must be two numbers in \(0, 1\), the lower first; got 0.5, 0.2"),
        ({"flip": (0.0, 0.2)}, "flip must be two numbers"),
        ({"level": (0.1, 1.0)}, "level must be two numbers"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"anneal_steps": 0}, "anneal_steps must be at least 1, got 0; none keeps"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    usual = {"files": (Path("a.jsonl"),), "encoder": Path("e"), "out": Path("o")}
    with pytest.raises(ConfigError, match=message):
        TrainFlowLMConfig(**{**usual, **settings})
