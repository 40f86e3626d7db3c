"""One plain training loop for every recipe.

step = one window of the recipe's rows, in pieces if asked: forward under autocast, the recipe's loss, backward;
then clipping, AdamW at the step's learning rate, and an average of the weights. A window is a pure function of
(seed, step), so a resumed run has the bits of an uninterrupted one.

The gradient of a window is that of its summed losses divided by its weight, whatever the pieces: dividing each
piece's mean by the number of pieces, as is common, gives a smaller last piece's rows too much say.

Source:
    Sahoo et al. 2024, arXiv:2406.07524, section 5 and appendix C; kuleshov-group/mdlm, configs.
"""

# Axes: row (sequence of a window)

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mdlm_interp.errors import CheckpointError
from mdlm_interp.randomness import random_bits
from mdlm_interp.training.checkpoint import (
    optimiser_tensors,
    restore_optimiser,
    run_record,
)
from mdlm_interp.training.config import RunConfig
from mdlm_interp.training.loop import run_to_end
from mdlm_interp.training.recipes import Batch, LogEntry, Recipe, recipe_of

Step = tuple[float, float]
"""The loss of a step and its gradient's norm before clipping."""


class Trainer:
    """One run: the weights, their average, the optimiser and the step they are at.

    Args:
        config: The run's settings, of the class that belongs to a recipe.
        inputs: What that recipe's `read` returns.
    """

    def __init__(self, config: RunConfig, *inputs: Any) -> None:
        self.config = config
        self.recipe: Recipe = recipe_of(config)(config, *inputs)
        self.record = run_record(config, self.recipe.inputs())
        self.model = self.recipe.build().train()
        # Batches come in few shapes, so each is compiled for itself.
        self._compiled: Callable[..., Any] = (
            torch.compile(self.model, dynamic=False) if config.compile else self.model
        )
        self.average = self.recipe.averaged(self.model)
        self.parameter_names, self.optimiser = _optimiser(self.recipe, self.model)
        self.tokens = 0
        """Tokens that this object was trained on; a continued run counts from where it continues."""
        self.step_number = 0

    def step(self) -> Step:
        """One optimiser step."""
        config, number = self.config, self.step_number
        window = self.recipe.batch(number)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate(number)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.accumulate(window)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        # Before the weights take it up: a checkpoint of weights that are not finite could not be continued.
        self._refuse_diverged("gradient's norm", norm)
        self.optimiser.step()
        self.step_number += 1
        self.tokens += self.recipe.tokens(window)
        self._update_average()
        return float(loss), float(norm)

    def accumulate(self, window: Batch) -> Tensor:
        """Add the window's gradient to the parameters'; returns its loss."""
        weight = self.recipe.weight(window)
        if not weight > 0.0:
            raise CheckpointError(
                f"the window of step {self.step_number} has weight {weight}, so its loss has no mean; "
                f"give more data or a larger batch_size"
            )
        total: Tensor | None = None
        for number, piece in enumerate(pieces(window, self.config.micro_batch_size)):
            loss = self.recipe.loss_sum(self._network(number), piece, self.step_number) / weight
            self._refuse_diverged("loss", loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None  # a window with weight has rows
        return total

    def _refuse_diverged(self, what: str, value: Tensor) -> None:
        if not bool(value.isfinite()):
            raise CheckpointError(
                f"the {what} of step {self.step_number} is {float(value)}; start anew in another out directory "
                f"with a lower lr or a longer warmup_steps (batch {self.step_number} of seed "
                f"{self.config.seed})"
            )

    def _network(self, piece: int) -> Callable[..., Any]:
        """The module as a recipe's loss calls it: compiled, under autocast, with this piece's dropout noise."""

        def network(*arguments: Any, **keywords: Any) -> Any:
            enabled = self.config.precision == "bfloat16"
            with (
                _dropout_noise(self.config.seed, self.step_number, piece),
                torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            ):
                return self._compiled(*arguments, **keywords)

        return network

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        averages: list[Tensor] = list(self.average.parameters())
        currents: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, currents, 1.0 - decay)

    def validate(self) -> list[LogEntry]:
        """The averaged weights on held-out data: what the log says of them."""
        return list(self.recipe.validate(self.average))

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


def train(config: RunConfig, *inputs: Any, progress: bool = False) -> Trainer:
    """Run to config.steps, continuing the run found in config.out.

    Args:
        inputs: What the recipe's `read` returns.
        progress: Show a bar on a terminal.
    Raises:
        CheckpointError: If config.out holds a run with other settings or text, or the loss is not finite.
        OutputExistsError: If config.out holds files of another origin that would be lost.
        WriteError: If the disk is full, read-only or failing; the last checkpoint stays.
        KeyboardInterrupt: After saving a checkpoint, on Ctrl-C or SIGTERM between two steps.
    """
    trainer = Trainer(config, *inputs)
    run_to_end(trainer, progress)
    return trainer


def pieces(window: Batch, rows: int | None) -> Iterator[Batch]:
    """A window cut along its rows, the last piece perhaps smaller; the window itself if rows is None."""
    if rows is None:
        yield window
        return
    for start in range(0, len(next(iter(window.values()))), rows):
        yield {name: tensor[start : start + rows] for name, tensor in window.items()}


def _optimiser(recipe: Recipe, model: nn.Module) -> tuple[list[str], torch.optim.AdamW]:
    """AdamW with weight decay where the recipe wants it, and its parameters' names in its order."""
    config = recipe.config
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in named if recipe.decays(name, p)]
    others = [(name, p) for name, p in named if not recipe.decays(name, p)]
    groups = [
        {"params": [p for _, p in decayed], "weight_decay": config.weight_decay},
        {"params": [p for _, p in others], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return [name for name, _ in [*decayed, *others]], optimiser


@contextmanager
def _dropout_noise(seed: int, step: int, piece: int) -> Iterator[None]:
    """Dropout draws from torch's global generator: key it by (seed, step, piece) and put it back."""
    stream = "dropout" if piece == 0 else f"dropout:{piece}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_bits(seed, stream, step, 1)[0] >> 1))
        yield
