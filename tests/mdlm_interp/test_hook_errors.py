"""Hooks that cannot be right: refused when installed, with the rule, what came, and an example that works."""

from __future__ import annotations

import functools
from collections import UserDict

import pytest
import torch

from mdlm_interp.errors import HookError
from mdlm_interp.hooks import EXAMPLE

NAME = "blocks.0.hook_mlp_out"


def refusal(model, functions) -> str:
    """What installing says; nothing is installed then."""
    with pytest.raises(HookError) as caught, model.hooks(functions):
        raise AssertionError("these were installed")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def nothing_stays(model, listening):
    yield
    assert listening(model) == 0


def test_the_example_in_the_messages_runs_and_edits(model, ids, sigma):
    context = eval(EXAMPLE, {"model": model})  # noqa: S307  (our own text)
    with context:
        _, cache = model.run_with_cache(ids, NAME, timesteps=sigma)
    assert not cache[NAME].any()


@pytest.mark.parametrize(
    ("functions", "got"),
    [
        ([(NAME, print)], "list"),
        (None, "None"),
        (NAME, "str"),
        (print, "builtin_function_or_method"),
        ({NAME}, "set"),
    ],
    ids=["pairs", "none", "name", "function", "set"],
)
def test_what_is_no_mapping_of_names_is_refused(model, unchecked, functions, got):
    assert refusal(model, functions) == (
        f"hooks must map hook names or globs to functions, got {got}; write {EXAMPLE}"
    )


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (None, "None"),
        (3, "int"),
        ([3], "int"),
        ([print, None], "None"),
        ("print", "str"),
        (torch.zeros(1), "Tensor"),
    ],
    ids=str,
)
def test_a_hook_that_is_no_function_is_refused(model, unchecked, function, got):
    assert refusal(model, {"hook_cond": print, NAME: function}) == (
        f"the hook for '{NAME}' must be a function or several, got {got}; write {EXAMPLE}"
    )


def one(tensor):
    return tensor


def three(tensor, hook, scale):
    return tensor


def named(*, tensor, hook):
    return tensor


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (one, "one(tensor)"),
        (three, "three(tensor, hook, scale)"),
        (named, "named(*, tensor, hook)"),
        (lambda: None, "<lambda>()"),
        (functools.partial(one, None), "partial()"),
        ([print, one], "one(tensor)"),
    ],
    ids=["one", "three", "named", "none", "partial", "list"],
)
def test_a_function_that_does_not_take_two_arguments_is_refused(model, unchecked, function, shown):
    assert refusal(model, {NAME: function}) == (
        f"the hook for '{NAME}' is called with two arguments, the tensor and the hook point, got {shown}; "
        f"write {EXAMPLE}"
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda tensor, hook: None,
        lambda tensor, hook, scale=2: None,
        lambda *arguments: None,
        functools.partial(three, scale=2),
        print,
        torch.add,  # does not say what it takes
        torch.nn.Identity(),
    ],
    ids=["two", "more with a default", "any", "partial", "print", "torch.add", "module"],
)
def test_whatever_takes_two_arguments_is_taken(model, function):
    with model.hooks(UserDict({NAME: function})):
        pass


@pytest.mark.parametrize("key", [3, None, ("hook_mlp_out", 0)], ids=str)
def test_a_name_that_is_no_text_is_refused(model, unchecked, key):
    assert refusal(model, {key: print}) == (
        f"a hook point is named by text such as 'hook_embed' or '*.hook_mlp_out', got {key!r}"
    )
