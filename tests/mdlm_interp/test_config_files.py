"""Configs: what is read, what is refused and in which words, and that nothing is lost on the way back."""

from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp.config_args import parse_args
from mdlm_interp.config_fields import leaves, type_name
from mdlm_interp.config_files import field_docs, from_mapping, load_config, to_mapping
from mdlm_interp.errors import ConfigError, MdlmError, nearest


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How weights move."""

    lr: float = 1.0e-3
    """Learning rate
    at its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    """Largest gradient norm; none leaves gradients alone."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Crop:
    size: int
    """Tokens kept."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of something.

    The second paragraph stays out of the help.
    """

    steps: int
    """Optimiser steps."""
    name: str = "run"
    out_dir: Path = Path("runs")
    """Where results go."""
    method: Literal["fast", "exact"] = "fast"
    width: Literal[8, 16, None] = 8
    compile: bool = False
    """Whether to compile the model."""
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=0.5, clip=1.0))
    crop: Crop | None = None
    hooks: tuple[str, ...] = ("a", "b")
    """Hook names."""
    files: tuple[Path, ...] = ()


def parsed(*argv: str, positional: tuple[str, ...] = (), config_file: bool = True) -> Run:
    return parse_args(Run, argv, prog="prog run", positional=positional, config_file=config_file)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a YAML file in the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str | bytes, name: str = "run.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_file


def test_a_file_with_every_kind_of_value_is_read_into_the_declared_types(write):
    path = write(
        "steps: 10\nname: a\nout_dir: x/y\nmethod: exact\nwidth: 16\ncompile: true\n"
        "optimiser: {lr: 2, betas: [0.5, 1], clip: null}\ncrop: {size: 3}\nhooks: [c]\nfiles: [p, q]\n"
    )
    expected = Run(
        steps=10,
        name="a",
        out_dir=Path("x/y"),
        method="exact",
        width=16,
        compile=True,
        optimiser=Optimiser(lr=2.0, betas=(0.5, 1.0)),
        crop=Crop(size=3),
        hooks=("c",),
        files=(Path("p"), Path("q")),
    )
    config = load_config(Run, path)
    assert config == expected
    assert type(config.optimiser.lr) is float, "an int is accepted for a float, and becomes one"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"stesp": 1}, "f: unknown key 'stesp'; did you mean 'steps'?"),
        ({"optimiser": {"lrr": 1}}, "f: unknown key 'optimiser.lrr'; did you mean 'optimiser.lr'?"),
        ({"crop": {3: 1}}, "f: unknown key 'crop.3'; did you mean 'crop.size'?"),
        ({}, "f: missing steps (int)"),
        ({"steps": 1, "crop": {}}, "f: missing crop.size (int)"),
        ({"steps": True}, "f: steps: expected int, got True"),
        ({"steps": "1"}, "f: steps: expected int, got '1'"),
        ({"steps": 1.0e6}, "f: steps: expected int, got 1000000.0; write 1000000"),
        ({"steps": 1.5}, "f: steps: expected int, got 1.5"),
        ({"steps": None}, "f: steps: expected int, got None"),
        ({"steps": 1, "compile": 1}, "f: compile: expected true or false, got 1"),
        ({"steps": 1, "name": 7}, "f: name: expected text, got 7; put it in quotes to make it text"),
        ({"steps": 1, "out_dir": ""}, "f: out_dir: expected path, got ''"),
        ({"steps": 1, "method": "fsat"}, "f: method: 'fsat' is not a choice; did you mean 'fast'?"),
        ({"steps": 1, "width": 9.0}, "f: width: 9.0 is not a choice; known: '8', '16', 'none'"),
        ({"steps": 1, "width": True}, "f: width: True is not a choice; known: '8', '16', 'none'"),
        ({"steps": 1, "hooks": "a"}, "f: hooks: expected list of text, got 'a'; write ['a']"),
        (
            {"steps": 1, "hooks": ["a", 1]},
            "f: hooks[1]: expected text, got 1; put it in quotes to make it text",
        ),
        ({"steps": 1, "optimiser": 3}, "f: optimiser: expected keys and values, got 3"),
        ({"steps": 1, "optimiser": {"lr": True}}, "f: optimiser.lr: expected float, got True"),
        (
            {"steps": 1, "optimiser": {"lr": 10**400}},
            "f: optimiser.lr: expected float, got 100000000000000000...0000000000000000000",
        ),
        ({"steps": 1, "optimiser": {"lr": "fast"}}, "f: optimiser.lr: expected float, got 'fast'"),
        ({"steps": 1, "optimiser": {"lr": -1}}, "f: optimiser: lr must be above 0, got -1.0"),
        ({"steps": 1, "optimiser": {"betas": [1]}}, "f: optimiser.betas: expected 2 items, got 1"),
        (
            {"steps": 1, "optimiser": {"clip": "x"}},
            "f: optimiser.clip: expected float or none, got 'x'",
        ),
    ],
)
def test_a_wrong_mapping_is_refused_in_these_words(mapping, message):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Run, mapping, source="f")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("written", "remedy"), [("1e-3", "1.0e-3"), ("2.5e3", "2.5e+3"), ("-1E5", "-1.0e+5"), ("3.e2", "3.0e+2")]
)
def test_a_float_that_yaml_reads_as_text_is_refused_with_the_spelling_that_works(write, written, remedy):
    path = write(f"steps: 1\noptimiser: {{clip: {written}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert str(caught.value) == (
        f"run.yaml: optimiser.clip: expected float or none, got '{written}'; "
        f"YAML reads that as text, write {remedy}"
    )
    config = load_config(Run, write(f"steps: 1\noptimiser: {{clip: {remedy}}}\n"))
    assert config.optimiser.clip == float(written)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nname: a\nsteps: 2\n", "run.yaml, line 3: key 'steps' is given twice, first in line 1"),
        ("{steps: 1, steps: 2}", "run.yaml, line 1: key 'steps' is given twice, first in line 1"),
        ("crop:\n  size: 1\n  size: 2\n", "run.yaml, line 3: key 'size' is given twice, first in line 2"),
        ("- 1\n", "run.yaml: expected keys and values, got [1]"),
        ("# nothing\n", "run.yaml: expected keys and values, got None"),
        (
            "steps: [1\n",
            "run.yaml, line 2: not valid YAML: while parsing a flow sequence expected ',' or ']'",
        ),
        ("steps: 2024-13-45\n", "run.yaml: not valid YAML: month must be in 1..12"),
        ("[" * 5000, "run.yaml: not valid YAML: maximum recursion depth exceeded"),
        (
            "a: !!python/name:os.system x\n",
            "run.yaml, line 1: not valid YAML: could not determine a constructor",
        ),
        ("a: &a\n  b: *a\n", "run.yaml: unknown key 'a'"),
        (b"name: \xff\n", "run.yaml: not UTF-8 text (byte 6)"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_line(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert str(caught.value).startswith(message)


def test_two_sections_may_use_the_same_key(write):
    assert load_config(Run, write("steps: 1\ncrop: {size: 2}\noptimiser: {lr: 1}\n")).crop == Crop(size=2)


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load_config(Run, write(b"\xef\xbb\xbfsteps: 1\n")) == Run(steps=1)


def test_a_missing_file_names_its_nearest_neighbour(write):
    write("steps: 1\n", "small.yaml")
    with pytest.raises(ConfigError, match=r"^smal\.yaml: no such file; did you mean 'small\.yaml'\?$"):
        load_config(Run, "smal.yaml")
    with pytest.raises(ConfigError, match=r"^\.: Is a directory$"):
        load_config(Run, ".")


def test_a_failed_check_names_the_file_and_the_overrides_that_made_it_fail(write):
    path = write("steps: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, {"optimiser.lr": "-1"})
    assert str(caught.value) == "run.yaml with --optimiser.lr: optimiser: lr must be above 0, got -1.0"


def test_a_section_given_in_part_keeps_the_rest_of_its_fields_default():
    config = from_mapping(Run, {"steps": 1, "optimiser": {"clip": 2}}, source="f")
    assert config.optimiser == Optimiser(lr=0.5, clip=2.0)
    assert parsed("--steps", "1", "--optimiser.clip", "none").optimiser == Optimiser(lr=0.5)


def test_an_override_of_one_section_leaves_another_that_shares_its_yaml_anchor(write):
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        one: Crop
        two: Crop

    path = write("one: &a {size: 1}\ntwo: *a\n")
    assert load_config(Pair, path, {"two.size": "5"}) == Pair(one=Crop(size=1), two=Crop(size=5))


def test_an_override_into_a_scalar_reports_the_scalar(write):
    path = write("steps: 1\ncrop: 4\n")
    with pytest.raises(ConfigError, match=r"crop: expected keys and values, got 4$"):
        load_config(Run, path, {"crop.size": "5"})


configs = st.builds(
    Run,
    steps=st.integers(),
    name=st.text(),
    out_dir=st.text(st.characters(codec="ascii", categories=["L"]), min_size=1).map(Path),
    method=st.sampled_from(["fast", "exact"]),
    width=st.sampled_from([8, 16, None]),
    compile=st.booleans(),
    optimiser=st.builds(
        Optimiser,
        lr=st.floats(min_value=1e-300, allow_nan=False),
        betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
        clip=st.none() | st.floats(allow_nan=False),
    ),
    crop=st.none() | st.builds(Crop, size=st.integers()),
    hooks=st.lists(st.text()).map(tuple),
    files=st.lists(st.sampled_from([Path("a"), Path("b/c")])).map(tuple),
)


@given(configs)
def test_to_mapping_and_yaml_and_from_mapping_give_an_equal_config(config):
    mapping = to_mapping(config)
    assert from_mapping(Run, mapping, source="f") == config
    assert from_mapping(Run, yaml.safe_load(yaml.safe_dump(mapping)), source="f") == config


def test_a_config_is_not_changed_by_what_is_done_to_its_mapping():
    config = Run(steps=1)
    mapping = to_mapping(config)
    mapping["steps"] = 2
    assert config == Run(steps=1)
    with pytest.raises(FrozenInstanceError):
        config.steps = 2  # type: ignore[misc]


def test_field_docs_are_the_literals_after_fields_sections_unfolded():
    assert field_docs(Run) == {
        "steps": "Optimiser steps.",
        "out_dir": "Where results go.",
        "compile": "Whether to compile the model.",
        "optimiser.lr": "Learning rate at its peak.",
        "optimiser.clip": "Largest gradient norm; none leaves gradients alone.",
        "crop.size": "Tokens kept.",
        "hooks": "Hook names.",
    }


def test_an_inherited_field_keeps_its_sentence_unless_the_heir_writes_another():
    @dataclass(frozen=True, kw_only=True)
    class Heir(Crop):
        extra: int = 0
        """More."""

    assert field_docs(Heir) == {"size": "Tokens kept.", "extra": "More."}


def test_a_field_of_an_unsupported_type_is_a_bug_and_says_so():
    with pytest.raises(TypeError, match="cannot be of type dict"):
        type_name(dict[str, int])


# The command line


def test_options_of_every_kind_are_read_by_the_type_of_their_field():
    config = parsed(
        *(
            "--steps",
            "-3",
            "--name=x=y",
            "--out-dir",
            "o",
            "--method",
            "exact",
            "--width",
            "none",
            "--compile",
        ),
        *(
            "--optimiser.lr",
            "1e-3",
            "--optimiser.betas",
            "0.5,1",
            "--crop.size=3",
            "--hooks",
            "c, d",
            "--files=",
        ),
    )
    assert config == Run(
        steps=-3,
        name="x=y",
        out_dir=Path("o"),
        method="exact",
        width=None,
        compile=True,
        optimiser=Optimiser(lr=1e-3, betas=(0.5, 1.0), clip=1.0),
        crop=Crop(size=3),
        hooks=("c", "d"),
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--compile"], True),
        (["--no-compile"], False),
        (["--compile", "false"], False),
        (["--compile", "no"], False),
        (["--compile=Yes"], True),
        (["--compile=true"], True),
        (["--compile", "--name", "x"], True),
    ],
)
def test_a_flag_can_be_switched_both_ways(argv, expected):
    assert parsed("--steps", "1", *argv).compile is expected


def test_dashes_and_underscores_in_keys_mean_the_same():
    assert parsed("--steps", "1", "--out-dir", "x") == parsed("--steps", "1", "--out_dir", "x")


def test_a_config_file_is_read_and_options_override_it(write):
    path = write("steps: 1\nname: file\n")
    assert parsed(path, "--steps", "2") == Run(steps=2, name="file")
    assert parsed("--steps", "2", path) == Run(steps=2, name="file")


def test_without_config_file_a_yaml_name_is_an_argument_like_any_other():
    config = parsed("a.yaml", "--steps", "1", positional=("files",), config_file=False)
    assert config.files == (Path("a.yaml"),)


def test_bare_arguments_fill_the_positional_fields_and_a_last_list_takes_the_rest():
    config = parsed("x, y", "p,1", "-2", "--steps", "1", positional=("name", "files"))
    assert config == Run(steps=1, name="x, y", files=(Path("p,1"), Path("-2")))
    assert parsed("x", "--steps", "1", positional=("name", "files")).files == ()
    assert parsed("--steps", "1", "--", "--help", positional=("name",)).name == "--help"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "command line: missing --steps (int)"),
        (["--stpes", "1"], "command line: unknown option --stpes; did you mean '--steps'?"),
        (["--optimizer.lr=1"], "command line: unknown option --optimizer.lr; did you mean '--optimiser.lr'?"),
        (["--no-steps"], "command line: unknown option --no-steps; did you mean '--steps'?"),
        (["-s", "1"], "command line: unknown option -s; known: '--steps', '--name', '--out-dir', "),
        (["-[MASK]"], "command line: unknown option -[MASK]; known: "),
        (["--steps"], "command line: --steps needs a value (int)"),
        (["--steps", "--name", "x"], "command line: --steps needs a value (int)"),
        (["--steps", "1", "--steps=2"], "command line: --steps is given twice"),
        (["--out-dir", "1", "--out_dir=2"], "command line: --out-dir is given twice"),
        (["--compile", "--no-compile"], "command line: --compile is given twice"),
        (["--no-compile=true"], "command line: --no-compile takes no value, got 'true'"),
        (["--steps", "1e3"], "command line: --steps: expected int, got '1e3'"),
        (["--compile=maybe"], "command line: --compile: expected true or false, got 'maybe'"),
        (["--optimiser.clip", "x"], "command line: --optimiser.clip: expected float or none, got 'x'"),
        (["--optimiser.betas", "1"], "command line: --optimiser.betas: expected 2 items, got 1"),
        (["--method", "fsat"], "command line: --method: 'fsat' is not a choice; did you mean 'fast'?"),
        (["--out-dir="], "command line: --out-dir: expected path, got ''"),
        (["--steps=1", "--optimiser.lr=0"], "command line: optimiser: lr must be above 0, got 0.0"),
        (["a.yaml", "b.yml"], "command line: one config file at most, got a.yaml and b.yml"),
        (["x", "--name", "y"], "command line: name is given twice: by --name and as 'x'"),
        (["x", "y"], "command line: unexpected argument 'y'; options start with --"),
    ],
)
def test_a_wrong_command_line_is_refused_in_these_words(argv, message):
    with pytest.raises(ConfigError) as caught:
        parsed(*argv, positional=("name",))
    assert str(caught.value).startswith(message)


def test_text_that_looks_like_an_option_has_its_own_hint():
    with pytest.raises(
        ConfigError, match=r"unknown option -\[MASK\]; .*; text that begins with - goes after a bare --$"
    ):
        parsed("-[MASK]", positional=("name",))


def test_help_names_every_field_with_type_default_and_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parsed("--steps", "oops", "--help", positional=("steps", "files"))
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: prog run [CONFIG.yaml] STEPS [FILES...] [--option VALUE ...]\n\nOne run of something.\n\n"
        "  --steps VALUE  (int; required)\n        Optimiser steps.\n"
        "  --name VALUE  (text; default run)\n"
    )
    assert "second paragraph" not in text
    for line in (
        "  --[no-]compile  (true or false; default false)\n        Whether to compile the model.\n",
        "  --method VALUE  (fast|exact; default fast)\n",
        "  --width VALUE  (8|16|none; default 8)\n",
        "  --optimiser.lr VALUE  (float; default 0.5)\n        Learning rate at its peak.\n",
        "  --optimiser.betas VALUE  (list of float, float; default 0.9,0.999)\n",
        "  --crop.size VALUE  (int; no default)\n",
        "  --hooks VALUE  (list of text; default a,b)\n",
        "  --files VALUE  (list of path; default '')\n",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= 80
    assert len(list(leaves(Run))) == text.count("\n  --")


def test_help_shows_defaults_that_the_command_line_takes_back():
    config = Run(steps=1)
    argv = [
        f"--{leaf.key}={'1' if leaf.key == 'steps' else _shown(config, leaf.key)}" for leaf in leaves(Run)
    ]
    assert parsed(*(a for a in argv if "crop" not in a)) == config


def _shown(config: Run, key: str) -> str:
    from mdlm_interp.config_fields import shown

    value: object = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return shown(value)


# Errors


def test_nearest_names_the_close_choice_or_a_few_of_the_known():
    assert nearest("stpes", ["steps", "name"]) == "; did you mean 'steps'?"
    assert nearest("q", ["steps", "name"]) == "; known: 'steps', 'name'"
    assert nearest("q", []) == ""
    assert nearest("q", map(str, range(20))) == "; known: '0', '1', '2', '3', '4', '5', '6', '7', ..."
    assert nearest("x", ["y"], prefix="--") == "; known: '--y'", "the dashes are not part of the likeness"


def test_a_config_error_is_the_users_mistake_and_a_value_error():
    assert issubclass(ConfigError, MdlmError)
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(ValueError, match="lr must be above 0"):
        replace(Optimiser(), lr=0.0)


@pytest.mark.parametrize(
    ("text", "line", "number"),
    [
        ("steps: 010\n", 1, "010"),
        ("name: a\nsteps: 1:10\n", 2, "1:10"),
        ("steps: 1\nhooks: [-0_7]\n", 2, "-0_7"),
    ],
)
def test_numbers_that_yaml_reads_in_another_base_are_refused(tmp_path, text, line, number):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert str(caught.value) == (
        f"{path}, line {line}: YAML reads {number} in base 8 or 60; write the number in base 10, or in quotes if it is "
        f"text"
    )


def test_other_numbers_and_quoted_text_are_read_as_they_stand(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 0\nname: '010'\noptimiser: {lr: 0.5}\nhooks: ['1:10', a]\n")
    config = load_config(Run, path)
    assert (config.steps, config.name, config.hooks) == (0, "010", ("1:10", "a"))
