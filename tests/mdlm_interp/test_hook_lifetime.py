"""Hooks end with the context that installed them, whatever happens, and nothing outlives a run."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import DataError, HookError
from mdlm_interp.hooks import HookPoint


class HookFailedError(Exception):
    """Raised by hooks here; nothing else raises it."""


def fail(tensor, hook):
    raise HookFailedError(hook.name)


def look(tensor, hook):
    return None


def test_hooks_are_gone_after_the_block(model, ids, sigma, listening):
    """Exact: the logits afterwards are those before."""
    before = model(ids, sigma)
    with model.hooks({"*": lambda tensor, hook: tensor * 0}):
        assert listening(model) == len(model.hook_names)
        assert not model(ids, sigma).any()
    assert listening(model) == 0
    assert torch.equal(model(ids, sigma), before)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.attn.hook_pattern", "blocks.0.ln1.hook_scale", "hook_logits"]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_an_exception_in_a_hook_removes_all_of_its_context(model, ids, sigma, listening, name, read_only):
    with (
        pytest.raises(HookFailedError, match=name),
        model.hooks({"*": look, name: fail}, read_only=read_only),
    ):
        model(ids, sigma)
    assert listening(model) == 0


def test_an_exception_in_the_forward_pass_removes_them(model, ids, listening):
    for run in (lambda: model(ids), lambda: model.run_with_cache(ids)):
        with pytest.raises(DataError, match="this model is time-conditioned"), model.hooks({"*": look}):
            run()
        assert listening(model) == 0


def test_an_exception_in_the_block_removes_them(model, listening):
    with pytest.raises(KeyboardInterrupt), model.hooks({"*": look}):
        raise KeyboardInterrupt
    assert listening(model) == 0


def test_a_failing_cache_run_leaves_the_callers_hooks(model, ids, sigma, listening):
    with model.hooks({"hook_cond": look}):
        with pytest.raises(HookError), model.hooks({"hook_embed": lambda tensor, hook: 1}):
            model.run_with_cache(ids, timesteps=sigma)
        assert listening(model) == 1
    assert listening(model) == 0


def test_a_nested_context_removes_only_its_own(model, ids, sigma, listening):
    counts: Counter[str] = Counter()

    def count(tag):
        return lambda tensor, hook: counts.update([tag])

    with model.hooks({"hook_embed": count("outer")}):
        with pytest.raises(HookFailedError), model.hooks({"hook_embed": count("inner"), "hook_cond": fail}):
            model(ids, sigma)
        assert listening(model) == 1
        model.run_with_cache(ids, timesteps=sigma)
        assert listening(model) == 1
        model(ids, sigma)
    assert listening(model) == 0
    assert counts == {"outer": 3, "inner": 1}


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_one_function_installed_by_two_contexts_is_removed_once_by_each(
    model, ids, sigma, listening, leaves_first
):
    calls: list[str] = []

    def note(tensor, hook):
        calls.append(hook.name)

    contexts = [model.hooks({"hook_embed": note}), model.hooks({"hook_embed": note, "hook_cond": note})]
    for context in contexts:
        context.__enter__()
    contexts[leaves_first].__exit__(None, None, None)
    model(ids, sigma)
    assert sorted(calls) == (["hook_embed"] if leaves_first else ["hook_cond", "hook_embed"])
    contexts[1 - leaves_first].__exit__(None, None, None)
    assert listening(model) == 0


def test_a_context_started_inside_a_hook_holds_from_the_next_point_on(model, ids, sigma, listening):
    inner: list[str] = []
    context = model.hooks({"hook_*": lambda tensor, hook: inner.append(hook.name)})

    with model.hooks({"hook_cond": lambda tensor, hook: context.__enter__() and None}):
        model(ids, sigma)
    context.__exit__(None, None, None)
    assert inner == ["hook_final_in", "hook_logits"]
    assert listening(model) == 0


def test_a_thousand_runs_leave_no_listener_and_no_object(make_model, listening, unchecked):
    tiny = MDLMConfig(vocab_size=7, hidden_dim=4, cond_dim=3, n_blocks=1, n_heads=1)
    model = make_model(tiny)
    tokens = torch.tensor([[1, 6, 2]])

    def run(times: int) -> Counter[str]:
        for number in range(times):
            with model.hooks({"blocks.0.hook_attn_out": lambda tensor, hook: tensor * 2}):
                model.run_with_cache(tokens)
            if number % 10 == 0:
                with pytest.raises(HookFailedError), model.hooks({"*mlp*": fail}):
                    model(tokens)
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    before = run(50)
    after = run(1000)
    assert listening(model) == 0
    # Counts of all kinds may drift by what Python caches; what a run makes would drift by a thousand.
    grown = {kind: n - before[kind] for kind, n in after.items() if n - before[kind] >= 100}
    assert grown == {}
    assert after["Tensor"] == before["Tensor"]
    assert after["_Listener"] == 0


def test_a_dropped_cache_frees_its_tensors(model, ids, sigma):
    _, cache = model.run_with_cache(ids, "hook_embed", timesteps=sigma)
    tensor = weakref.ref(cache["hook_embed"])
    del cache
    assert tensor() is None


def test_a_deep_copy_has_nobody_listening_and_its_own_weights(model, ids, sigma, listening):
    seen: list[str] = []
    with model.hooks({"*": lambda tensor, hook: seen.append(hook.name)}):
        twin = copy.deepcopy(model)
        assert listening(twin) == 0
        with torch.no_grad():
            twin.backbone.vocab_embed.embedding.zero_()
        twin(ids, sigma)
        assert seen == []
    assert model.backbone.vocab_embed.embedding.any()


def test_a_deep_copys_hook_points_are_those_its_forward_goes_through(model, ids, sigma):
    """Exact. The points are held in several places of a model; a copy must keep them one."""
    twin = copy.deepcopy(model)
    _, cache = twin.run_with_cache(ids, timesteps=sigma)
    _, original = model.run_with_cache(ids, timesteps=sigma)
    assert list(cache) == list(twin.hook_names)
    assert all(torch.equal(cache[name], original[name]) for name in original)


def test_a_hook_point_says_its_name_and_how_many_listen(model):
    with model.hooks({"hook_embed": [look, look]}):
        assert repr(model._registry.points["hook_embed"]) == "HookPoint('hook_embed', 2 listening)"
    assert repr(HookPoint("here")) == "HookPoint('here', 0 listening)"
