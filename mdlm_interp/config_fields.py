"""What a config dataclass says about itself: its fields' types, defaults and sentences.

A config is a frozen, keyword-only dataclass. A field whose type is another config is a section; every other
field is a leaf and holds bool, int, float, str, Path, Literal, a tuple of those, or one of them `| None`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

SCALARS: dict[Any, str] = {bool: "true or false", int: "int", float: "float", str: "text", Path: "path"}


class Leaf(NamedTuple):
    """One field that holds a value rather than a section."""

    key: str
    """Dotted path from the root config."""
    annotation: Any
    """Its type, resolved."""
    default: Any
    """What it is when nobody sets it; `dataclasses.MISSING` when there is nothing it could be."""
    required: bool
    """Whether somebody must set it: it has no default, and no section above it can be left out."""


def leaves(cls: type[Any], prefix: str = "", instance: Any = None, needed: bool = True) -> Iterator[Leaf]:
    """Every leaf, sections unfolded, in the order of definition.

    Args:
        instance: A config whose values are the defaults, instead of the class's own.
        needed: Whether the section that `prefix` names is always there.
    """
    types = field_types(cls)
    for name, preset in presets(cls, instance).items():
        section = without_none(types[name])[0]
        if is_dataclass(section):
            inner = None if preset is MISSING else preset
            yield from leaves(cast(type, section), f"{prefix}{name}.", inner, needed and preset is not None)
        else:
            yield Leaf(prefix + name, types[name], preset, needed and preset is MISSING)


def field_types(cls: type[Any]) -> dict[str, Any]:
    """The resolved type of each field that the constructor takes."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def presets(cls: type[Any], instance: Any = None) -> dict[str, Any]:
    """What each field holds when nobody sets it: the instance's value, else the default, else MISSING."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        if not field.init:
            continue
        if instance is not None:
            found[field.name] = getattr(instance, field.name)
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = field.default
    return found


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), anything else as (itself, False)."""
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        if len(members) == 1:
            return members[0], True
    return annotation, False


def item_types(annotation: Any, count: int) -> tuple[Any, ...]:
    """The types of a tuple's items; `count` of them where the tuple takes any number."""
    arguments = get_args(annotation)
    return (arguments[0],) * count if arguments[-1] is Ellipsis else arguments


def type_name(annotation: Any) -> str:
    """A field's type as help and errors word it."""
    inner, optional = without_none(annotation)
    if is_dataclass(inner):
        name = "section"
    elif get_origin(inner) is Literal:
        name = "|".join(map(shown, get_args(inner)))
    elif get_origin(inner) is tuple:
        name = "list of " + ", ".join(type_name(item) for item in get_args(inner) if item is not Ellipsis)
    elif inner in SCALARS:
        name = SCALARS[inner]
    else:
        raise TypeError(f"a config field cannot be of type {annotation!r}")
    return f"{name} or none" if optional else name


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def option_name(key: str) -> str:
    """A field's key as the command line writes it, without the leading dashes."""
    return key.replace("_", "-")


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The string literal that follows each field, by dotted key, as one line."""
    own: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            own |= _literals_after_fields(base)
    docs: dict[str, str] = {}
    for name, annotation in field_types(cls).items():
        if name in own:
            docs[name] = own[name]
        section = without_none(annotation)[0]
        if is_dataclass(section):
            docs |= {f"{name}.{key}": text for key, text in field_docs(cast(type, section)).items()}
    return docs


def _literals_after_fields(cls: type[Any]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:  # installed without sources: help then goes without sentences
        return {}
    docs: dict[str, str] = {}
    for field, after in pairwise(cast(ast.ClassDef, tree.body[0]).body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
            case _:
                pass
    return docs
