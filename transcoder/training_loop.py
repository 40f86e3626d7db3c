"""The loop around a trainer's steps: metrics, the progress bar, saved states, and stopping when asked to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mdlm_interp.errors import DataError
from mdlm_interp.interrupts import deferred_interrupts
from transcoder.checkpoint import write_json
from transcoder.not_finite import NonFiniteError
from transcoder.schedules import learning_rate, sparsity_weight
from transcoder.sinks import MetricSinks
from transcoder.train_config import TrainConfig
from transcoder.trainer import StepMetrics, Trainer
from transcoder.training_log import fvu_text
from transcoder.training_state import CHECKPOINTS, save_together, save_training_state


def fit(trainer: Trainer, out: Path, *, progress: bool = False) -> None:
    """Step to the end, writing metrics and states to `out`, the last one after the last step.

    The first process writes the metrics and shows the bar; all write states.

    Raises:
        DataError: If a loss is not finite; a JSON file beside the states says where.
        KeyboardInterrupt: After saving the state, on Ctrl-C or SIGTERM to any of the processes.
        LostProcessError: If another process is gone.
        WriteError: If the disk is full or failing; the last saved state is still there.
    """
    config, total, processes = trainer.config, trainer.config.steps, trainer.processes
    hidden = None if progress and processes.is_first else True
    since, timed = time.perf_counter(), 0
    with ExitStack() as stack:
        interrupted = stack.enter_context(deferred_interrupts())
        sinks: list[MetricSinks] = []  # of the first process
        make = partial(MetricSinks, out, config, trainer.step_number)
        processes.first(lambda: sinks.append(stack.enter_context(make())))
        bar = stack.enter_context(
            tqdm(total=total, initial=trainer.step_number, desc="train", unit="step", disable=hidden)
        )
        while trainer.step_number < total:
            trainer.recent.append(_step(trainer, out))
            timed += 1
            bar.update()
            number = trainer.step_number
            if number % config.log_every == 0 or number == total:
                rows_per_s = timed * config.batch_size / (time.perf_counter() - since)
                entry = line_of(number, trainer.recent, config, rows_per_s)
                processes.first(partial(_append, sinks, entry))
                bar.set_postfix_str(_postfix(entry))
                trainer.recent = []
                since, timed = time.perf_counter(), 0
            stop = processes.any(interrupted())
            if number % config.checkpoint_every == 0 or number == total or stop:
                _save(trainer, out)
            if stop:
                raise KeyboardInterrupt


def _save(trainer: Trainer, out: Path) -> None:
    processes, keep = trainer.processes, trainer.config.keep_checkpoints
    if processes.layout.is_alone:
        save_training_state(out, trainer.tensors(), trainer.loop_state(), keep=keep)
    else:
        save_together(processes, out, trainer.tensors(), trainer.loop_state(), keep=keep)


def _append(sinks: list[MetricSinks], entry: dict[str, Any]) -> None:
    for each in sinks:
        each.append(entry)


def _step(trainer: Trainer, out: Path) -> StepMetrics:
    try:
        return trainer.step()
    except NonFiniteError as error:
        path, record = out / CHECKPOINTS / f"failed-step-{trainer.step_number:08d}.json", error.record
        trainer.processes.first(lambda: write_json(path, record))
        raise DataError(f"{error}; {path} has the batch") from None


def _postfix(entry: dict[str, Any]) -> str:
    """The figures of the progress bar, which adds the time left."""
    return (
        f"loss {entry['loss']:.3f}, FVU {fvu_text(entry)}, L0 {entry['l0']:.1f}, dead {entry['dead']}, "
        f"{entry['rows_per_s']:,} tokens/s"
    )


def line_of(step: int, recent: list[StepMetrics], config: TrainConfig, rows_per_s: float) -> dict[str, Any]:
    """One line of metrics: means over the steps since the last line, counts as they are now."""
    # Of an FVU over the batches that have one, and over the layers that have one.
    fvu = [_mean(values) for values in zip(*(metrics.fvu for metrics in recent), strict=True)]
    nmse = np.mean([metrics.nmse for metrics in recent], axis=0)
    l0 = np.mean([metrics.l0 for metrics in recent], axis=0)
    means = {
        name: float(np.mean([getattr(metrics, name) for metrics in recent]))
        for name in ("loss", "sparsity", "pre_act", "auxk", "grad_norm")
    }
    return {
        "step": step,
        "rows": step * config.batch_size,
        **means,
        "fvu": _mean(fvu),
        "fvu_by_layer": fvu,
        "nmse": float(nmse.mean()),
        "nmse_by_layer": nmse.tolist(),
        "l0": float(l0.mean()),
        "l0_by_layer": l0.tolist(),
        "dead": recent[-1].dead,
        "lr": learning_rate(config, step - 1),
        "sparsity_weight": sparsity_weight(config, step - 1),
        "rows_per_s": round(rows_per_s),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
