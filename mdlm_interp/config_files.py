"""Typed configuration: YAML files and overrides to frozen dataclasses, and back.

1. A file becomes plain mappings, lists and scalars; a key that stands twice is an error.
2. Overrides (dotted key to text) are read by the type of the field they name and laid over the mapping.
3. The mapping is checked field by field against the dataclass: keys, types, choices, then `__post_init__`.

A section that is given in part keeps the rest of its field's default, not of its class's defaults.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from mdlm_interp.config_fields import (
    field_docs,
    field_types,
    item_types,
    leaves,
    option_name,
    presets,
    shown,
    type_name,
    without_none,
)
from mdlm_interp.errors import ConfigError, nearest
from mdlm_interp.yaml_files import read_yaml

__all__ = [
    "COMMAND_LINE",
    "Override",
    "check_fields",
    "field_docs",
    "from_mapping",
    "lay_over",
    "load_config",
    "to_mapping",
]

T = TypeVar("T")

Override = str | tuple[str, ...]
"""Text for a field; a tuple gives the items of a tuple field one by one, commas and all."""

FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What a yes-or-no option takes; the same words as in YAML."""

COMMAND_LINE = "command line"
"""The source that errors name for what no file holds."""


@dataclass(frozen=True)
class _Place:
    """Where a value came from, as errors show it."""

    source: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.key}" if self.key else self.source

    def child(self, name: object) -> _Place:
        return _Place(self.source, f"{self.key}.{name}" if self.key else str(name))


def from_mapping(cls: type[T], mapping: Mapping[str, object], *, source: str) -> T:
    """Build a config from plain values, checking every key and type.

    Args:
        source: What to name in errors: a file, or "command line".
    Raises:
        ConfigError: On an unknown or missing key, a wrong type or choice, or a failed `__post_init__`.
    """
    return cast(T, _build(cls, mapping, _Place(source)))


def load_config(cls: type[T], path: str | Path, overrides: Mapping[str, Override] | None = None) -> T:
    """Read a YAML file into a config, with overrides such as `{"train.lr": "1e-3"}` laid over it.

    Raises:
        ConfigError: If the file cannot be read, or file and overrides do not make a valid config.
    """
    mapping = read_yaml(Path(path))
    if not overrides:
        return from_mapping(cls, mapping, source=str(path))
    options = " ".join(f"--{option_name(key)}" for key in overrides)
    return from_mapping(cls, lay_over(cls, mapping, overrides), source=f"{path} with {options}")


def check_fields(config: Any) -> None:
    """Check the values of a config made in Python as those of a file; first of all in its `__post_init__`.

    Afterwards each field holds its own type: lists are tuples, whole numbers floats, text a path, where it says so.

    Raises:
        ConfigError: On a wrong type or choice, which would otherwise mean something else, or fail much later.
    """
    place = _Place(type(config).__name__)
    for name, annotation in field_types(type(config)).items():
        given = getattr(config, name)
        held = _read(annotation, given, place.child(name))
        if held is not given:
            object.__setattr__(config, name, held)


