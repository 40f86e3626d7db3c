"""Hooks on a compiled model: one that is added after the first call is honoured, and so is its removal.

torch's own module hooks are not (dynamo skips them by default when added late), which is why a hook point
is a plain object that dynamo guards on. Backend "eager" shows dynamo's part, "aot_eager" AOTAutograd's too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mdlm_interp.errors import HookError

NAME = "blocks.0.hook_resid_mid"

pytestmark = [
    pytest.mark.usefixtures("unchecked", "fresh_compiler"),
    # dynamo itself looks at it, where a hook's checks break the graph in two.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def fresh_compiler(caplog) -> Iterator[None]:
    caplog.set_level(logging.ERROR, logger="torch")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(make_model, small_config):
    return make_model(replace(small_config, n_blocks=1))


@pytest.fixture
def compiled(model, ids, sigma, request):
    """`model` compiled, and called once with nobody listening."""
    compiled = torch.compile(model, backend=getattr(request, "param", "eager"))
    compiled(ids, sigma)
    return compiled


both_backends = pytest.mark.parametrize("compiled", ["eager", "aot_eager"], indirect=True)


def halve(tensor: Tensor, hook: object) -> Tensor:
    return tensor * 0.5


def halve_in_place(tensor: Tensor, hook: object) -> None:
    tensor.mul_(0.5)


@both_backends
def test_a_late_capture_is_honoured(model, compiled, ids, sigma):
    """Exact against the same pass without the compiler: these backends run torch's own kernels."""
    found: dict[str, Tensor] = {}

    def keep(tensor, hook):
        found[hook.name] = tensor.clone()

    names = [NAME, "blocks.0.ln1.hook_scale", "blocks.0.attn.hook_pattern"]
    with model.hooks(dict.fromkeys(names, keep), read_only=True):
        compiled(ids, sigma)
    _, expected = model.run_with_cache(ids, names, timesteps=sigma)
    assert found.keys() == set(names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


@both_backends
@pytest.mark.parametrize("edit", [halve, halve_in_place])
@pytest.mark.parametrize("name", [NAME, "blocks.0.ln2.hook_scale"])
def test_a_late_edit_is_honoured_and_so_is_its_removal(model, compiled, ids, sigma, name, edit):
    plain = compiled(ids, sigma)
    with model.hooks({name: edit}):
        edited = compiled(ids, sigma)
        expected = model(ids, sigma)
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, plain)
    assert torch.equal(compiled(ids, sigma), plain)


def test_a_second_function_at_a_point_that_was_compiled_with_one_is_honoured(model, compiled, ids, sigma):
    with model.hooks({NAME: halve}):
        once = compiled(ids, sigma)
        with model.hooks({NAME: lambda tensor, hook: -tensor}):
            twice = compiled(ids, sigma)
        assert torch.equal(compiled(ids, sigma), once)
    assert not torch.equal(once, twice)


def test_every_one_of_many_different_functions_is_honoured(model, compiled, ids, sigma):
    """More than dynamo recompiles for before it gives up and runs the code as it stands."""
    for number in range(12):
        with model.hooks({NAME: lambda tensor, hook, number=number: tensor * number}):
            found, expected = compiled(ids, sigma), model(ids, sigma)
        assert torch.equal(found, expected), number


@pytest.mark.parametrize(
    ("function", "read_only", "message"),
    [
        (
            lambda tensor, hook: tensor[:1],
            False,
            r"the hook on blocks.0.hook_resid_mid returned shape \(1, 7, 24\)",
        ),
        (halve, True, "a read-only hook on blocks.0.hook_resid_mid returned a value"),
        (halve_in_place, True, "a read-only hook on blocks.0.hook_resid_mid wrote to its tensor"),
    ],
)
def test_a_broken_rule_is_the_same_error(
    model, compiled, ids, sigma, listening, function, read_only, message
):
    plain = compiled(ids, sigma)
    with pytest.raises(HookError, match=message), model.hooks({NAME: function}, read_only=read_only):
        compiled(ids, sigma)
    assert listening(model) == 0
    assert torch.equal(compiled(ids, sigma), plain)


def test_a_model_compiled_in_place_fills_its_cache(model, ids, sigma):
    expected, uncompiled = model.run_with_cache(ids, NAME, timesteps=sigma)
    model.compile(backend="eager")
    model(ids, sigma)
    logits, cache = model.run_with_cache(ids, NAME, timesteps=sigma)
    assert torch.equal(logits, expected)
    assert all(torch.equal(cache[name], uncompiled[name]) for name in uncompiled)


def test_a_model_that_nobody_listens_to_is_one_graph(model, ids, sigma):
    """Behavioural: `fullgraph` raises at the first thing that dynamo cannot trace."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, sigma), model(ids, sigma))
