"""Where metrics go: a line of JSON always, TensorBoard and Weights & Biases where they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import ConfigError
from transcoder.config import METRICS
from transcoder.train_config import TrainConfig
from transcoder.training_log import append_entry

TENSORBOARD = "tensorboard"
"""Directory of TensorBoard's files, in that of the run."""


class MetricSinks:
    """Writes each line of metrics to every sink; a context, at whose end the sinks are closed.

    Args:
        first_step: Where the run goes on; what a dashboard has after it is written again.
    Raises:
        ConfigError: If a dashboard is asked for whose package is not installed.
    """

    def __init__(self, out: Path, config: TrainConfig, first_step: int) -> None:
        self._log = out / METRICS
        self._board: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self._board = writer(str(out / TENSORBOARD), purge_step=first_step + 1 if first_step else None)
        if config.wandb is not None:
            # The same for the run that goes on, another for one of the same name elsewhere.
            number = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
            self._wandb = _imported("wandb", "wandb").init(
                project=config.wandb,
                name=out.name,
                id=f"{out.name}-{number}",
                resume="allow",
                config=to_mapping(config),
            )

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write a line of metrics.

        Raises:
            WriteError: If the disk is full or failing.
        """
        append_entry(self._log, entry)
        if self._board is None and self._wandb is None:
            return
        scalars = _scalars(entry)
        for name, value in scalars.items() if self._board is not None else ():
            self._board.add_scalar(name, value, entry["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=entry["step"])

    def __enter__(self) -> MetricSinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _scalars(entry: Mapping[str, Any]) -> dict[str, int | float]:
    """A line's numbers by name, those of layers as name/layer, without those that are undefined.

    >>> _scalars({"step": 3, "fvu": 0.5, "fvu_by_layer": [0.4, 0.6, None]})
    {'fvu': 0.5, 'fvu_by_layer/0': 0.4, 'fvu_by_layer/1': 0.6}
    """
    found: dict[str, int | float | None] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            found |= {f"{name}/{layer}": item for layer, item in enumerate(value)}
        elif name != "step":
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _imported(module: str, extra: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(
            f"train.{extra} needs a package that is not installed; pip install 'mdlm-interp[{extra}]', or leave it out"
        ) from None
