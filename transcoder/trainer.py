"""One step of training a transcoder, and the state that the next one needs.

step = one batch through the objective, gradients clipped by the norm of all of them together, Adam. Each batch and
each schedule is a pure function of (config, step), and the state has the weights, both Adam moments and the dead
counters, so a resumed run has the bits of an uninterrupted one.

Several processes may train together (`scale_out`): each has some blocks of rows and of features.
"""

# Axes: layer, row, d_model, feature

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.batches import Batch, Batches
from transcoder.block_terms import DataBlock
from transcoder.kernels import GradientBuffers
from transcoder.model import CrossLayerTranscoder
from transcoder.not_finite import NonFiniteError, not_finite, parameters_not_finite
from transcoder.objective import Outcome, objective_of_blocks
from transcoder.row_weights import row_weights
from transcoder.scale_out.gradients import backward, clip
from transcoder.scale_out.processes import Processes
from transcoder.scale_out.shards import joined, parts_of
from transcoder.schedules import active_features, learning_rate, sparsity_weight
from transcoder.train_config import TrainConfig


class StepMetrics(NamedTuple):
    """What one step says about its own batch."""

    loss: float
    nmse: list[float]
    """Mean squared error of each layer, of the variance over the training store."""
    fvu: list[float | None]
    """Of each layer, of the variance of the batch's own rows; None where these hardly vary."""
    sparsity: float
    pre_act: float
    auxk: float
    l0: list[float]
    """Active features per row, of each layer."""
    dead: int
    """Features of all layers that have been silent for dead_after_tokens rows."""
    grad_norm: float
    """Of all parameters together, before clipping."""


class Trainer:
    """One run: the transcoder, its optimiser, the dead counters and the step they are at.

    Args:
        clt: The transcoder, or this process's feature blocks of it.
        batches: A process asks for its rows of them.
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
        along_data = processes.layout.mesh[0]
        own = None if along_data == 1 else processes.layout.own_rows(config.batch_size)
        batch = self.batches.batch(self.step_number, own)
        n_rows = batch.x.shape[1] * along_data
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
            # All of the batch, so that every process says the same.
            whole = self.batches.batch(self.step_number)
            raise self._not_finite(found.loss.item(), grad_norm.item(), whole)
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
        size = batch.x.shape[1] // len(layout.data_blocks)
        cuts = [slice(start, start + size) for start in range(0, batch.x.shape[1], size)]
        return [
            DataBlock(
                batch.x[:, cut].to(device).contiguous(),
                batch.y[:, cut].to(device).contiguous(),
                None if weights is None else weights[:, cut],
                grads,
            )
            for cut, grads in zip(cuts, self.gradients, strict=True)
        ]

    def _not_finite(self, loss: float, grad_norm: float, batch: Batch) -> NonFiniteError:
        cursor = {"seed": self.config.seed, **self.batches.cursor(self.step_number)}
        parameters = parameters_not_finite(self.blocks, self.processes)
        return not_finite(self.step_number, loss, grad_norm, batch, cursor, parameters)

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
        nmse=found.nmse.tolist(),
        fvu=[value if math.isfinite(value) else None for value in found.fvu.tolist()],
        sparsity=found.sparsity.item(),
        pre_act=found.pre_act.item(),
        auxk=found.auxk.item(),
        l0=l0,
        dead=dead,
        grad_norm=grad_norm,
    )