def to_mapping(config: Any) -> dict[str, object]:
    """The config as YAML and JSON hold it; `from_mapping` turns it back into an equal config."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config) if field.init}


def lay_over(
    cls: type[Any], mapping: Mapping[str, object], overrides: Mapping[str, Override]
) -> dict[str, object]:
    """A copy of the mapping in which each override, read by its field's type, has its place.

    Raises:
        ConfigError: If an override names no field, or its text does not read as the field's type.
    """
    known = {leaf.key: leaf.annotation for leaf in leaves(cls)}
    merged = dict(mapping)
    for written, text in overrides.items():
        key = written.replace("-", "_")
        if key not in known:
            near = nearest(written, map(option_name, known), prefix="--")
            raise ConfigError(f"{COMMAND_LINE}: unknown option --{written}{near}")
        place = _Place(COMMAND_LINE, f"--{option_name(key)}")
        value = _from_text(known[key], text, place)
        _read(known[key], value, place)  # here, so that a wrong choice is not blamed on the file
        *sections, name = key.split(".")
        node = merged
        for section in sections:
            inner = node.get(section)
            if inner is not None and not isinstance(inner, dict):
                break  # no section in the file either: the check of the whole says so
            copied: dict[str, object] = dict(inner or {})  # YAML aliases share one mapping between keys
            node[section] = copied
            node = copied
        else:
            node[name] = value
    return merged


def _build(cls: Any, value: object, place: _Place, instance: Any = None) -> object:
    """One section; `instance` has the values that hold where the mapping says nothing."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}: expected keys and values, got {reprlib.repr(value)}")
    types = field_types(cls)
    for key in value:
        if key not in types:
            name, known = place.child(key).key, [place.child(field).key for field in types]
            raise ConfigError(f"{place.source}: unknown key {name!r}{nearest(name, known)}")
    settings = presets(cls, instance)
    for name, item in value.items():
        preset = None if settings[name] is MISSING else settings[name]
        settings[name] = _read(types[name], item, place.child(name), preset)
    absent = [name for name, setting in settings.items() if setting is MISSING]
    if absent:
        keys = [place.child(name).key for name in absent]
        if place.source == COMMAND_LINE:
            keys = [f"--{option_name(key)}" for key in keys]
        needed = ", ".join(
            f"{key} ({type_name(types[name])})" for key, name in zip(keys, absent, strict=True)
        )
        raise ConfigError(f"{place.source}: missing {needed}")
    try:
        return cls(**settings)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def _read(annotation: Any, value: object, place: _Place, instance: object = None) -> object:
    """Plain data as one value of the field's type."""
    inner, optional = without_none(annotation)
    if optional and value is None:
        return None
    if is_dataclass(inner):
        return value if isinstance(value, cast(type, inner)) else _build(inner, value, place, instance)
    if get_origin(inner) is Literal:
        for choice in get_args(inner):
            if type(choice) is type(value) and choice == value:
                return choice
        near = nearest(str(value), map(shown, get_args(inner)))
        raise ConfigError(f"{place}: {reprlib.repr(value)} is not a choice{near}")
    if get_origin(inner) is tuple and isinstance(value, list | tuple):
        types = item_types(inner, len(value))
        if len(types) != len(value):
            raise ConfigError(f"{place}: expected {len(types)} items, got {len(value)}")
        places = [_Place(place.source, f"{place.key}[{i}]") for i in range(len(value))]
        return tuple(map(_read, types, value, places))
    if inner is Path and isinstance(value, str | Path) and value != "":
        return Path(value)
    if inner in (bool, int, float, str) and type(value) is inner:
        return value
    # In Python a number may be numpy's, and a Path stand where text is meant.
    whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if inner is int and whole is not None:
        return whole
    if inner is float and whole is not None and abs(whole) < 2**1023:
        return float(whole)
    if inner is float and isinstance(value, Real) and not isinstance(value, Integral):
        return float(value)
    if inner is str and isinstance(value, Path):
        return str(value)
    expected = type_name(annotation)
    raise ConfigError(f"{place}: expected {expected}, got {reprlib.repr(value)}{_remedy(inner, value)}")


def _remedy(wanted: Any, value: object) -> str:
    """What to write instead, where the cause is how YAML reads scalars."""
    if wanted is float and isinstance(value, str):
        parts = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", value)
        if parts:
            whole, fraction, sign, exponent = parts.groups()
            fraction = fraction if fraction and len(fraction) > 1 else ".0"
            return f"; YAML reads that as text, write {whole}{fraction}e{sign or '+'}{exponent}"
    if wanted is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if wanted in (str, Path) and isinstance(value, bool | int | float):
        return "; put it in quotes to make it text"
    if get_origin(wanted) is tuple and isinstance(value, str):
        return f"; write [{value!r}]"
    return ""


def _from_text(annotation: Any, text: Override, place: _Place) -> object:
    """Text from the command line as the plain value that YAML would hold for the field."""
    inner, optional = without_none(annotation)
    if optional and text == "none":
        return None
    if get_origin(inner) is tuple:
        items = (
            text if isinstance(text, tuple) else [part.strip() for part in text.split(",")] if text else []
        )
        types = item_types(inner, len(items))
        if len(types) != len(items):
            raise ConfigError(f"{place}: expected {len(types)} items, got {len(items)}")
        return [_from_text(item, entry, place) for item, entry in zip(types, items, strict=True)]
    if not isinstance(text, str):
        raise ConfigError(f"{place}: expected one {type_name(annotation)}, got {len(text)} of them")
    if get_origin(inner) is Literal:
        return {shown(choice): choice for choice in get_args(inner)}.get(text, text)
    try:
        if inner is bool:
            return FLAG_WORDS[text.lower()]
        return inner(text) if inner in (int, float) else text
    except (KeyError, ValueError):
        raise ConfigError(f"{place}: expected {type_name(annotation)}, got {text!r}") from None


def _plain(value: Any) -> object:
    if is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
