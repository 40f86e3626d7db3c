"""Choosing a recipe: by the config's `recipe:`, by --recipe, and what each must bring."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from matplotlib.figure import Figure

from mdlm_interp.__main__ import main
from mdlm_interp.config_files import load_config
from mdlm_interp.errors import ConfigError
from mdlm_interp.training.command import public_config, recipe_name
from mdlm_interp.training.config import RunConfig
from mdlm_interp.training.learner import TrainLearnerConfig
from mdlm_interp.training.plots import plot_losses
from mdlm_interp.training.recipes import RECIPES, Recipe, recipe_classes, recipe_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_a_config_of_its_name_and_all_the_parts(name):
    config, recipe = recipe_classes(name)
    assert issubclass(config, RunConfig)
    assert issubclass(recipe, Recipe)
    assert not recipe.__abstractmethods__
    assert get_args(get_type_hints(config)["recipe"]) == (name,)
    assert config.__dataclass_fields__["recipe"].default == name
    assert set(config.RESUMABLE) >= set(RunConfig.RESUMABLE)
    assert set(config.RESUMABLE) <= set(config.__dataclass_fields__)
    assert recipe.FINISHED


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest_one(capsys, tmp_path):
    with pytest.raises(ConfigError, match=r"got 'lerner'; did you mean 'learner'\?"):
        recipe_classes("lerner")
    path = tmp_path / "run.yaml"
    path.write_text("recipe: lerner\n")
    assert main(["train-lm", str(path)]) == 2
    assert "recipe must be one of mdlm, learner, dllm, flowlm, got 'lerner'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("recipe: learner\n", [], "learner"),
        ("steps: 3\n", [], "mdlm"),
        ("recipe: learner\n", ["--recipe", "dllm"], "dllm"),
        ("recipe: learner\n", ["--recipe=flowlm"], "flowlm"),
        ("recipe: learner\n", ["--", "--recipe", "dllm"], "learner"),
        ("recipe: [\n", [], "mdlm"),  # no YAML: parse_args says so
        ("- a\n", [], "mdlm"),
        (None, [], "mdlm"),  # no file
    ],
)
def test_the_recipe_is_the_arguments_or_the_files(tmp_path, content, arguments, expected):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    assert recipe_name([str(path), *arguments]) == expected


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: 3\n")
    with pytest.raises(ConfigError, match=r"run.yaml: recipe must be text, the name of a recipe, got 3"):
        recipe_name([str(path)])
    assert recipe_name([]) == "mdlm"


def test_help_is_that_of_the_recipe(capsys):
    assert main(["train-lm", "--help"]) == 0
    plain = capsys.readouterr().out
    assert "--model.cond-dim" in plain
    assert "--recipe NAME --help" in " ".join(plain.split())
    assert main(["train-lm", "--recipe", "learner", "--help"]) == 0
    assert "--model.rope" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_mdlm", "train_learner"])
def test_a_shipped_config_names_its_recipe_and_parses_as_it(name):
    path = ROOT / "configs" / f"{name}.yaml"
    recipe = name.removeprefix("train_")
    assert recipe_name([str(path)]) == recipe
    config = load_config(recipe_classes(recipe)[0], path)
    assert config.recipe == recipe
    assert recipe_of(config).__name__.lower() == f"{recipe}recipe"


def test_a_key_of_another_recipe_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text((ROOT / "configs" / "train_mdlm.yaml").read_text() + "times: independent\n")
    with pytest.raises(ConfigError, match="unknown key 'times'"):
        load_config(recipe_classes("mdlm")[0], path)


def test_what_is_recorded_beside_a_model_has_no_directory_of_one_machine(learner_config):
    config = replace(
        learner_config,
        files=(Path("/home/someone/a.txt"), Path("/home/someone/b.txt")),
        token_cache=Path("/home/someone/tokens"),
    )
    recorded = public_config(config)
    assert recorded["files"] == ["a.txt", "b.txt"]
    assert recorded["recipe"] == "learner"
    assert "someone" not in json.dumps(recorded)
    assert {"out", "tokenizer", "token_cache"}.isdisjoint(recorded)
    assert isinstance(config, TrainLearnerConfig)


@pytest.mark.parametrize(("averaged", "weights"), [(True, "averaged weights"), (False, "last weights")])
def test_the_loss_curve_shows_what_is_in_the_log_under_the_recipes_name_for_it(
    tmp_path, monkeypatch, averaged, weights
):
    drawn: list[Figure] = []
    original = Figure.savefig

    def keep(self: Figure, path: Path, dpi: int) -> None:
        drawn.append(self)
        original(self, path, dpi=dpi)

    monkeypatch.setattr(Figure, "savefig", keep)
    log = tmp_path / "log.jsonl"
    entries: list[dict[str, object]] = [
        {"step": 0, "compressor": "lzma", "ideal_loss_nats": 4.5},
        {"step": 2, "loss_nats": 6.0},
        {"step": 4, "loss_nats": 5.0},
        {"step": 4, "form": "answers", "held_out_nats": 5.5},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    plot_losses(log, tmp_path / "loss.png", "bits a byte", averaged=averaged)
    (axes,) = drawn[0].axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert lines["training batches (mean between log lines)"] == [[2, 6.0], [4, 5.0]]
    assert lines[f"held out, answers, {weights}"] == [[4, 5.5]]
    assert [y for _, y in lines["lzma's code length of the training text (no bound)"]] == [4.5, 4.5]
    assert axes.get_ylabel() == "bits a byte"
    assert (tmp_path / "loss.png").stat().st_size > 1000
