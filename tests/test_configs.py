"""Every YAML in configs/ loads as the command in its first line would load it."""

from importlib import import_module
from pathlib import Path

import pytest

from mdlm_interp.__main__ import COMMANDS
from mdlm_interp.config_files import from_mapping, load_config, to_mapping
from mdlm_interp.errors import ConfigError
from mdlm_interp.training.command import recipe_name
from mdlm_interp.training.recipes import recipe_classes

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.y*ml"))

CONFIG_CLASSES = {
    "capture run": "capture.config:CaptureConfig",
    "sample": "mdlm_interp.decoding.commands:SampleConfig",
    "clt train": "transcoder.config:CLTRunConfig",
}


def command_of(first_line: str) -> str:
    """The command that a config's first line, `# mdlm-interp COMMAND ...`, names."""
    words = first_line.split()
    if words[:2] != ["#", "mdlm-interp"]:
        raise ValueError(f"the first line must be '# mdlm-interp COMMAND ...', got {first_line!r}")
    for command in (" ".join(words[2:4]), " ".join(words[2:3])):
        if command in COMMANDS:
            return command
    raise ValueError(f"no command of mdlm-interp in {first_line!r}")


def config_class(command: str, path: Path) -> type:
    if command == "train-lm":  # whose config class is its recipe's
        return recipe_classes(recipe_name([str(path)]))[0]
    module, _, name = CONFIG_CLASSES[command].partition(":")
    found = getattr(import_module(module), name)
    assert isinstance(found, type)
    return found


def load(path: Path) -> object:
    return load_config(config_class(command_of(path.read_text("utf-8").partition("\n")[0]), path), path)


def test_there_are_configs_for_every_command_that_takes_one():
    commands = {command_of(path.read_text("utf-8").partition("\n")[0]) for path in FILES}
    assert commands == {*CONFIG_CLASSES, "train-lm"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_survives_the_way_to_an_output_and_back(path):
    config = load(path)
    assert from_mapping(type(config), to_mapping(config), source="an output") == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_line_of_a_shipped_config_calls_the_file_itself(path):
    named = [
        word for word in path.read_text("utf-8").split("\n")[0].split() if word.endswith((".yaml", ".yml"))
    ]
    assert named == [path.relative_to(ROOT).as_posix()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_config_with_a_key_too_many_is_refused(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_text(path.read_text("utf-8") + "\nno_such_key: 1\n", "utf-8")
    with pytest.raises(ConfigError, match="unknown key 'no_such_key'"):
        load(copy)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("# A config", "the first line must be"),
        ("# mdlm-interp trian-lm x.yaml", "no command of mdlm-interp in"),
    ],
)
def test_a_first_line_without_a_command_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        command_of(line)


def test_the_longer_command_is_found_first():
    assert command_of("# mdlm-interp capture run configs/x.yaml") == "capture run"
    assert command_of("# mdlm-interp train-lm configs/x.yaml") == "train-lm"
