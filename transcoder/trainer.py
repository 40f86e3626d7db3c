"""One step of training a transcoder, and the loop around it.

step = one batch through the objective, gradients clipped by the norm of all of them together, Adam. Each batch and
each schedule is a pure function of (config, step), and the state has the weights, both Adam moments and the dead
counters, so a resumed run has the bits of an uninterrupted one.

Several processes may train together (`scale_out`): each has some blocks of rows and of features.
"""

# Axes: layer, row, d_model, feature

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mdlm_interp.errors import DataError
from mdlm_interp.interrupts import deferred_interrupts
from transcoder.batches import Batch, Batches
from transcoder.checkpoint import write_json
from transcoder.kernels import GradientBuffers
from transcoder.model import CrossLayerTranscoder
from transcoder.objective import DataBlock, Outcome, objective_of_blocks
from transcoder.row_weights import row_weights
from transcoder.scale_out.gradients import backward, clip
from transcoder.scale_out.processes import Processes
from transcoder.scale_out.shards import joined, parts_of
from transcoder.schedules import active_features, learning_rate, sparsity_weight
from transcoder.sinks import MetricSinks
from transcoder.train_config import TrainConfig
from transcoder.training_state import CHECKPOINTS, save_together, save_training_state


class StepMetrics(NamedTuple):
    """What one step says about its own batch."""

    loss: float
    fvu: list[float]
    """Of each layer, against the store's variance."""
    sparsity: float
    pre_act: float
    auxk: float
    l0: list[float]
    """Active features per row, of each layer."""
    dead: int
    """Features of all layers that have been silent for dead_after_tokens rows."""
    grad_norm: float
    """Of all parameters together, before clipping."""


class NonFiniteError(DataError):
    """A loss or gradient that is not finite.

    Attributes:
        record: Where: step, place in the data, the batch's rows with their coordinates.
    """

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


