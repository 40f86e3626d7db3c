"""A command's arguments as its config dataclass; the fields' sentences are the help.

`[CONFIG.yaml] [POSITIONAL ...] [--key.sub VALUE | --key=VALUE | --flag | --no-flag ...]`; dashes and
underscores in keys mean the same, `none` switches an optional field off, commas separate a list, and after
a bare `--` nothing is an option.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar, get_origin

from mdlm_interp.config_fields import Leaf, field_docs, leaves, option_name, shown, type_name, without_none
from mdlm_interp.config_files import COMMAND_LINE, FLAG_WORDS, Override, from_mapping, lay_over, load_config
from mdlm_interp.errors import ConfigError, nearest

T = TypeVar("T")

MAX_WIDTH = 110


def parse_args(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    positional: Sequence[str] = (),
    config_file: bool = False,
) -> T:
    """Read a command's arguments into its config.

    Args:
        prog: The command as it was called, for the usage line.
        positional: Fields that bare arguments fill, in order; a tuple field, last, takes all the rest.
        config_file: Whether a bare argument ending in .yaml or .yml is read as the config file.
    Raises:
        ConfigError: If the arguments do not make a valid config.
        SystemExit: With 0, after printing the help that --help asks for.
    """
    known = {leaf.key: leaf for leaf in leaves(cls)}
    options = argv[: argv.index("--")] if "--" in argv else argv
    if "--help" in options or "-h" in options:
        sys.stdout.write(_help(cls, known, prog, positional, config_file))
        raise SystemExit(0)
    overrides, bare = _split(argv, known)
    files = [argument for argument in bare if config_file and argument.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise ConfigError(f"{COMMAND_LINE}: one config file at most, got {' and '.join(files)}")
    _fill(overrides, [argument for argument in bare if argument not in files], known, positional)
    if files:
        return load_config(cls, files[0], overrides)
    return from_mapping(cls, lay_over(cls, {}, overrides), source=COMMAND_LINE)


def _split(argv: Sequence[str], known: Mapping[str, Leaf]) -> tuple[dict[str, Override], list[str]]:
    """The options by key, and the bare arguments."""
    overrides: dict[str, Override] = {}
    bare: list[str] = []
    queue = deque(argv)
    while queue:
        argument = queue.popleft()
        if argument == "--":
            bare += queue
            break
        if not _is_option(argument):
            bare.append(argument)
            continue
        written, equals, value = argument.removeprefix("--").partition("=")
        key, negated = _key(argument, written, known)
        if key in overrides:
            raise ConfigError(f"{COMMAND_LINE}: --{option_name(key)} is given twice")
        flag = _is_flag(known[key])
        if negated:
            if equals:
                raise ConfigError(f"{COMMAND_LINE}: --{written} takes no value, got {value!r}")
            overrides[key] = "false"
        elif equals:
            overrides[key] = value
        elif flag and not (queue and queue[0].lower() in (*FLAG_WORDS, "none")):
            overrides[key] = "true"
        elif not queue or queue[0].startswith("--"):
            expected = type_name(known[key].annotation)
            raise ConfigError(f"{COMMAND_LINE}: --{written} needs a value ({expected})")
        else:
            overrides[key] = queue.popleft()
    return overrides, bare


def _is_option(argument: str) -> bool:
    """Whether it starts as an option does; a lone dash and a negative number are values."""
    return len(argument) > 1 and argument[0] == "-" and not re.match(r"-\.?\d", argument)


def _key(argument: str, written: str, known: Mapping[str, Leaf]) -> tuple[str, bool]:
    """The field that an option names, and whether it is the --no- form."""
    key = written.replace("-", "_")
    if argument.startswith("--"):
        if key in known:
            return key, False
        positive = key.removeprefix("no_")
        if positive != key and positive in known and _is_flag(known[positive]):
            return positive, True
    near = nearest(written, map(option_name, known), prefix="--")
    if not argument.startswith("--"):
        near += "; text that begins with - goes after a bare --"
    raise ConfigError(f"{COMMAND_LINE}: unknown option {argument.partition('=')[0]}{near}")


def _fill(
    overrides: dict[str, Override], bare: Sequence[str], known: Mapping[str, Leaf], positional: Sequence[str]
) -> None:
    """Put the bare arguments where the fields in `positional` want them."""
    rest = deque(bare)
    for key in positional:
        if not rest:
            return
        if key in overrides:
            raise ConfigError(
                f"{COMMAND_LINE}: {key} is given twice: by --{option_name(key)} and as {rest[0]!r}"
            )
        if _is_list(known[key]):
            overrides[key] = tuple(rest)
            rest.clear()
        else:
            overrides[key] = rest.popleft()
    if rest:
        raise ConfigError(f"{COMMAND_LINE}: unexpected argument {rest[0]!r}; options start with --")


def _help(
    cls: type[Any], known: Mapping[str, Leaf], prog: str, positional: Sequence[str], config_file: bool
) -> str:
    """Usage, the config's first line, and each field with its type, default and sentence."""
    usage = [f"usage: {prog}", *(["[CONFIG.yaml]"] if config_file else [])]
    for key in positional:
        word = key.upper() + ("..." if _is_list(known[key]) else "")
        usage.append(word if known[key].required else f"[{word}]")
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    docs = field_docs(cls)
    lines = [
        " ".join([*usage, "[--option VALUE ...]"]),
        "",
        (cls.__doc__ or "").strip().partition("\n")[0],
        "",
    ]
    for key, leaf in known.items():
        name = f"--[no-]{option_name(key)}" if _is_flag(leaf) else f"--{option_name(key)} VALUE"
        if leaf.default is MISSING:
            state = "required" if leaf.required else "no default"
        else:
            state = f"default {shown(leaf.default) or repr('')}"
        lines.append(f"  {name}  ({type_name(leaf.annotation)}; {state})")
        lines += textwrap.wrap(docs.get(key, ""), width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([*lines, ""])


def _is_flag(leaf: Leaf) -> bool:
    return without_none(leaf.annotation)[0] is bool


def _is_list(leaf: Leaf) -> bool:
    return get_origin(without_none(leaf.annotation)[0]) is tuple
