"""One trainer of cross-layer transcoders as a process that `bench_clt_peers.py` drives: ours, or a peer's.

Runs under the Python in which the trainer is installed, so it imports nothing of this project except on our side.
It reads activations, already normalised, and answers commands on stdin with one line of JSON each:

    step N     one training step on batch N, with its seconds of wall time and of CPU time
    evaluate   FVU and active features of each layer on the rows behind the training rows

Every side has TopK with the same k a layer, Adam in float32, and its own initial weights, loss and step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor


class Settings(NamedTuple):
    """What all sides are given."""

    x: Tensor
    """Inputs [layer row d_model]."""
    y: Tensor
    """Targets [layer row d_model]."""
    held_out: int
    """Last rows, for evaluation only."""
    batch: int
    n_features: int
    k: int
    lr: float
    steps: int

    def rows(self, number: int) -> Tensor:
        """Rows of a batch: consecutive ones of a fixed permutation for each epoch."""
        count = self.x.shape[1] - self.held_out
        epoch, within = divmod(number, count // self.batch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        return order[within * self.batch : (within + 1) * self.batch]


class Side(NamedTuple):
    """A trainer."""

    step: Callable[[Tensor, Tensor], None]
    """Of a batch x, y [layer row d_model]."""
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of x: y_hat [layer row d_model], and whether each feature is active [layer row feature]."""


def learning_rate(settings: Settings, step: int) -> float:
    """Warm-up over 50 steps, linear fall over the last fifth, for every side."""
    fall = (settings.steps - step) / max(1, round(0.2 * settings.steps))
    return settings.lr * min(1.0, (step + 1) / 50, fall)


def ours(settings: Settings) -> Side:
    """`Trainer.step` with its defaults: gradient clipping, AuxK, dead counters, metrics."""
    import numpy as np

    from transcoder.batches import Batch
    from transcoder.config import TranscoderConfig
    from transcoder.model import CrossLayerTranscoder
    from transcoder.train_config import TrainConfig
    from transcoder.trainer import Trainer

    n_layers, _, d_model = settings.x.shape
    shape = TranscoderConfig(n_layers=n_layers, d_model=d_model, n_features=settings.n_features, k=settings.k)
    clt = CrossLayerTranscoder(shape, seed=0)
    given: list[Batch] = []

    class Given:
        def batch(self, step: int, own: range | None = None) -> Batch:
            return given[-1]

        def cursor(self, step: int) -> dict[str, int]:
            return {"step": step}

    trainer = Trainer(
        clt, Given(), TrainConfig(steps=settings.steps, batch_size=settings.batch, lr=settings.lr)
    )

    def step(x: Tensor, y: Tensor) -> None:
        n_rows = x.shape[1]
        nothing = torch.zeros(n_rows)
        given[:] = [Batch(np.arange(n_rows), x, y, nothing.bool(), nothing.double(), {})]
        trainer.step()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = clt.encode(x)
        return clt.decode(acts), acts > 0

    return Side(step, reconstruct)


def llamascopium(settings: Settings, *, csr: bool) -> Side:
    """OpenMOSS Llamascopium 2.0.0b34; csr: its sparse decoding."""
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder

    n_layers, _, d_model = settings.x.shape
    names = [f"in.{layer}" for layer in range(n_layers)], [f"out.{layer}" for layer in range(n_layers)]
    config = CLTConfig(
        hook_points_in=names[0], hook_points_out=names[1], d_model=d_model,
        expansion_factor=settings.n_features / d_model, act_fn="topk", top_k=settings.k, dtype=torch.float32,
        device="cpu", norm_activation="inference", decode_with_csr=csr,
    )  # fmt: skip
    model = CrossLayerTranscoder(config)
    model.init_parameters(encoder_uniform_bound=1.0, decoder_uniform_bound=1.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr, foreach=True)
    taken = 0

    def batch_of(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = dict(zip(names[0], x.unbind(), strict=True)) | dict(zip(names[1], y.unbind(), strict=True))
        return found | {"tokens": torch.zeros(x.shape[1], dtype=torch.int64)}

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal taken
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, taken)
        optimiser.zero_grad()
        model.compute_loss(batch_of(x, y), sparsity_loss_type=None)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        taken += 1

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = model.encode(x.transpose(0, 1))
        return model.decode(acts), (acts > 0).transpose(0, 1)

    return Side(step, reconstruct)


