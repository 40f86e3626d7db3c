"""What one trainer needs of a recipe, and which recipes there are.

A recipe is a way to train: its module, its batches, its loss, what it saves. The trainer (`trainer.py`) owns
everything else: the optimiser, the learning rate, accumulation, autocast, dropout's noise, the average of the
weights, and (`loop.py`) the log, checkpoints and resuming. `mdlm-interp train-lm CONFIG.yaml` reads the file's
`recipe:` (mdlm if there is none), and with it chooses the config class and the recipe.

To add one:
1. A frozen dataclass that extends `RunConfig` (`config.py`) with `recipe: Literal["name"] = "name"` and its own
   settings; `RESUMABLE` names those that may differ when a stopped run continues.
2. A `Recipe` whose constructor takes the config and what `read` returns.
3. A line in `RECIPES`.

Rules that keep runs exact and comparable:
- `build` is a pure function of the config and the inputs, `batch` of (seed, step): nothing is kept between steps.
- Every tensor of a batch has one row a sequence along its first axis, and rows do not depend on how a window is
  cut into pieces. The trainer cuts along that axis when `micro_batch_size` is set.
- `loss_sum` is a sum, not a mean; the trainer divides the window's sums by `weight` of the whole window, so
  that any cut has the gradient of one big batch, also when the last piece or the last window is smaller.
- `loss_sum` calls `network` (the module as compiled and under autocast) and does its own arithmetic outside
  of autocast, in float32.
- All trained state is in the module's parameters; buffers are constants.
"""

# Axes: row (sequence of a window)

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from mdlm_interp.errors import ConfigError, nearest
from mdlm_interp.training.config import RunConfig

Batch = Mapping[str, Tensor]
"""The tensors of a window or of a piece of it, each [row, ...]."""

Network = Callable[..., Any]
"""The module as the trainer runs it; arguments and result are the module's own."""

LogEntry = Mapping[str, int | float | str | None]
"""What one line of the log says beside its step."""

RECIPES: dict[str, tuple[str, str]] = {
    "mdlm": ("mdlm_interp.training.config:TrainLMConfig", "mdlm_interp.training.mdlm:MDLMRecipe"),
    "learner": (
        "mdlm_interp.training.learner:TrainLearnerConfig",
        "mdlm_interp.training.learner:LearnerRecipe",
    ),
    "dllm": ("mdlm_interp.training.dllm:TrainDLLMConfig", "mdlm_interp.training.dllm:DLLMRecipe"),
    "flowlm": ("mdlm_interp.training.flowlm:TrainFlowLMConfig", "mdlm_interp.training.flowlm:FlowLMRecipe"),
}
"""Config class and recipe by name, as strings: a recipe's libraries are imported when it is chosen."""

DEFAULT_RECIPE = "mdlm"


class Recipe(ABC):
    """One way to train a model.

    Args:
        config: Its settings.
        inputs: What `read` returns, one argument each; subclasses name them and keep them.
    """

    FINISHED: ClassVar[tuple[str, ...]]
    """Files that a finished model directory must hold, beside training.json."""
    QUANTITY: ClassVar[str] = "cross-entropy (nats per token)"
    """What the loss curve shows, with its unit."""

    config: RunConfig

    def __init__(self, config: Any, *inputs: Any) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def read(cls, config: Any) -> tuple[Any, ...]:
        """Read text, tokenizer, encoder, ... from disk: the constructor's arguments after the config.

        Raises:
            DataError: If text is missing or unusable.
            CheckpointError: If a tokenizer or a model to start from is.
        """

    @abstractmethod
    def summary(self) -> str:
        """One line on what is trained on, for the terminal."""

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """What the run was given, as JSON: a stopped run continues only with the same.

        "sources" is a list of `asdict(TextSource)` for config.files; any other key, such as
        "tokenizer_sha256", names a setting and how its content is told from another's.
        """

    @abstractmethod
    def build(self) -> nn.Module:
        """The module to train, in training mode, with its initial weights."""

    def averaged(self, module: nn.Module) -> nn.Module:
        """A copy of a fresh module that will hold the averaged weights: in eval mode, without gradients."""
        return copy.deepcopy(module).eval().requires_grad_(False)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter: to matrices other than embeddings."""
        return parameter.dim() == 2 and "embed" not in name

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The window of a step, counted from 0, noise included; at most config.batch_size rows."""

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """What the sum of a window's losses is divided by: its rows, its tokens, its masked tokens, ..."""

    @abstractmethod
    def loss_sum(self, network: Network, batch: Batch, step: int) -> Tensor:
        """The sum of the losses of a window's piece, over what `weight` counts: a scalar, float32 at least."""

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """Tokens in a window, for the rate that the log shows."""

    def opening(self) -> Iterable[LogEntry]:
        """Lines for the log before the first step of a new run; a line's "note" is shown on the terminal too."""
        return ()

    @abstractmethod
    def validate(self, module: nn.Module) -> Iterable[LogEntry]:
        """Figures of the averaged weights on held-out data, one log line each; the same data every time.

        A line that is to appear in the loss curve has "form" (which curve) and "held_out_nats".
        """

    @abstractmethod
    def evaluate(self, module: nn.Module) -> dict[str, Any]:
        """The final report of the averaged weights, as JSON holds it; stands in training.json."""

    @abstractmethod
    def table(self, report: dict[str, Any]) -> str:
        """The final report for the terminal, each line ended."""

    @abstractmethod
    def save(self, module: nn.Module, directory: Path) -> None:
        """Write the files in FINISHED: the averaged weights and what a user needs with them."""


def recipe_classes(name: str) -> tuple[type[RunConfig], type[Recipe]]:
    """The config class and the recipe of that name.

    Raises:
        ConfigError: If there is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}{nearest(name, RECIPES)}")
    config, recipe = (_resolve(target) for target in RECIPES[name])
    return cast(type[RunConfig], config), cast(type[Recipe], recipe)


def recipe_of(config: RunConfig) -> type[Recipe]:
    """The recipe that a config belongs to."""
    return recipe_classes(config.recipe)[1]


def _resolve(target: str) -> object:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
