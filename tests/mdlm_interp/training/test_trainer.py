"""The trainer that every recipe shares: the bits of its steps, accumulation, and when it saves."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mdlm_interp import HookedMDLM, NativeArithmetic
from mdlm_interp.config_files import load_config
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, nelbo_per_token, stratified_times
from mdlm_interp.errors import CheckpointError, ConfigError
from mdlm_interp.randomness import random_bits, uniforms
from mdlm_interp.training import loop
from mdlm_interp.training.checkpoint import LOG, RECORD, STATE, refuse_another, save_state, saved_step
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.recipes import Recipe
from mdlm_interp.training.sampling import WindowSampler
from mdlm_interp.training.trainer import Trainer, pieces, train

ROOT = Path(__file__).parents[3]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(config: TrainLMConfig) -> list[dict]:
    return [json.loads(line) for line in (config.out / LOG).read_text().splitlines()]


# The recorded recipe


def plain_loop(config: TrainLMConfig, tokenizer, streams, steps: int) -> dict[str, torch.Tensor]:
    """The loop that trained the bundled model, written out: one batch, one mean, one optimiser."""
    model = HookedMDLM(config.model, NativeArithmetic(fused_attention=False), config.seed).train()
    average = HookedMDLM(config.model, seed=config.seed).eval().requires_grad_(False)
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [(name, p) for name, p in named if p.dim() != 2 or "embed" in name]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for _, p in matrices], "weight_decay": config.weight_decay},
            {"params": [p for _, p in others], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )
    sampler = WindowSampler(
        stream=streams.train,
        length=config.model.model_length,
        batch_size=config.batch_size,
        eos_id=tokenizer.eos_id,
        seed=config.seed,
        wrap_share=config.wrap_share,
        short_share=config.short_share,
    )
    schedule, mask_id = LogLinearSchedule(), config.model.mask_id
    for step in range(steps):
        x_0 = sampler.batch(step)
        t = stratified_times(torch.from_numpy(uniforms(config.seed, "train:t", step, config.batch_size)))
        rows = range(step * config.batch_size, (step + 1) * config.batch_size)
        x_t = corrupt(x_0, schedule.move_chance(t), mask_id, seed=config.seed, indices=rows)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate(step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random_bits(config.seed, "dropout", step, 1)[0] >> 1))
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                logits = model(x_t, schedule.sigma(t).float())
        loss = nelbo_per_token(logits, x_0, x_t, t, mask_id).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimiser.step()
        with torch.no_grad():
            decay = min(config.ema_decay, (2 + step) / (11 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
    found = {f"model.{name}": p.detach() for name, p in named}
    found |= {f"average.{name}": p for name, p in average.named_parameters()}
    for name, p in [*matrices, *others]:
        found |= {f"optimiser.{key}.{name}": value for key, value in optimiser.state[p].items()}
    return found


@pytest.mark.parametrize(
    "change",
    [{}, {"precision": "float32"}, {"precision": "float32", "model.dropout": "0.2"}],
    ids=["as recorded", "float32", "dropout"],
)
def test_the_recipe_of_the_bundled_model_has_the_bits_of_the_loop_that_trained_it(
    change, tmp_path, text_file, tokenizer, streams
):
    """Exact: every setting of the recorded config, with a smaller network and text, and uncompiled."""
    smaller = {
        "files": str(text_file),
        "out": str(tmp_path / "run"),
        "compile": "false",
        "steps": "7",
        "decay_steps": "3",
        "warmup_steps": "2",
        "batch_size": "6",
        "model.vocab_size": "300",
        "model.model_length": "24",
        "model.hidden_dim": "24",
        "model.n_blocks": "2",
    }
    config = load_config(TrainLMConfig, ROOT / "configs" / "bundled_model.yaml", smaller | change)
    assert (config.lr, config.betas, config.wrap_share, config.short_share) == (2e-3, (0.9, 0.98), 0.5, 0.15)
    trainer = train(config, tokenizer, streams)
    assert same(weights(trainer), plain_loop(config, tokenizer, streams, 7))


# Accumulation


@pytest.fixture(params=["mdlm", "learner"])
def any_config(request, mdlm_config, learner_config):
    return {"mdlm": mdlm_config, "learner": learner_config}[request.param]


def gradient(config, tokenizer, streams, step: int = 3) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one window in float64, at weights that are nowhere zero."""
    trainer = Trainer(config, tokenizer, streams)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    trainer.model.double()
    trainer.step_number = step
    loss = trainer.accumulate(trainer.recipe.batch(step))
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return float(loss), torch.cat(grads)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7])
def test_the_gradient_of_a_window_does_not_depend_on_its_pieces(any_config, tokenizer, streams, rows):
    """Bounded: 1e-12 of its size in float64; with 7 rows, all but 1 and 7 leave a smaller last piece."""
    loss, whole = gradient(any_config, tokenizer, streams)
    loss_in_pieces, in_pieces = gradient(replace(any_config, micro_batch_size=rows), tokenizer, streams)
    assert loss_in_pieces == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(in_pieces, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


def test_the_comparison_of_gradients_sees_the_usual_mistake(learner_config, tokenizer, streams, monkeypatch):
    """Each piece's mean over the number of pieces: rows of the smaller last piece then count for more."""
    _, whole = gradient(learner_config, tokenizer, streams)
    cut = replace(learner_config, micro_batch_size=3)
    original = Trainer.accumulate

    def mean_of_means(self: Trainer, window):
        parts = list(pieces(window, 3))
        weight = self.recipe.weight(window)
        scale = {id(part["t"]): weight / self.recipe.weight(part) / len(parts) for part in parts}
        plain = self.recipe.loss_sum
        monkeypatch.setattr(
            self.recipe, "loss_sum", lambda net, part, step: plain(net, part, step) * scale[id(part["t"])]
        )
        monkeypatch.setattr("mdlm_interp.training.trainer.pieces", lambda *_: parts)
        return original(self, window)

    monkeypatch.setattr(Trainer, "accumulate", mean_of_means)
    _, wrong = gradient(cut, tokenizer, streams)
    assert float((wrong - whole).abs().max()) > 1e-3 * float(whole.abs().max())


def test_the_last_window_of_an_epoch_is_the_mean_over_the_rows_that_are_left(
    learner_config, tokenizer, streams
):
    """Bounded: 1e-12 in float64, against the same few rows as a window of their own."""
    sampler = Trainer(learner_config, tokenizer, streams).recipe.sampler  # type: ignore[attr-defined]
    last = sampler.steps_per_epoch - 1
    left = len(sampler.indices(last))
    assert 1 < left < learner_config.batch_size
    loss, whole = gradient(learner_config, tokenizer, streams, last)
    loss_cut, cut = gradient(replace(learner_config, micro_batch_size=left - 1), tokenizer, streams, last)
    assert loss_cut == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


def test_pieces_cut_every_tensor_along_its_rows():
    window = {"a": torch.arange(10).reshape(5, 2), "b": torch.arange(5)}
    cut = list(pieces(window, 2))
    assert [len(piece["a"]) for piece in cut] == [len(piece["b"]) for piece in cut] == [2, 2, 1]
    assert torch.equal(torch.cat([piece["a"] for piece in cut]), window["a"])
    assert list(pieces(window, None)) == [window]


def test_pieces_of_a_window_have_dropout_noise_of_their_own(learner_config, tokenizer, streams):
    """Two equal rows in two pieces: with one noise for both, their gradients would be equal too."""
    model = replace(learner_config.model, dropout=0.5)
    trainer = Trainer(replace(learner_config, model=model, batch_size=2), tokenizer, streams)
    x = trainer.recipe.batch(0)["x_t"][:1]
    outputs = [trainer._network(piece)(x, torch.zeros(1)) for piece in (0, 1, 0)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_window_without_weight_is_refused(learner_config, tokenizer, streams, monkeypatch):
    trainer = Trainer(learner_config, tokenizer, streams)
    monkeypatch.setattr(trainer.recipe, "weight", lambda _: 0.0)
    with pytest.raises(
        CheckpointError, match=r"the window of step 0 has weight 0.0, so its loss has no mean"
    ):
        trainer.step()


def test_bfloat16_autocast_reaches_the_network_and_leaves_loss_and_weights_alone(
    learner_config, tokenizer, streams
):
    trainer = Trainer(replace(learner_config, precision="bfloat16"), tokenizer, streams)
    batch = trainer.recipe.batch(0)
    network = trainer._network(0)
    assert network(batch["x_t"], batch["t"].float()).dtype == torch.bfloat16
    assert trainer.recipe.loss_sum(network, batch, 0).dtype == torch.float64  # t is float64
    loss, _ = trainer.step()
    exact, _ = Trainer(learner_config, tokenizer, streams).step()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert loss == pytest.approx(exact, rel=0.02)
    assert loss != exact


# When it saves


def test_a_checkpoint_is_saved_after_so_many_minutes_too(mdlm_config, tokenizer, streams, monkeypatch):
    """The clock stands still but for the third and sixth step, which take two minutes each."""
    config = replace(mdlm_config, checkpoint_minutes=1.5)
    now, step, saved = [0.0], Trainer.step, []

    def slow(self: Trainer) -> tuple[float, float]:
        now[0] += 120.0 if self.step_number in (2, 5) else 0.0
        return step(self)

    original = save_state

    def save(out, number, *rest) -> None:
        saved.append(number)
        original(out, number, *rest)

    monkeypatch.setattr(Trainer, "step", slow)
    monkeypatch.setattr(loop, "save_state", save)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    train(config, tokenizer, streams)
    assert saved == [3, 6, 8]
    saved.clear()
    train(replace(config, checkpoint_minutes=None, out=config.out.with_name("other")), tokenizer, streams)
    assert saved == [8]


# The learning rate


def test_the_cosine_falls_from_the_peak_to_zero_over_the_last_steps(mdlm_config):
    config = replace(mdlm_config, steps=100, warmup_steps=10, decay="cosine", decay_steps=80, lr=1.0)
    rates = [config.learning_rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10:21] == pytest.approx([1.0] * 11)
    assert rates[40] == pytest.approx((1 + 0.5**0.5) / 2)  # a quarter of the fall: (1 + cos 45 degrees) / 2
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-15)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


# Whose run


def test_a_run_that_is_older_than_a_setting_continues_and_one_with_another_value_does_not(
    mdlm_config, tokenizer, streams
):
    """A record without the settings that came later is of a run that did what their defaults do."""
    whole = weights(train(replace(mdlm_config, out=mdlm_config.out.with_name("whole")), tokenizer, streams))
    train(replace(mdlm_config, steps=5), tokenizer, streams)
    (mdlm_config.out / STATE).rename(mdlm_config.out / "kept")
    path = mdlm_config.out / RECORD
    record = json.loads(path.read_text())
    for name in ("recipe", "micro_batch_size", "order", "checkpoint_minutes", "token_cache", "compressor"):
        del record["config"][name]
    del record["resumable"]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"trained with micro_batch_size = None, the run asks for 3"):
        train(replace(mdlm_config, micro_batch_size=3), tokenizer, streams)
    # The checkpoint's own record is as old as the directory's.
    kept = mdlm_config.out / "kept"
    with safe_open(kept, framework="pt") as stored:
        metadata = stored.metadata()
    save_file(load_file(kept), mdlm_config.out / STATE, metadata={**metadata, "run": json.dumps(record)})
    assert saved_step(mdlm_config.out) == 5
    assert same(whole, weights(train(mdlm_config, tokenizer, streams)))


