"""One step of training a cross-layer transcoder, and the loop around it.

step = one batch: encode, keep the top k, decode, squared error in normalised units plus the auxiliary
loss for dead features, Adam with warm-up, decay and clipping. Each batch is a pure function of
(seed, step), and the state has both Adam moments and the dead counters, so a resumed run has the bits of
an uninterrupted one.
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
from transcoder.activations import topk
from transcoder.checkpoint import save_training_state
from transcoder.config import METRICS, TrainConfig
from transcoder.data import Batch, BatchLoader
from transcoder.losses import auxk_loss, layer_fvu
from transcoder.model import CrossLayerTranscoder
from transcoder.training_log import append_entry


class StepMetrics(NamedTuple):
    """What one step says about its own batch."""

    loss: float
    fvu: list[float]
    """Of each layer, against the store's variance."""
    auxk: float
    l0: float
    """Active features per layer and row."""
    dead: int
    """Features of all layers that have been silent for dead_after_tokens rows."""
    grad_norm: float
    """Before clipping."""


class Trainer:
    """One run: the transcoder, its optimiser, the dead counters and the step they are at."""

    def __init__(self, clt: CrossLayerTranscoder, loader: BatchLoader, config: TrainConfig) -> None:
        self.clt, self.loader, self.config = clt, loader, config
        self.optimiser = torch.optim.Adam(clt.parameters(), lr=config.lr, betas=config.betas, fused=True)
        self.rows_since_active = torch.zeros(clt.b_enc.shape, dtype=torch.int64, device=clt.b_enc.device)
        self.step_number = 0
        self.recent: list[StepMetrics] = []
        """Of the steps since the last line of metrics."""

    def step(self) -> StepMetrics:
        """One optimiser step.

        Raises:
            DataError: If the loss is not finite.
        """
        clt, config, device = self.clt, self.config, self.clt.b_enc.device
        batch = self.loader.batch(self.step_number)
        y = clt.normalise_output(batch.y.to(device))
        pre_acts = clt.all_pre_acts(batch.x.to(device))
        feature_acts = topk(pre_acts, clt.config.k)
        y_hat = clt.decode_normalised(feature_acts)
        fvu = layer_fvu(y_hat, y)
        is_dead = self.rows_since_active >= config.dead_after_tokens
        auxk = auxk_loss(y - y_hat, pre_acts, is_dead, list(clt.W_dec), config.auxk or 0)
        loss = fvu.mean() + config.auxk_alpha * auxk
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(clt.parameters(), config.grad_clip or float("inf"))
        self._check_finite(loss, grad_norm, batch)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate(self.step_number)
        self.optimiser.step()
        is_active = feature_acts.detach() > 0
        self.rows_since_active += is_active.shape[1]
        self.rows_since_active[is_active.any(1)] = 0
        self.step_number += 1
        l0 = int(is_active.count_nonzero()) / (is_active.shape[0] * is_active.shape[1])
        dead = int(is_dead.count_nonzero())
        return StepMetrics(loss.item(), fvu.tolist(), auxk.item(), l0, dead, grad_norm.item())

    def _check_finite(self, loss: Tensor, grad_norm: Tensor, batch: Batch) -> None:
        if bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
            return
        bad = ~(batch.x.isfinite().all(2).all(0) & batch.y.isfinite().all(2).all(0)).numpy()
        if bad.any():
            cause = f"the store's rows {_listed(batch.rows[bad])} are not finite; capture them again"
        else:
            cause = (
                f"its rows {_listed(batch.rows)} are finite, so training diverged; lower lr or set grad_clip"
            )
        raise DataError(
            f"the loss of step {self.step_number} is {loss.item()} with a gradient of norm "
            f"{grad_norm.item()}: {cause}"
        )

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """Adam's state and the dead counters, by name."""
        tensors = {"rows_since_active": self.rows_since_active}
        for name, parameter in self.clt.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def loop_state(self) -> dict[str, Any]:
        """Where the loop is, as JSON holds it."""
        return {"step": self.step_number, "recent": [metrics._asdict() for metrics in self.recent]}

    def restore(self, loop: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from a saved loop state and tensors; the weights are already in place."""
        self.step_number = loop["step"]
        self.recent = [StepMetrics(**metrics) for metrics in loop["recent"]]
        self.rows_since_active = tensors["rows_since_active"].to(self.rows_since_active.device)
        for name, parameter in self.clt.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][key] = tensors[f"{key}.{name}"].to(parameter.device)


def _listed(rows: NDArray[np.int64]) -> str:
    ordered = np.sort(rows)
    more = f", ... ({len(ordered)} in all)" if len(ordered) > 8 else ""
    return ", ".join(map(str, ordered[:8].tolist())) + more


def fit(trainer: Trainer, out: Path, *, progress: bool = False) -> None:
    """Step to the end, writing metrics and states to `out`, the last one after the last step.

    Raises:
        KeyboardInterrupt: After saving the state, on Ctrl-C or SIGTERM.
        WriteError: If the disk is full or failing; the last saved state is still there.
    """
    config, total = trainer.config, trainer.config.steps
    hidden = None if progress else True
    since, timed = time.perf_counter(), 0
    with (
        deferred_interrupts() as interrupted,
        tqdm(total=total, initial=trainer.step_number, desc="train", unit="step", disable=hidden) as bar,
    ):
        while trainer.step_number < total:
            trainer.recent.append(trainer.step())
            timed += 1
            bar.update()
            number = trainer.step_number
            if number % config.log_every == 0 or number == total:
                rows_per_s = timed * config.batch_size / (time.perf_counter() - since)
                entry = _entry(number, trainer.recent, config, rows_per_s)
                append_entry(out / METRICS, entry)
                bar.set_postfix(
                    loss=f"{entry['loss']:.3f}",
                    FVU=f"{entry['fvu']:.3f}",
                    L0=f"{entry['l0']:.1f}",
                    dead=entry["dead"],
                    rows_s=f"{rows_per_s:,.0f}",
                )
                trainer.recent = []
                since, timed = time.perf_counter(), 0
            stop = interrupted()
            if number % config.checkpoint_every == 0 or number == total or stop:
                save_training_state(out, trainer.clt, trainer.optimiser_tensors(), trainer.loop_state())
            if stop:
                raise KeyboardInterrupt


def _entry(step: int, recent: list[StepMetrics], config: TrainConfig, rows_per_s: float) -> dict[str, Any]:
    """One line of metrics: means over the steps since the last line, counts as they are now."""
    layers = np.mean([metrics.fvu for metrics in recent], axis=0)
    return {
        "step": step,
        "rows": step * config.batch_size,
        "loss": float(np.mean([metrics.loss for metrics in recent])),
        "fvu": float(layers.mean()),
        "fvu_by_layer": layers.tolist(),
        "auxk": float(np.mean([metrics.auxk for metrics in recent])),
        "l0": float(np.mean([metrics.l0 for metrics in recent])),
        "dead": recent[-1].dead,
        "grad_norm": float(np.mean([metrics.grad_norm for metrics in recent])),
        "lr": config.learning_rate(step - 1),
        "rows_per_s": round(rows_per_s),
    }
