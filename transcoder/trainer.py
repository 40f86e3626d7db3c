"""One step of training a transcoder, and the loop around it.

step = one batch through the objective, gradients clipped by the norm of all of them together, Adam. Each batch and
each schedule is a pure function of (config, step), and the state has the weights, both Adam moments and the dead
counters, so a resumed run has the bits of an uninterrupted one.
"""

# Axes: layer, row, d_model, feature

from __future__ import annotations

import time
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
from transcoder.objective import Outcome, objective
from transcoder.row_weights import row_weights
from transcoder.schedules import active_features, learning_rate, sparsity_weight
from transcoder.sinks import MetricSinks
from transcoder.train_config import TrainConfig
from transcoder.training_state import CHECKPOINTS, save_training_state


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
    """One run: the transcoder, its optimiser, the dead counters and the step they are at."""

    def __init__(self, clt: CrossLayerTranscoder, batches: Batches, config: TrainConfig) -> None:
        self.clt, self.batches, self.config = clt, batches, config
        self.optimiser = torch.optim.Adam(clt.parameters(), lr=config.lr, betas=config.betas, fused=True)
        self.gradients = GradientBuffers([clt.W_enc, *clt.W_dec])
        self.rows_since_active = torch.zeros(clt.b_enc.shape, dtype=torch.int64, device=clt.b_enc.device)
        self.step_number = 0
        self.recent: list[StepMetrics] = []
        """Of the steps since the last line of metrics."""

    def step(self) -> StepMetrics:
        """One optimiser step.

        Raises:
            NonFiniteError: If the loss or its gradient is not finite; nothing is changed then.
        """
        clt, config, device = self.clt, self.config, self.clt.b_enc.device
        batch = self.batches.batch(self.step_number)
        weights = row_weights(
            config.row_weights, batch.is_masked.to(device), batch.t.to(device), len(batch.x)
        )
        is_dead = self.rows_since_active >= config.dead_after_tokens
        x, y = batch.x.to(device), batch.y.to(device)
        self.optimiser.zero_grad(set_to_none=True)
        self.gradients.release()
        found = objective(
            clt,
            x,
            y,
            config,
            step=self.step_number,
            is_dead=is_dead,
            row_weights=weights,
            grads=self.gradients,
        )
        torch.autograd.backward(found.loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(clt.parameters(), config.grad_clip or float("inf"))
        if not bool(torch.isfinite(found.loss) & torch.isfinite(grad_norm)):
            raise self._not_finite(found.loss, grad_norm, batch)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, self.step_number)
        self.optimiser.step()
        self.rows_since_active += batch.x.shape[1]
        self.rows_since_active[found.active_counts > 0] = 0
        self.step_number += 1
        return _metrics(found, int(is_dead.count_nonzero()), grad_norm.item(), batch.x.shape[1])

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
            "parameters_not_finite": [
                name for name, value in self.clt.named_parameters() if not bool(value.isfinite().all())
            ],
        }
        return NonFiniteError(f"the loss of step {self.step_number} is {figures}: {cause}", record)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is not one number: weights and normalisation, Adam's state, counters, by name."""
        tensors = {f"clt.{name}": tensor for name, tensor in self.clt.state_dict().items()}
        tensors["rows_since_active"] = self.rows_since_active
        for name, parameter in self.clt.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
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
        weights = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("clt.")}
        self.clt.load_state_dict(weights)
        self.step_number = int(state["step"])
        self.recent = [StepMetrics(**metrics) for metrics in state["recent"]]
        self.rows_since_active.copy_(tensors["rows_since_active"])
        for name, parameter in self.clt.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][key] = tensors[f"adam.{key}.{name}"].to(parameter.device)


def _metrics(found: Outcome, dead: int, grad_norm: float, n_rows: int) -> StepMetrics:
    l0 = (found.active_counts.sum(1).double() / n_rows).tolist()
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

    Raises:
        DataError: If a loss is not finite; a JSON file beside the states says where.
        KeyboardInterrupt: After saving the state, on Ctrl-C or SIGTERM.
        WriteError: If the disk is full or failing; the last saved state is still there.
    """
    config, total = trainer.config, trainer.config.steps
    hidden = None if progress else True
    since, timed = time.perf_counter(), 0
    with (
        deferred_interrupts() as interrupted,
        MetricSinks(out, config, trainer.step_number) as sinks,
        tqdm(total=total, initial=trainer.step_number, desc="train", unit="step", disable=hidden) as bar,
    ):
        while trainer.step_number < total:
            trainer.recent.append(_step(trainer, out))
            timed += 1
            bar.update()
            number = trainer.step_number
            if number % config.log_every == 0 or number == total:
                rows_per_s = timed * config.batch_size / (time.perf_counter() - since)
                entry = _entry(number, trainer.recent, config, rows_per_s)
                sinks.append(entry)
                bar.set_postfix_str(_postfix(entry))
                trainer.recent = []
                since, timed = time.perf_counter(), 0
            stop = interrupted()
            if number % config.checkpoint_every == 0 or number == total or stop:
                save_training_state(
                    out, trainer.tensors(), trainer.loop_state(), keep=config.keep_checkpoints
                )
            if stop:
                raise KeyboardInterrupt


def _step(trainer: Trainer, out: Path) -> StepMetrics:
    try:
        return trainer.step()
    except NonFiniteError as error:
        record = out / CHECKPOINTS / f"failed-step-{trainer.step_number:08d}.json"
        write_json(record, error.record)
        raise DataError(f"{error}; {record} has the batch") from None


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
