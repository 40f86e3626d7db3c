"""From step to step: the log, validations, checkpoints by steps and by minutes, interruptions."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mdlm_interp.atomic_files import replacing, write_errors
from mdlm_interp.interrupts import deferred_interrupts
from mdlm_interp.training.checkpoint import LOG, open_run, save_state
from mdlm_interp.training.recipes import LogEntry

if TYPE_CHECKING:
    from mdlm_interp.training.trainer import Trainer


def run_to_end(trainer: Trainer, progress: bool) -> None:
    """Continue from what the run's directory holds, to the last step; see `trainer.train`."""
    config, log = trainer.config, trainer.config.out / LOG
    saved = open_run(config.out, trainer.record)
    if saved is not None:
        trainer.restore(*saved)
        if progress:
            sys.stderr.write(f"{config.out}: continuing from step {trainer.step_number} of {config.steps}\n")
    _trim_log(log, trainer.step_number)
    if saved is None:
        for entry in trainer.recipe.opening():
            append(log, {"step": 0, **entry})
            if progress and "note" in entry:
                sys.stderr.write(f"{entry['note']}\n")
    _loop(trainer, log, progress)


def _loop(trainer: Trainer, log: Path, progress: bool) -> None:
    config = trainer.config
    meter = _Meter(trainer)
    due = _Minutes(config.checkpoint_minutes)
    with (
        deferred_interrupts() as interrupted,
        tqdm(
            total=config.steps,
            initial=trainer.step_number,
            desc="train",
            unit="step",
            disable=None if progress else True,
        ) as bar,
    ):
        while trainer.step_number < config.steps:
            meter.add(*trainer.step())
            bar.update()
            number, last = trainer.step_number, trainer.step_number == config.steps
            if number % config.log_every == 0 or last:
                entry = meter.entry()
                append(log, {"step": number, **entry})
                bar.set_postfix(
                    loss=f"{entry['loss_nats']:.3f}", tok_s=f"{entry['tokens_per_s']:,.0f}", refresh=False
                )
                meter.start()
            if number % config.validate_every == 0 or last:
                for found in trainer.validate():
                    append(log, {"step": number, **found})
                meter.restart_clock()
            stop = interrupted()
            if number % config.checkpoint_every == 0 or last or stop or due.now():
                save_state(config.out, number, trainer.record, trainer.tensors())
                due.start()
            if stop:
                break
        if interrupted():
            raise KeyboardInterrupt


class _Meter:
    """Mean loss and rate since the last line of the log."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.start()

    def start(self) -> None:
        self._losses: list[float] = []
        self._norm = math.nan
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since, self._counted = time.perf_counter(), self._trainer.tokens

    def add(self, loss: float, norm: float) -> None:
        self._losses.append(loss)
        self._norm = norm

    def entry(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        return {
            "loss_nats": sum(self._losses) / len(self._losses),
            "grad_norm": self._norm,
            "lr": self._trainer.config.learning_rate(self._trainer.step_number - 1),
            "tokens_per_s": round((self._trainer.tokens - self._counted) / seconds),
        }


class _Minutes:
    """Whether a checkpoint is due by the clock."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60.0 * minutes
        self.start()

    def start(self) -> None:
        self._since = time.monotonic()

    def now(self) -> bool:
        return time.monotonic() - self._since >= self._seconds


def finite(value: float) -> float | None:
    """The value as JSON can hold it: a mean over nothing is null."""
    return value if math.isfinite(value) else None


def append(log: Path, entry: LogEntry) -> None:
    """Add one line to the log."""
    with write_errors(log), log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, allow_nan=False) + "\n")


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines that an interrupted run wrote after its last checkpoint; they will be written again."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    # A line that a full disk or a kill cut off has no closing brace. Without a checkpoint all are written again.
    lines = [line for line in text.splitlines() if line.endswith("}")]
    kept = "".join(line + "\n" for line in lines if step > 0 and json.loads(line)["step"] <= step)
    if kept != text:
        with replacing(path) as partial:
            partial.write_text(kept, encoding="utf-8")