def test_a_recipe_without_a_setting_that_older_runs_lacked_continues_too():
    """A record is compared over the settings of its own recipe."""
    record = {"config": {"recipe": "dllm", "lr": 0.1}, "inputs": {}, "resumable": []}
    refuse_another({"config": {"recipe": "dllm", "lr": 0.1}, "inputs": {}}, record, Path("run"))
    with pytest.raises(
        CheckpointError, match=r"run holds a run that was trained with lr = 0.2, the run asks"
    ):
        refuse_another({"config": {"recipe": "dllm", "lr": 0.2}, "inputs": {}}, record, Path("run"))


def test_an_input_that_is_another_is_named_with_both_hashes():
    record = {
        "config": {"recipe": "dllm", "encoder": "bert"},
        "inputs": {"sources": [], "encoder_sha256": "1" * 64},
        "resumable": [],
    }
    saved = {**record, "inputs": {"sources": [], "encoder_sha256": "2" * 64}}
    with pytest.raises(
        CheckpointError,
        match=r"encoder bert is not what the run in run was trained with: it has SHA-256 1{12}\.\.\., that had 2{12}",
    ):
        refuse_another(saved, record, Path("run"))


def test_a_run_of_another_recipe_is_not_continued(mdlm_config, learner_config, tokenizer, streams):
    train(mdlm_config, tokenizer, streams)
    with pytest.raises(
        CheckpointError, match=r"trained with recipe = 'mdlm', the run asks for 'learner'; restore"
    ):
        train(replace(learner_config, out=mdlm_config.out), tokenizer, streams)


