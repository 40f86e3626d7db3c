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
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.atomic_files import replacing, write_errors
from mdlm_interp.diffusion import LogLinearSchedule, corrupt, nelbo_per_token, stratified_times
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.evaluation import Nelbo, nelbo
from mdlm_interp.interrupts import deferred_interrupts
from mdlm_interp.model import HookedMDLM
from mdlm_interp.randomness import random_bits, uniforms
from mdlm_interp.shapes import Float, Int64
from mdlm_interp.tokenizers import Tokenizer
from mdlm_interp.training.checkpoint import (
    LOG,
    open_run,
    optimiser_tensors,
    restore_optimiser,
    run_record,
    save_state,
)
from mdlm_interp.training.config import Form, TrainLMConfig
from mdlm_interp.training.data import TokenStreams, WindowSampler, consecutive_blocks

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
        self.record = run_record(config, tokenizer, streams)
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
        self.tokens = 0
        """Tokens that this object was trained on; a continued run counts from where it continues."""
        self.held_out = held_out_blocks(config, tokenizer, streams, config.validation_sequences)
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
        self._refuse_diverged("loss", loss.detach())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        # Before the weights take it up: a checkpoint of weights that are not finite could not be continued.
        self._refuse_diverged("gradient's norm", norm)
        self.optimiser.step()
        self.step_number += 1
        self.tokens += x_0.numel()
        self._update_average()
        return float(loss.detach()), float(norm)

    def _refuse_diverged(self, what: str, value: Tensor) -> None:
        if not bool(value.isfinite()):
            raise CheckpointError(
                f"the {what} of step {self.step_number} is {float(value)}; start anew in another out directory "
                f"with a lower lr or a longer warmup_steps (batch {self.step_number} of seed "
                f"{self.config.seed})"
            )

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

    def validate(self) -> dict[Form, Nelbo]:
        """The averaged weights' bound on held-out text in each form, always at the same times and masks."""
        return {
            form: nelbo(self.average, blocks, seed=VALIDATION_SEED, times_per_sequence=2, batch_size=64)
            for form, blocks in self.held_out.items()
        }

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


def held_out_blocks(
    config: TrainLMConfig, tokenizer: Tokenizer, streams: TokenStreams, limit: int | None = None
) -> dict[Form, Int64[Tensor, "batch pos"]]:
    """Held-out sequences in the forms that the config trains."""
    return {
        form: consecutive_blocks(
            streams.held_out,
            config.model.model_length,
            limit,
            wrap_with=tokenizer.eos_id if form == "wrapped" else None,
        )
        for form in config.forms
    }


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
        CheckpointError: If config.out holds a run with other settings or text, or the loss is not finite.
        OutputExistsError: If config.out holds files of another origin that would be lost.
        WriteError: If the disk is full, read-only or failing; the last checkpoint stays.
        KeyboardInterrupt: After saving a checkpoint, on Ctrl-C or SIGTERM between two steps.
    """
    trainer = Trainer(config, tokenizer, streams)
    saved = open_run(config.out, trainer.record)
    if saved is not None:
        trainer.restore(*saved)
        if progress:
            sys.stderr.write(f"{config.out}: continuing from step {trainer.step_number} of {config.steps}\n")
    _trim_log(config.out / LOG, trainer.step_number)
    _loop(trainer, progress)
    return trainer


def _loop(trainer: Trainer, progress: bool) -> None:
    config, log = trainer.config, trainer.config.out / LOG
    hidden = None if progress else True
    losses: list[float] = []
    since, counted = time.perf_counter(), 0
    with (
        deferred_interrupts() as interrupted,
        tqdm(
            total=config.steps, initial=trainer.step_number, desc="train", unit="step", disable=hidden
        ) as bar,
    ):
        while trainer.step_number < config.steps:
            loss, norm = trainer.step()
            losses.append(loss)
            bar.update()
            number, last = trainer.step_number, trainer.step_number == config.steps
            if number % config.log_every == 0 or last:
                mean = sum(losses) / len(losses)
                rate = (trainer.tokens - counted) / (time.perf_counter() - since)
                lr = config.learning_rate(number - 1)
                entry = {"step": number, "loss_nats": mean, "grad_norm": norm, "lr": lr}
                _append(log, {**entry, "tokens_per_s": round(rate)})
                bar.set_postfix(loss=f"{mean:.3f}", tok_s=f"{rate:,.0f}")
                losses, since, counted = [], time.perf_counter(), trainer.tokens
            if number % config.validate_every == 0 or last:
                for form, bound in trainer.validate().items():
                    error = finite(bound.standard_error)
                    measured = {"form": form, "held_out_nats": bound.nats_per_token, "error": error}
                    _append(log, {"step": number, **measured})
                since, counted = time.perf_counter(), trainer.tokens
            stop = interrupted()
            if number % config.checkpoint_every == 0 or last or stop:
                save_state(config.out, number, trainer.record, trainer.tensors())
            if stop:
                break
        if interrupted():
            raise KeyboardInterrupt


def finite(value: float) -> float | None:
    """The value as JSON can hold it: a mean over nothing is null."""
    return value if math.isfinite(value) else None


def _append(log: Path, entry: Mapping[str, int | float | str | None]) -> None:
    with write_errors(log), log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, allow_nan=False) + "\n")


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines that an interrupted run wrote after its last checkpoint; they will be written again."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    # A line that a full disk or a kill cut off has no closing brace.
    lines = [line for line in text.splitlines() if line.endswith("}")]
    kept = "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step)
    if kept != text:
        with replacing(path) as partial:
            partial.write_text(kept, encoding="utf-8")
