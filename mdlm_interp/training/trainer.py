"""A plain training loop for the MDLM objective.

step = one batch: windows of the stream, low-discrepancy times, independent masking, the 1/t-weighted
cross-entropy at masked positions, AdamW with warm-up and clipping, and an average of the weights. Each
batch is a pure function of (seed, step); a resumed run has the bits of an uninterrupted one.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 5 and appendix C; kuleshov-group/mdlm, configs.
"""

# Axes: batch, pos

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, nelbo_per_token, stratified_times
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.evaluation import Nelbo, nelbo
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import random_bits, uniforms
from mdlm_interp.shapes import Float, Int64
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.checkpoint import load_state, optimiser_tensors, restore_optimiser, save_state
from mdlm_interp.training.config import TrainLMConfig
from mdlm_interp.training.data import TokenStreams, WindowSampler, consecutive_blocks

LOG = "log.jsonl"
VALIDATION_SEED = 1


class Trainer:
    """One run: the weights, their average, the optimiser and the step they are at."""

    def __init__(self, config: TrainLMConfig, tokenizer: Tokenizer, streams: TokenStreams) -> None:
        if tokenizer.vocab_size != config.model.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is "
                f"{config.model.vocab_size}; they must be equal"
            )
        self.config = config
        self.model = HookedMDLM(config.model, NativeArithmetic(fused_attention=False), config.seed).train()
        # Batches come in few lengths, so each is compiled for itself.
        self._network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.average = HookedMDLM(config.model, seed=config.seed).eval().requires_grad_(False)
        named = list(self.model.named_parameters())
        matrices = [(name, p) for name, p in named if p.dim() == 2 and "embed" not in name]
        others = [(name, p) for name, p in named if p.dim() != 2 or "embed" in name]
        self.parameter_names = [name for name, _ in [*matrices, *others]]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for _, p in matrices], "weight_decay": config.weight_decay},
                {"params": [p for _, p in others], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )
        self.sampler = WindowSampler(
            stream=streams.train,
            length=config.model.model_length,
            batch_size=config.batch_size,
            eos_id=tokenizer.eos_id,
            seed=config.seed,
            wrap_share=config.wrap_share,
            short_share=config.short_share,
        )
        self.held_out = consecutive_blocks(
            streams.held_out, config.model.model_length, config.validation_sequences
        )
        self.step_number = 0

    def step(self) -> tuple[float, float]:
        """One optimiser step; returns the loss in nats per token and the gradient's norm before clipping."""
        config, number = self.config, self.step_number
        x_0 = self.sampler.batch(number)
        t = stratified_times(torch.from_numpy(uniforms(config.seed, "train:t", number, config.batch_size)))
        x_t = corrupt(
            x_0,
            LogLinearSchedule().move_chance(t),
            config.model.mask_id,
            seed=config.seed,
            indices=self.sampler.indices(number),
        )
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate(number)
        loss = self._loss(x_0, x_t, t)
        if not bool(loss.isfinite()):
            raise CheckpointError(
                f"the loss of step {number} is {float(loss.detach())}; lower lr or raise warmup_steps "
                f"and continue from the last checkpoint (batch {number} of seed {config.seed})"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimiser.step()
        self.step_number += 1
        self._update_average()
        return float(loss.detach()), float(norm)

    def _loss(
        self, x_0: Int64[Tensor, "batch pos"], x_t: Int64[Tensor, "batch pos"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        sigma = LogLinearSchedule().sigma(t).float()
        with _dropout_noise(self.config, self.step_number):
            # Autocast touches matrix products only; the loss is computed in float32.
            enabled = self.config.precision == "bfloat16"
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = self._network(x_t, sigma)
        return nelbo_per_token(logits, x_0, x_t, t, self.config.model.mask_id).mean()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        averages: list[Tensor] = list(self.average.parameters())
        currents: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, currents, 1.0 - decay)

    def validate(self) -> Nelbo:
        """The averaged weights' bound on held-out text, always at the same times and masks."""
        return nelbo(self.average, self.held_out, seed=VALIDATION_SEED, times_per_sequence=2, batch_size=64)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a continued run needs."""
        state = {f"model.{name}": p for name, p in self.model.named_parameters()}
        state |= {f"average.{name}": p for name, p in self.average.named_parameters()}
        return state | optimiser_tensors(self.optimiser, self.parameter_names)

    @torch.no_grad()
    def restore(self, step_number: int, tensors: dict[str, Tensor]) -> None:
        """Continue from saved tensors."""
        for prefix, model in (("model.", self.model), ("average.", self.average)):
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[prefix + name])
        restore_optimiser(self.optimiser, self.parameter_names, tensors)
        self.step_number = step_number


@contextmanager
def _dropout_noise(config: TrainLMConfig, step: int) -> Iterator[None]:
    """Dropout draws from torch's global generator: key it by (seed, step) and put it back."""
    if config.model.dropout == 0.0:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_bits(config.seed, "dropout", step, 1)[0] >> 1))
        yield


def train(
    config: TrainLMConfig, tokenizer: Tokenizer, streams: TokenStreams, *, progress: bool = False
) -> Trainer:
    """Run to config.steps, continuing the run found in config.out.

    Raises:
        CheckpointError: If config.out holds a run with other settings, or the loss is not finite.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, tokenizer, streams)
    saved = load_state(config.out, config)
    if saved is not None:
        trainer.restore(*saved)
    _trim_log(config.out / LOG, trainer.step_number)
    with (config.out / LOG).open("a", encoding="utf-8") as log:
        _loop(trainer, log, progress)
    return trainer


def _loop(trainer: Trainer, log: TextIO, progress: bool) -> None:
    config = trainer.config
    bar = tqdm(
        total=config.steps,
        initial=trainer.step_number,
        desc="train",
        unit="step",
        disable=None if progress else True,
    )
    losses: list[float] = []
    since = time.perf_counter()
    try:
        while trainer.step_number < config.steps:
            loss, norm = trainer.step()
            losses.append(loss)
            bar.update()
            number, last = trainer.step_number, trainer.step_number == config.steps
            if number % config.log_every == 0 or last:
                mean = sum(losses) / len(losses)
                rate = (
                    len(losses)
                    * config.batch_size
                    * config.model.model_length
                    / (time.perf_counter() - since)
                )
                entry = {
                    "step": number,
                    "loss_nats": mean,
                    "grad_norm": norm,
                    "lr": config.learning_rate(number - 1),
                }
                _write(log, {**entry, "tokens_per_s": round(rate)})
                bar.set_postfix(loss=f"{mean:.3f}", tok_s=f"{rate:,.0f}")
                losses, since = [], time.perf_counter()
            if number % config.validate_every == 0 or last:
                bound = trainer.validate()
                _write(
                    log,
                    {"step": number, "held_out_nats": bound.nats_per_token, "error": bound.standard_error},
                )
                since = time.perf_counter()
            if number % config.checkpoint_every == 0 or last:
                save_state(config.out, number, config, trainer.tensors())
    finally:
        bar.close()


def _write(log: TextIO, entry: Mapping[str, float | int]) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines that an interrupted run wrote after its last checkpoint; they will be written again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