class Trainer:
    """One run: the transcoder, its optimiser, the dead counters and the step they are at.

    Args:
        clt: The transcoder, or this process's feature blocks of it.
        batches: Whole batches; a process takes its rows of them.
        processes: That train together; none for this one alone.
    """

    def __init__(
        self,
        clt: CrossLayerTranscoder | Sequence[CrossLayerTranscoder],
        batches: Batches,
        config: TrainConfig,
        processes: Processes | None = None,
    ) -> None:
        self.blocks = [clt] if isinstance(clt, CrossLayerTranscoder) else list(clt)
        self.batches, self.config, self.processes = batches, config, processes or Processes()
        # By identity: the blocks share b_dec and W_skip.
        self.parameters = list(dict.fromkeys(p for block in self.blocks for p in block.parameters()))
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas, fused=True)
        large = [p for block in self.blocks for p in (block.W_enc, *block.W_dec)]
        self.gradients = [GradientBuffers(large) for _ in self.processes.layout.data_blocks]
        self.counters = [torch.zeros_like(block.b_enc, dtype=torch.int64) for block in self.blocks]
        """Rows since each feature of each block was active."""
        self.step_number = 0
        self.recent: list[StepMetrics] = []
        """Of the steps since the last line of metrics."""

    @property
    def clt(self) -> CrossLayerTranscoder:
        """The transcoder, or the first block of it, whose config and provenance are the whole one's."""
        return self.blocks[0]

    @property
    def rows_since_active(self) -> Tensor:
        """Of this process's features [layer feature]."""
        return self.counters[0] if len(self.counters) == 1 else torch.cat(self.counters, 1)

    def step(self) -> StepMetrics:
        """One optimiser step.

        Raises:
            NonFiniteError: If the loss or its gradient is not finite, on all processes alike; nothing is changed then.
        """
        config, processes = self.config, self.processes
        batch = self.batches.batch(self.step_number)
        n_rows = batch.x.shape[1]
        is_dead = [counter >= config.dead_after_tokens for counter in self.counters]
        self.optimiser.zero_grad(set_to_none=True)
        found = objective_of_blocks(
            self.blocks,
            self._rows(batch),
            config,
            step=self.step_number,
            is_dead=is_dead,
            processes=processes,
        )
        backward(found.shares, self.parameters, self.gradients, processes)
        shared = [self.clt.b_dec, self.clt.W_skip]
        grad_norm = clip(self.blocks, shared, config.grad_clip or float("inf"), processes)
        if not bool(torch.isfinite(found.loss) & torch.isfinite(grad_norm)):
            raise self._not_finite(found.loss, grad_norm, batch)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, self.step_number)
        self.optimiser.step()
        own_counts = found.active_counts.chunk(len(self.blocks), 1)
        for counter, counts in zip(self.counters, own_counts, strict=True):
            counter += n_rows
            counter[counts > 0] = 0
        self.step_number += 1
        numbers = torch.stack([*found.active_counts.sum(1), sum_of(is_dead)])
        *active, dead = processes.count(numbers, "feature").tolist()
        return _metrics(found, dead, grad_norm.item(), [count / n_rows for count in active])

    def _rows(self, batch: Batch) -> list[DataBlock]:
        """This process's data blocks, each with memory for its gradients."""
        device, layout = self.clt.b_enc.device, self.processes.layout
        weights = row_weights(
            self.config.row_weights, batch.is_masked.to(device), batch.t.to(device), len(batch.x)
        )
        cuts = [layout.rows(number, batch.x.shape[1]) for number in layout.data_blocks]
        return [
            DataBlock(
                batch.x[:, cut].to(device).contiguous(),
                batch.y[:, cut].to(device).contiguous(),
                None if weights is None else weights[:, cut],
                grads,
            )
            for cut, grads in zip(cuts, self.gradients, strict=True)
        ]

    def _not_finite(self, loss: Tensor, grad_norm: Tensor, batch: Batch) -> NonFiniteError:
        bad = ~(batch.x.isfinite().all(2).all(0) & batch.y.isfinite().all(2).all(0)).numpy()
        if bad.any():
            cause = f"the store's rows {_listed(batch.rows[bad])} are not finite; capture them again"
        else:
            cause = (
                f"its rows {_listed(batch.rows)} are finite, so training diverged; lower lr or set grad_clip"
            )
        figures = f"{loss.item()} with a gradient of norm {grad_norm.item()}"
        record = {
            "step": self.step_number,
            "loss": str(loss.item()),
            "grad_norm": str(grad_norm.item()),
            "cursor": {"seed": self.config.seed, **self.batches.cursor(self.step_number)},
            "rows": batch.rows.tolist(),
            "rows_not_finite": batch.rows[bad].tolist(),
            "t": batch.t.tolist(),
            **{name: values.tolist() for name, values in batch.where.items()},
            "parameters_not_finite": self._parameters_not_finite(),
        }
        return NonFiniteError(f"the loss of step {self.step_number} is {figures}: {cause}", record)

    def _parameters_not_finite(self) -> list[str]:
        """Names of the parameters of which some process has values that are not finite."""
        names = [name for name, _ in self.clt.named_parameters()]
        bad = [
            sum(not bool(block.get_parameter(name).isfinite().all()) for block in self.blocks)
            for name in names
        ]
        counts = self.processes.count(torch.tensor(bad, device=self.clt.b_enc.device), "feature").tolist()
        return [name for name, count in zip(names, counts, strict=True) if count]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is not one number: weights and normalisation, Adam's state, counters, by name.

        Those that go by features are DTensors if other processes have more of them.
        """
        parts: dict[str, list[Tensor]] = {"rows_since_active": self.counters}
        states = [block.state_dict() for block in self.blocks]
        parts |= {f"clt.{name}": [state[name] for state in states] for name in states[0]}
        for name, _ in self.clt.named_parameters():
            adam = [self.optimiser.state[block.get_parameter(name)] for block in self.blocks]
            parts |= {f"adam.{key}.{name}": [state[key] for state in adam] for key in adam[0]}
        tensors = {name: joined(name, of_blocks, self.processes) for name, of_blocks in parts.items()}
        if self.clt.training_sequences is not None:
            tensors["training_sequences"] = torch.from_numpy(self.clt.training_sequences)
        return tensors

    def loop_state(self) -> dict[str, Any]:
        """Where the loop is, as JSON holds it; schedules and cursor follow from the step, and are for the reader."""
        step, config = self.step_number, self.config
        schedules: dict[str, float] = {
            "lr": learning_rate(config, step),
            "sparsity": sparsity_weight(config, step),
        }
        if self.clt.config.k is not None:
            schedules["k"] = active_features(config, self.clt.config.k, step)
        return {
            "step": step,
            "recent": [metrics._asdict() for metrics in self.recent],
            "schedules": schedules,
            "cursor": {"seed": config.seed, **self.batches.cursor(step)},
            "provenance": self.clt.provenance,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            KeyError, TypeError, RuntimeError: If it is not one of this run's shape.
        """
        parts = {name: parts_of(name, tensor, self.processes.layout) for name, tensor in tensors.items()}
        weights = [name for name in tensors if name.startswith("clt.")]
        for number, block in enumerate(self.blocks):
            block.load_state_dict({name[4:]: parts[name][number] for name in weights})
            self.counters[number].copy_(parts["rows_since_active"][number])
            for name, parameter in block.named_parameters():
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = parts[f"adam.{key}.{name}"][number].to(parameter.device)
                    self.optimiser.state[parameter][key] = value
        self.step_number = int(state["step"])
        self.recent = [StepMetrics(**metrics) for metrics in state["recent"]]


