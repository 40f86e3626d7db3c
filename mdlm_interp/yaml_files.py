"""YAML files as plain mappings, lists and scalars; what YAML would misread without a word is an error."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any, cast

from mdlm_interp.errors import ConfigError, nearest

NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[\d_]+(:[\d_.]+)+)")
"""What looks like a number in base 10 and is none."""


def read_yaml(path: Path) -> dict[str, object]:
    """The keys and values of a file.

    Raises:
        ConfigError: If it cannot be read, is no YAML, or says something that YAML takes for something else.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        near = nearest(path.name, sorted(file.name for file in path.parent.glob("*.y*ml")))
        raise ConfigError(f"{path}: no such file{near}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    mapping = _parse_yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected keys and values, got {reprlib.repr(mapping)}")
    return mapping


def _parse_yaml(text: str, source: str) -> object:
    import yaml  # needed to read a file, not to import the packages

    try:
        nodes = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{source}, line {line}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    _refuse_traps(nodes, source)
    return cast(object, value)


def _refuse_traps(root: Any, source: str) -> None:
    """What YAML takes for something else without a word: the last of two equal keys, 010 as 8, 1:10 as 70."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in visited:
            continue
        if isinstance(node.value, str):
            if node.tag in NUMBER_TAGS and OTHER_BASE.fullmatch(node.value):
                line = node.start_mark.line + 1
                raise ConfigError(
                    f"{source}, line {line}: YAML reads {node.value} in base 8 or 60; write the number in base 10, or "
                    f"in quotes if it is text"
                )
            continue
        visited.add(id(node))  # an alias can make the graph cyclic
        marks: dict[str, Any] = {}
        for entry in node.value:
            if not isinstance(entry, tuple):
                pending.append(entry)
                continue
            pending += entry
            key, mark = entry[0].value, entry[0].start_mark
            if isinstance(key, str) and marks.setdefault(key, mark) is not mark:
                first = f"first in line {marks[key].line + 1}"
                raise ConfigError(f"{source}, line {mark.line + 1}: key {key!r} is given twice, {first}")