def crosslayer_coding(settings: Settings) -> Side:
    """crosslayer-coding, as decode-clt 0.0.1.

    Its TopK works on all layers together only, so it has as many active features in sum.
    """
    from clt.config import CLTConfig, TrainingConfig
    from clt.models.clt import CrossLayerTranscoder
    from clt.training.losses import LossManager

    n_layers, _, d_model = settings.x.shape
    config = CLTConfig(
        num_features=settings.n_features, num_layers=n_layers, d_model=d_model, activation_fn="topk",
        topk_k=settings.k * n_layers, topk_mode="global",
    )  # fmt: skip
    torch.manual_seed(0)
    model = CrossLayerTranscoder(config, process_group=None, device=torch.device("cpu"))
    losses = LossManager(
        TrainingConfig(
            learning_rate=settings.lr, training_steps=settings.steps, activation_path="none", sparsity_lambda=0.0,
            preactivation_coef=0.0, normalization_method="none", apply_sparsity_penalty_to_batchtopk=False,
        ),
        clt_config=config,
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr, foreach=True)
    taken = 0

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal taken
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, taken)
        optimiser.zero_grad()
        loss, _ = losses.compute_total_loss(
            model, dict(enumerate(x)), dict(enumerate(y)), taken, settings.steps
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        taken += 1

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(enumerate(x))
        acts = model.get_feature_activations(inputs)
        outputs = model(inputs)
        layers = range(n_layers)
        return torch.stack([outputs[i] for i in layers]), torch.stack([acts[i] > 0 for i in layers])

    return Side(step, reconstruct)


SIDES: dict[str, Callable[[Settings], Side]] = {
    "ours": ours,
    "llamascopium": lambda settings: llamascopium(settings, csr=False),
    "llamascopium-csr": lambda settings: llamascopium(settings, csr=True),
    "crosslayer-coding": crosslayer_coding,
}


@torch.no_grad()
def evaluated(side: Side, settings: Settings) -> dict[str, list[float]]:
    """FVU and L0 of each layer on the held-out rows."""
    x, y = settings.x[:, -settings.held_out :], settings.y[:, -settings.held_out :]
    variance = (y - y.mean(1, keepdim=True)).square().sum((1, 2))
    error, active = torch.zeros_like(variance), torch.zeros_like(variance)
    for start in range(0, settings.held_out, settings.batch):
        part = slice(start, start + settings.batch)
        y_hat, is_active = side.reconstruct(x[:, part])
        error = error + (y[:, part] - y_hat).square().sum((1, 2))
        active = active + is_active.sum((1, 2))
    return {"fvu": (error / variance).tolist(), "l0": (active / settings.held_out).tolist()}


def answer(command: str, side: Side, settings: Settings) -> dict[str, Any]:
    """What one command gives."""
    if command == "evaluate":
        return evaluated(side, settings)
    rows = settings.rows(int(command.removeprefix("step ")))
    x, y = settings.x[:, rows].contiguous(), settings.y[:, rows].contiguous()
    wall, cpu = time.perf_counter(), time.process_time()
    side.step(x, y)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--activations", required=True)
    for name in ("held-out", "batch", "features", "k", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = load_file(given.activations)
    settings = Settings(
        tensors["x"],
        tensors["y"],
        given.held_out,
        given.batch,
        given.features,
        given.k,
        given.lr,
        given.steps,
    )
    side = SIDES[given.side](settings)
    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    for line in sys.stdin:
        replies.write(json.dumps(answer(line.strip(), side, settings)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
