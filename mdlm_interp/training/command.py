"""`mdlm-interp train-lm`: train a model by one of the recipes and save it as a model directory."""

from __future__ import annotations

import json
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mdlm_interp.atomic_files import replacing_directory
from mdlm_interp.config_args import parse_args
from mdlm_interp.config_files import to_mapping
from mdlm_interp.errors import ConfigError, OutputExistsError
from mdlm_interp.training.checkpoint import LOG, LOSS_CURVE, refuse_foreign, saved_step
from mdlm_interp.training.config import RunConfig
from mdlm_interp.training.loop import run_to_end
from mdlm_interp.training.plots import plot_losses
from mdlm_interp.training.recipes import DEFAULT_RECIPE, recipe_classes, recipe_of
from mdlm_interp.training.trainer import Trainer

PROG = "mdlm-interp train-lm"
MODEL = "model"
TRAINING = "training.json"
"""File of a finished model directory that says how it was made."""

PRIVATE = ("out", "tokenizer", "token_cache")
"""Settings that say where things lie on one machine and nothing about the model."""


def main(argv: list[str]) -> int:
    """`mdlm-interp train-lm CONFIG.yaml [--key value]`."""
    config_class, recipe = recipe_classes(recipe_name(argv))
    config = parse_args(config_class, argv, prog=PROG, config_file=True)
    refuse_finished(config.out / MODEL, (*recipe.FINISHED, TRAINING))
    refuse_foreign(config.out)
    try:
        run(config)
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROG}: interrupted; {continuation(config.out)}\n")
        return 130
    return 0


def recipe_name(argv: list[str]) -> str:
    """The recipe that the arguments ask for: by --recipe, by their config file's `recipe:`, or by neither.

    What is wrong with the arguments or the file otherwise is left to `parse_args`, which says it better.
    """
    import yaml

    options = argv[: argv.index("--")] if "--" in argv else argv
    for argument, following in zip_longest(options, options[1:]):
        if argument == "--recipe" and following:
            return following
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
    file = next((argument for argument in options if argument.endswith((".yaml", ".yml"))), None)
    if file is None:
        return DEFAULT_RECIPE
    try:
        content = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return DEFAULT_RECIPE
    name = content.get("recipe", DEFAULT_RECIPE) if isinstance(content, dict) else DEFAULT_RECIPE
    if not isinstance(name, str):
        raise ConfigError(f"{file}: recipe must be text, the name of a recipe, got {name!r}")
    return name


def run(config: RunConfig) -> None:
    """Read, train, evaluate, and save what a later user needs in one directory."""
    trainer = Trainer(config, *recipe_of(config).read(config))
    recipe = trainer.recipe
    sys.stdout.write(f"{recipe.summary()}\n")
    run_to_end(trainer, progress=True)
    plot_losses(config.out / LOG, config.out / LOSS_CURVE, recipe.QUANTITY, averaged=config.ema_decay > 0)
    report = recipe.evaluate(trainer.average)
    finished = config.out / MODEL
    with replacing_directory(finished) as partial:
        recipe.save(trainer.average, partial)
        content = {"config": public_config(config), "inputs": trainer.record["inputs"], "held_out": report}
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (partial / TRAINING).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{recipe.table(report)}model: {finished}\nloss curve: {config.out / LOSS_CURVE}\n")


def refuse_finished(directory: Path, files: tuple[str, ...]) -> None:
    """Raise OutputExistsError if the model is there, or something else stands in its place."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    lacking = [name for name in files if not (directory / name).is_file()]
    if lacking:
        raise OutputExistsError(
            f"{directory} exists but is no finished model: it lacks {', '.join(lacking)}; move it away, and "
            f"the same command makes it from the last checkpoint"
        )
    raise OutputExistsError(f"{directory} exists: that run is complete; choose another out directory")


def continuation(directory: Path) -> str:
    """What an interrupted run left, and what to do next."""
    step = saved_step(directory)
    if step is None:
        return "no step was saved yet, and the same command starts anew"
    return f"step {step} is saved in {directory}, and the same command continues from there"


def public_config(config: RunConfig) -> dict[str, object]:
    """The config as recorded beside the model: file names without the directories of one machine."""
    mapping = to_mapping(config)
    for name in mapping:
        mapping[name] = _without_directory(getattr(config, name), mapping[name])
    return {name: value for name, value in mapping.items() if name not in PRIVATE}


def _without_directory(value: Any, plain: object) -> object:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
        return [_without_directory(item, item) for item in value]
    return plain