def sum_of(masks: Sequence[Tensor]) -> Tensor:
    """How many are true in all of these."""
    return torch.stack([mask.count_nonzero() for mask in masks]).sum()


def _metrics(found: Outcome, dead: int, grad_norm: float, l0: list[float]) -> StepMetrics:
    return StepMetrics(
        loss=found.loss.item(),
        fvu=found.fvu.tolist(),
        sparsity=found.sparsity.item(),
        pre_act=found.pre_act.item(),
        auxk=found.auxk.item(),
        l0=l0,
        dead=dead,
        grad_norm=grad_norm,
    )


def _listed(rows: NDArray[np.int64]) -> str:
    ordered = np.sort(rows)
    more = f", ... ({len(ordered)} in all)" if len(ordered) > 8 else ""
    return ", ".join(map(str, ordered[:8].tolist())) + more


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
                entry = _entry(number, trainer.recent, config, rows_per_s)
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
        f"loss {entry['loss']:.3f}, FVU {entry['fvu']:.3f}, L0 {entry['l0']:.1f}, dead {entry['dead']}, "
        f"{entry['rows_per_s']:,} tokens/s"
    )


def _entry(step: int, recent: list[StepMetrics], config: TrainConfig, rows_per_s: float) -> dict[str, Any]:
    """One line of metrics: means over the steps since the last line, counts as they are now."""
    layers = np.mean([metrics.fvu for metrics in recent], axis=0)
    l0 = np.mean([metrics.l0 for metrics in recent], axis=0)
    means = {
        name: float(np.mean([getattr(metrics, name) for metrics in recent]))
        for name in ("loss", "sparsity", "pre_act", "auxk", "grad_norm")
    }
    return {
        "step": step,
        "rows": step * config.batch_size,
        **means,
        "fvu": float(layers.mean()),
        "fvu_by_layer": layers.tolist(),
        "l0": float(l0.mean()),
        "l0_by_layer": l0.tolist(),
        "dead": recent[-1].dead,
        "lr": learning_rate(config, step - 1),
        "sparsity_weight": sparsity_weight(config, step - 1),
        "rows_per_s": round(rows_per_s),
    }
