"""A package's public names, loaded when first used, so that importing the package costs nothing.

    if TYPE_CHECKING:  # what type checkers and editors read; they report any other name
        from package.model import Model
    else:
        __getattr__, __dir__ = lazily(__name__, {"Model": "package.model"})

    __all__ = ["Model"]

A test holds the two lists to each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        homes: The module of each name that is loaded when first used; the package itself for its own modules.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            return import_module(f"{package}.{name}")
        return getattr(import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names
