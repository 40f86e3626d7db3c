"""Named hook points: read or replace any intermediate of the forward pass.

A `HookPoint` is a plain object that the forward calls with a tensor. With nobody listening it returns
the tensor after one truth test, so the network costs what it costs without hooks, and because listeners
are ordinary Python state (not torch module hooks, which a compiled model skips silently when they are
added late) torch.compile guards on them and recompiles.

Rules that keep numbers honest:
- an editing function gets a private copy, so writing in place cannot reach a tensor cached elsewhere;
- what it returns must have the same shape, dtype and device;
- a name that matches nothing is an error, never an empty result;
- a context removes exactly what it installed, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from inspect import signature
from typing import TypeAlias

import torch
from torch import Tensor

from mdlm_interp.errors import HookError, nearest

HookFunction: TypeAlias = "Callable[[Tensor, HookPoint], Tensor | None]"
NameSelection: TypeAlias = "str | Iterable[str] | Callable[[str], bool] | None"

EXAMPLE = "model.hooks({'blocks.0.hook_mlp_out': lambda tensor, hook: 0 * tensor})"
"""What an error about hooks shows as the right way."""


class _Listener:
    """One registration; its identity is what the owner removes."""

    def __init__(self, function: HookFunction, read_only: bool) -> None:
        self.function = function
        self.read_only = read_only


class HookPoint:
    """A named place in the forward pass that a tensor goes through."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.listeners: list[_Listener] = []

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, {len(self.listeners)} listening)"

    def __deepcopy__(self, memo: dict[int, object]) -> HookPoint:
        # A copied model has nobody listening: the contexts that installed functions know only the original.
        return HookPoint(self.name)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor as its listeners leave it."""
        if not self.listeners:
            return tensor
        return self._pass(tensor)[0]

    def run(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """The tensor as its listeners leave it, and whether that is another one than went in."""
        left, replaced = self._pass(tensor)
        return left, replaced or (left is not tensor and not torch.equal(left, tensor))

    def _pass(self, tensor: Tensor) -> tuple[Tensor, bool]:
        replaced = False
        for listener in tuple(self.listeners):
            if listener.read_only:
                self._observe(listener, tensor)
                continue
            # The copy goes on even if nothing was returned: it has whatever was written to it, by any means
            # (a write through .data, numpy or in inference mode leaves no trace that could be asked for).
            private = tensor.clone()
            result = listener.function(private, self)
            if result is not None:
                self._check(result, tensor)
                replaced = True
            tensor = private if result is None else result
        return tensor, replaced

    def _observe(self, listener: _Listener, tensor: Tensor) -> None:
        # Inference tensors have no version counter: there a forbidden write goes unnoticed.
        versioned = not tensor.is_inference()
        before = tensor._version if versioned else 0
        if listener.function(tensor, self) is not None:
            raise HookError(
                f"a read-only hook on {self.name} returned a value; install it without read_only to edit"
            )
        if versioned and tensor._version != before:
            raise HookError(
                f"a read-only hook on {self.name} wrote to its tensor; install it without read_only to edit"
            )

    def _check(self, result: object, tensor: Tensor) -> None:
        if not isinstance(result, Tensor):
            raise HookError(
                f"the hook on {self.name} must return a tensor or None, got {type(result).__name__}"
            )
        for what in ("shape", "dtype", "device"):
            got, expected = getattr(result, what), getattr(tensor, what)
            if got != expected:
                show = tuple if what == "shape" else str
                raise HookError(
                    f"the hook on {self.name} returned {what} {show(got)}, expected {show(expected)}"
                )


def select_names(selection: NameSelection, known: Sequence[str]) -> list[str]:
    """The known names that a selection means, in execution order.

    Args:
        selection: A name or glob (`*`, `?`), several of them, a predicate on names, or None for all.
    Raises:
        HookError: If any part of the selection matches nothing.
    """
    if selection is None:
        return list(known)
    if callable(selection):
        chosen = [name for name in known if selection(name)]
        if not chosen:
            raise HookError(
                f"the predicate matches none of the {len(known)} hook points, such as {known[0]!r}"
            )
        return chosen
    patterns = [selection] if isinstance(selection, str) else list(selection)
    if not patterns:
        raise HookError("no hook point was named; pass None for all of them")
    chosen_set: set[str] = set()
    for pattern in patterns:
        check_name(pattern)
        matched = {name for name in known if fnmatchcase(name, pattern)}
        if not matched:
            raise HookError(f"no hook point matches {pattern!r}{nearest(pattern, known)}")
        chosen_set |= matched
    return [name for name in known if name in chosen_set]


def check_function(function: object, name: str) -> None:
    """Raise HookError unless something can be called as a hook is: with the tensor and the hook point."""
    if not callable(function):
        raise HookError(
            f"the hook for {name!r} must be a function or several, got {_kind(function)}; write {EXAMPLE}"
        )
    try:
        taken = signature(function)
    except (ValueError, TypeError):  # some built-in functions do not say what they take
        return
    try:
        taken.bind(None, None)
    except TypeError:
        called = getattr(function, "__name__", type(function).__name__)
        raise HookError(
            f"the hook for {name!r} is called with two arguments, the tensor and the hook point, "
            f"got {called}{taken}; write {EXAMPLE}"
        ) from None


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def check_name(name: object) -> None:
    """Raise HookError unless it is text, as every name and glob is."""
    if not isinstance(name, str):
        raise HookError(
            f"a hook point is named by text such as 'hook_embed' or '*.hook_mlp_out', got {name!r}"
        )


class HookRegistry:
    """All hook points of one model, by name, in execution order."""

    def __init__(self, points: Iterable[HookPoint]) -> None:
        self.points = {point.name: point for point in points}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in execution order."""
        return tuple(self.points)

    @contextmanager
    def listening(
        self, functions: Mapping[str, HookFunction | Sequence[HookFunction]], read_only: bool = False
    ) -> Iterator[None]:
        """Install functions on the points that their names or globs match; remove exactly those at exit.

        Raises:
            HookError: If a name matches nothing, before anything is installed.
        """
        if not isinstance(functions, Mapping):
            raise HookError(
                f"hooks must map hook names or globs to functions, got {_kind(functions)}; write {EXAMPLE}"
            )
        plan: list[tuple[HookPoint, _Listener]] = []
        checked: set[int] = set()
        for pattern, given in functions.items():
            check_name(pattern)
            # A cache of everything installs one function by hundreds of full names: no search, and one check.
            names = [pattern] if pattern in self.points else select_names(pattern, self.names)
            chosen = given if isinstance(given, Sequence) else [given]
            for function in chosen:
                if id(function) not in checked:
                    check_function(function, pattern)
                    checked.add(id(function))
            plan += [
                (self.points[name], _Listener(function, read_only)) for name in names for function in chosen
            ]
        try:
            for point, listener in plan:
                point.listeners.append(listener)
            yield
        finally:
            for point, listener in plan:
                # Another context may have installed an equal function: remove this registration only.
                point.listeners[:] = [present for present in point.listeners if present is not listener]


def _full_name(key: str | tuple[str, int]) -> str:
    return key if isinstance(key, str) else f"blocks.{key[1]}.{key[0]}"


class _NotCachedError(HookError, KeyError):
    """A KeyError too, which `get` and other methods of a mapping rely on."""

    __str__ = Exception.__str__  # KeyError's own would quote the message


class ActivationCache(Mapping[str, Tensor]):
    """Activations of one forward pass, by hook name, in execution order.

    `cache["blocks.3.hook_mlp_out"]` and `cache["hook_mlp_out", 3]` are the same tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name = _full_name(key)
        if name not in self._tensors:
            raise _NotCachedError(f"the cache holds no {name!r}{nearest(name, self._tensors)}")
        return self._tensors[name]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and _full_name(key) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations: {', '.join(self)})"