def test_the_opening_lines_are_logged_once_whatever_interrupts_the_run(
    mdlm_config, tokenizer, streams, monkeypatch
):
    config = replace(mdlm_config, compressor="zlib", checkpoint_every=4)
    step = Trainer.step

    def killed(at: int):
        def stepping(self: Trainer) -> tuple[float, float]:
            if self.step_number == at:
                raise MemoryError
            return step(self)

        return stepping

    for at in (2, 6):  # before the first checkpoint, and after it
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", killed(at))
            with pytest.raises(MemoryError):
                train(config, tokenizer, streams)
    train(config, tokenizer, streams)
    opening = [line for line in lines(config) if line["step"] == 0]
    assert len(opening) == 1
    assert opening[0]["compressor"] == "zlib"
    assert [line["step"] for line in lines(config) if "loss_nats" in line] == [3, 6, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 0}, r"micro_batch_size must be in \[1, 7\], the batch_size, got 0; none takes"),
        ({"micro_batch_size": 8}, r"micro_batch_size must be in \[1, 7\], the batch_size, got 8"),
        ({"checkpoint_minutes": 0.0}, r"checkpoint_minutes must be positive and finite, got 0.0; none saves"),
        ({"checkpoint_minutes": float("nan")}, r"checkpoint_minutes must be positive and finite, got nan"),
        ({"decay": "cosine"}, r"cosine decay needs decay_steps in \[1, 8\], got 0; the rate falls over"),
        (
            {"order": "packed"},
            r"packed blocks are of one form and length, got wrap_share 0.5 and short_share 0",
        ),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(mdlm_config, change, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        replace(mdlm_config, **change)


def test_a_recipe_cannot_be_made_without_its_parts():
    with pytest.raises(TypeError, match="abstract"):
        Recipe(None)  # type: ignore[abstract]
