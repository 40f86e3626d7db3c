"""The dLLM recipe on small BERTs and ModernBERTs: what it reads, that it learns, resumes and answers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdlm_interp.__main__ import main
from mdlm_interp.config_files import load_config
from mdlm_interp.errors import CheckpointError, ConfigError, DataError
from mdlm_interp.training import dllm as dllm_module
from mdlm_interp.training.chat import Message
from mdlm_interp.training.checkpoint import LOG
from mdlm_interp.training.dllm import DLLMRecipe, TrainDLLMConfig
from mdlm_interp.training.dllm_answers import Chatbot
from mdlm_interp.training.dllm_encoder import load_encoder
from mdlm_interp.training.dllm_masks import IGNORED, MaskingConfig
from mdlm_interp.training.trainer import Trainer, train
from tests.mdlm_interp.training.dllm_encoders import (
    ANIMALS,
    COLOURS,
    KINDS,
    LONGEST,
    PLACES,
    answer,
    make_model,
    make_tokenizer,
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
    """A directory of each kind, with dropout, as published encoders have."""
    return {
        kind: write_encoder(tmp_path_factory.mktemp("encoder") / kind, kind, dropout=0.1) for kind in KINDS
    }


@pytest.fixture(params=KINDS)
def config(request, chats, encoders, tmp_path) -> TrainDLLMConfig:
    """A run of a second."""
    return TrainDLLMConfig(
        files=(chats,),
        encoder=encoders[request.param],
        out=tmp_path / "run",
        steps=6,
        batch_size=8,
        lr=3e-3,
        max_length=LONGEST,
        held_out_share=0.15,
        validate_every=100,
        checkpoint_every=4,
        log_every=2,
    )


@pytest.fixture
def inputs(config):
    return DLLMRecipe.read(config)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def test_the_loss_of_a_batch_is_that_of_its_rows_alone(config, inputs):
    """Bounded: padding changes nothing but the order of sums, 1e-5 of about 50 nats."""
    recipe = DLLMRecipe(config, *inputs)
    module = recipe.build().eval().requires_grad_(False)
    rows = list(inputs[1].train[:6])
    cut = [
        example._replace(ids=example.ids[: 30 - n], is_answer=example.is_answer[: 30 - n])
        for n, example in enumerate(rows)
    ]
    masked = [recipe._masked(example, 0, n, 0) for n, example in enumerate(cut)]
    together = recipe.loss_sum(module, recipe._padded(masked), 0)
    alone = sum(recipe.loss_sum(module, recipe._padded([one]), 0) for one in masked)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


def test_the_published_padding_is_to_max_length_and_is_attended_to(config, inputs):
    recipe = DLLMRecipe(replace(config, padding="attended"), *inputs)
    batch = recipe.batch(0)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (8, LONGEST)
    module = recipe.build().eval().requires_grad_(False)
    with_mask = DLLMRecipe(config, *inputs)
    ours, theirs = with_mask.loss_sum(module, with_mask.batch(0), 0), recipe.loss_sum(module, batch, 0)
    assert abs(float(ours) - float(theirs)) > 1e-3
    assert torch.equal(
        with_mask.batch(0)["labels"], batch["labels"][:, : with_mask.batch(0)["labels"].shape[1]]
    )


def test_the_loss_is_over_masked_answer_tokens_alone(config, inputs):
    recipe = DLLMRecipe(config, *inputs)
    batch = recipe.batch(3)
    chosen = batch["labels"] != IGNORED
    assert recipe.weight(batch) == float(chosen.sum())
    assert (batch["input_ids"][chosen] == recipe.encoder.mask_id).all()
    assert ((batch["input_ids"] == recipe.encoder.mask_id) == chosen).all()
    module = recipe.build().eval().requires_grad_(False)
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = -logits.log_softmax(-1)[chosen].gather(-1, batch["labels"][chosen][:, None]).sum()
    assert float(recipe.loss_sum(module, batch, 0)) == pytest.approx(float(expected), rel=1e-5)


def test_each_epoch_shows_every_conversation_once_with_masks_of_its_own(config, inputs):
    recipe = DLLMRecipe(config, *inputs)
    n = len(inputs[1].train)
    rows = [row for step in range(2 * n // 8 + 1) for row in recipe.rows(step)][: 2 * n]
    for epoch in (0, 1):
        shown = [example for _, its_epoch, example in rows if its_epoch == epoch]
        assert sorted(shown) == list(range(n))
    assert [row[2] for row in rows[:n]] != [row[2] for row in rows[n:]]
    example = inputs[1].train[0]
    first, second = (recipe._masked(example, epoch, 0, 0)[0].labels for epoch in (0, 1))
    assert not np.array_equal(first, second)


def test_a_window_cut_in_pieces_has_the_gradient_of_one_batch(config, inputs):
    """Bounded: 1e-5 of the largest gradient; the last piece is smaller, and dropout is off."""
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
    whole = weights(train(config, *inputs))
    stopped = replace(config, out=config.out.with_name("stopped"))
    train(replace(stopped, steps=3), *inputs)
    resumed = weights(train(stopped, *DLLMRecipe.read(stopped)))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_encoder_or_template_does_not_continue_a_run(config, inputs, tmp_path, encoders):
    train(replace(config, steps=1), *inputs)
    other = replace(config, encoder=next(path for path in encoders.values() if path != config.encoder))
    with pytest.raises(CheckpointError, match=r"encoder .* is not what the run in .* was trained with"):
        train(other, *DLLMRecipe.read(other))
    (tmp_path / "template.jinja").write_text(inputs[2].replace("Assistant", "Robot"), "utf-8")
    other = replace(config, template=tmp_path / "template.jinja")
    with pytest.raises(CheckpointError, match=r"template .* is not what the run in"):
        train(other, *DLLMRecipe.read(other))


def test_a_validation_does_not_depend_on_its_batches_or_the_step(config, inputs, monkeypatch):
    """Bounded: 1e-5, the order of float32 sums."""
    recipe = DLLMRecipe(config, *inputs)
    module = recipe.build().eval()
    (first,) = recipe.validate(module)
    monkeypatch.setattr(dllm_module, "VALIDATION_ROWS", 3)
    (second,) = recipe.validate(module)
    assert first["held_out_nats"] == pytest.approx(second["held_out_nats"], rel=1e-5)
    assert first["accuracy"] == second["accuracy"]


def test_a_final_report_counts_what_it_says(config, inputs):
    recipe = DLLMRecipe(config, *inputs)
    report = recipe.evaluate(recipe.build().eval())
    shares = report["accuracy_by_share"]
    assert sum(entry["tokens"] for entry in shares) == report["tokens"] > 0
    right = sum(entry["tokens"] * entry["accuracy"] for entry in shares if entry["tokens"])
    assert right / report["tokens"] == pytest.approx(report["accuracy"])
    json.dumps(report, allow_nan=False)
    assert f"{report['nats']:10.4f}" in recipe.table(report)
    held_out = [int(example.is_answer.sum()) for example in inputs[1].held_out]
    assert 0.15 * sum(held_out) < report["tokens"] < 0.99 * sum(held_out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_an_encoder_that_answers(kind, chats, encoders, tmp_path, capsys):
    """Behavioural: 200 small steps on 48 question-answer pairs; the place follows from the animal in every answer."""
    out = tmp_path / "run"
    arguments = {"files": chats, "encoder": encoders[kind], "out": out, "steps": 200, "decay-steps": 150}
    arguments |= {
        "batch-size": 16,
        "lr": 4e-3,
        "max-length": LONGEST,
        "held-out-share": 0.15,
        "warmup-steps": 10,
    }
    options = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert main(["train-lm", str(ROOT / "configs/train_dllm.yaml"), *options]) == 0
    log = [json.loads(line) for line in (out / LOG).read_text("utf-8").splitlines()]
    losses = [line["loss_nats"] for line in log if "loss_nats" in line]
    report = json.loads((out / "model/training.json").read_text("utf-8"))["held_out"]
    assert losses[0] > 3.0
    assert report["nats"] < 0.5 < report["unigram_nats"]
    assert "held-out answers" in capsys.readouterr().out

    chatbot = Chatbot.from_pretrained(out / "model")
    right = []
    for animal, colour in product(ANIMALS, COLOURS):
        said = answer(colour, animal)
        length = len(chatbot.encoder.tokenizer(said, add_special_tokens=False)["input_ids"])
        found = chatbot.answer([Message("user", question(colour, animal))], length)
        assert found.trajectory.n_forwards == length
        right.append(PLACES[animal] in found.text)
    assert sum(right) >= 44  # of 48, by chance 6


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_published_loop(kind, encoders):
    """Exact: the most probable pair of masked position and text token, one at a time."""
    chatbot = Chatbot.from_pretrained(encoders[kind])
    found = chatbot.answer([Message("user", "Where does the red fox sleep?")], 6)
    mask_id, model = chatbot.encoder.mask_id, chatbot.encoder.model
    x = found.trajectory.states[0].clone()
    assert x.shape[0] == 1
    while bool((x == mask_id).any()):
        logits = model(input_ids=x).logits[0].detach().double()
        logits[:, list(chatbot.encoder.control_ids())] = -torch.inf
        p = logits.softmax(-1).masked_fill((x[0] != mask_id)[:, None], 0.0)
        position, token = divmod(int(p.argmax()), p.shape[1])
        x[0, position] = token
    assert tuple(x[0, found.start : found.start + 6].tolist()) == found.ids


def test_an_answer_that_does_not_fit_is_refused(encoders):
    with pytest.raises(DataError, match=r"make 58 tokens, the encoder takes 48; ask for less"):
        Chatbot.from_pretrained(encoders["bert"]).answer([Message("user", "where")], 50)


def test_a_saved_encoder_has_the_trained_weights_and_the_runs_template(config, inputs, tmp_path):
    """Exact."""
    template = inputs[2].replace("Assistant", "Robot")
    trainer = train(config, inputs[0], inputs[1], template)
    trainer.recipe.save(trainer.average, tmp_path / "saved")
    assert all((tmp_path / "saved" / name).is_file() for name in DLLMRecipe.FINISHED)
    saved = load_encoder(tmp_path / "saved")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(saved.model(input_ids=ids).logits, trainer.average(input_ids=ids).logits)
        assert not torch.equal(saved.model(input_ids=ids).logits, inputs[0].model(input_ids=ids).logits)
    assert saved.tokenizer.chat_template == template


def test_conversations_are_cut_at_max_length_and_left_out_without_an_answer(config):
    long = replace(config, max_length=LONGEST)
    examples = DLLMRecipe.read(long)[1]
    first = min(int(np.flatnonzero(example.is_answer)[0]) for example in examples.train)
    short = DLLMRecipe.read(replace(config, max_length=first + 2))[1]
    assert short.n_dropped + len(short.train) + len(short.held_out) == len(examples.train) + len(
        examples.held_out
    )
    assert {len(example.ids) for example in short.train} <= {first + 1, first + 2}
    with pytest.raises(DataError, match=r"no conversation fell on the training side \(48 have no answer"):
        DLLMRecipe.read(replace(config, max_length=3))
    with pytest.raises(DataError, match=r"max_length is 49, the encoder takes 48 tokens; lower it"):
        DLLMRecipe.read(replace(config, max_length=49))


def broken(directory: Path, kind: str = "bert") -> Path:
    return write_encoder(directory / "encoder", kind)  # type: ignore[arg-type]


def test_a_directory_that_is_no_masked_lm_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.json; name a local directory"):
        load_encoder(tmp_path)
    directory = broken(tmp_path)
    weights_file = directory / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"does not load as a masked LM with its tokenizer"):
        load_encoder(directory)
    weights_file.unlink()
    with pytest.raises(CheckpointError, match=r"has no .safetensors file"):
        load_encoder(directory)


def test_an_encoder_without_its_head_is_refused_instead_of_given_a_random_one(tmp_path):
    directory = broken(tmp_path)
    model: SimpleNamespace = make_model("bert", len(make_tokenizer("bert")) + 3)  # type: ignore[assignment]
    model.bert.save_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the masked LM's weights, cls"):
        load_encoder(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, kind):
    directory = broken(tmp_path, kind)
    tokenizer = make_tokenizer(kind)
    make_model(kind, len(tokenizer) - 1).save_pretrained(directory)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"another model's tokenizer"):
        load_encoder(directory)


def test_an_encoder_without_attention_mask_needs_the_published_padding(config, inputs):
    class Bare(torch.nn.Module):
        config = inputs[0].model.config

        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.config.vocab_size))

    bare = replace(inputs[0], model=Bare())
    with pytest.raises(DataError, match=r"Bare takes no attention_mask.*set padding to attended"):
        DLLMRecipe(config, bare, *inputs[1:])
    recipe = DLLMRecipe(replace(config, padding="attended"), bare, *inputs[1:])
    assert float(recipe.loss_sum(recipe.build(), recipe.batch(0), 0)) > 0


def test_the_shipped_config_is_the_published_recipe_with_its_corrections():
    config = load_config(TrainDLLMConfig, ROOT / "configs/train_dllm.yaml")
    assert config.masking == MaskingConfig(rule="pure_mask", lowest=0.15, highest=0.99, static=False)
    assert (config.max_length, config.padding, config.decay) == (512, "ignored", "cosine")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": ()}, "files must name at least one file of conversations"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"validation_chats": 0}, "validation_chats must be at least 1, got 0"),
        ({"held_out_share": 1.0}, "held_out_share must be between 0 and 1, got 1.0"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, message):
    usual = {"files": (Path("a.jsonl"),), "encoder": Path("e"), "out": Path("o")}
    with pytest.raises(ConfigError, match=message):
        TrainDLLMConfig(**{**usual, **settings})
