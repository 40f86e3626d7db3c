"""`run_with_cache`: what names select, what the cache holds and whose memory that is."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from mdlm_interp.errors import HookError


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("hook_embed", ["hook_embed"]),
        ("blocks.*.hook_mlp_out", ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]),
        ("blocks.?.mlp.hook_in", ["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in"]),
        (["hook_logits", "hook_embed"], ["hook_embed", "hook_logits"]),
        (
            ["*1.hook_resid_pre", "blocks.1.*resid*"],
            [f"blocks.1.hook_resid_{at}" for at in ("pre", "mid", "post")],
        ),
        (lambda name: name.endswith("hook_z"), ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]),
        ((name for name in ("hook_cond",)), ["hook_cond"]),
        (None, None),
    ],
    ids=[
        "name",
        "glob",
        "question mark",
        "list",
        "overlapping globs",
        "predicate",
        "generator",
        "everything",
    ],
)
def test_a_cache_holds_what_was_selected_in_execution_order(model, ids, sigma, selection, expected):
    _, cache = model.run_with_cache(ids, selection, timesteps=sigma)
    assert list(cache) == (expected or list(model.hook_names))
    assert len(cache) == len(list(cache))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("hook_embd", "no hook point matches 'hook_embd'; did you mean 'hook_embed'?"),
        ("blocks.2.hook_mlp_out", "no hook point matches 'blocks.2.hook_mlp_out'; did you mean 'blocks."),
        (["hook_embed", "*.resid_pre"], "no hook point matches '*.resid_pre'; did you mean"),
        ("zzz", "no hook point matches 'zzz'; known: 'hook_embed', 'hook_cond', "),
        (lambda name: False, "the predicate matches none of the 66 hook points, such as 'hook_embed'"),
        ([], "no hook point was named; pass None for all of them"),
    ],
)
def test_a_selection_that_matches_nothing_is_an_error_with_the_nearest_name(
    model, ids, sigma, selection, message
):
    with pytest.raises(HookError) as caught:
        model.run_with_cache(ids, selection, timesteps=sigma)
    assert message in str(caught.value)


def test_an_unknown_name_is_refused_before_anything_is_installed(model, ids, sigma, listening):
    fired: list[str] = []

    def note(tensor, hook):
        fired.append(hook.name)

    with (
        pytest.raises(HookError, match="did you mean 'hook_logits'"),
        model.hooks({"*": note, "hook_logit": note}),
    ):
        model(ids, sigma)
    assert fired == []
    assert listening(model) == 0


def test_cached_tensors_share_no_memory_with_each_other_or_the_stream(model, ids, sigma):
    stream: dict[str, torch.Tensor] = {}

    def look(tensor, hook):
        stream[hook.name] = tensor

    with model.hooks({"*": look}, read_only=True):
        _, cache = model.run_with_cache(ids, timesteps=sigma)
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in cache.items()}
    shared = [pair for pair in combinations(places, 2) if places[pair[0]] == places[pair[1]]]
    assert shared == []
    assert not set(places.values()) & {tensor.untyped_storage().data_ptr() for tensor in stream.values()}
    assert all(torch.equal(cache[name], stream[name]) for name in cache)


def test_without_clone_neighbouring_entries_are_the_same_memory(model, ids, sigma):
    _, cache = model.run_with_cache(ids, timesteps=sigma, clone=False)
    assert cache["hook_resid_post", 0].data_ptr() == cache["hook_resid_pre", 1].data_ptr()
    assert (
        cache["attn.hook_q", 0].untyped_storage().data_ptr()
        == cache["attn.hook_v", 0].untyped_storage().data_ptr()
    )


def test_cached_tensors_go_to_the_device_asked_for(model, ids, sigma):
    _, cache = model.run_with_cache(ids, "*resid*", timesteps=sigma, device="meta")
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}


def test_a_cache_is_a_mapping_that_also_takes_name_and_block(cache):
    assert cache["hook_mlp_out", 1] is cache["blocks.1.hook_mlp_out"]
    assert ("hook_mlp_out", 1) in cache
    assert "blocks.1.hook_mlp_out" in cache
    assert "hook_mlp_out" not in cache
    assert 3 not in cache
    assert cache.get("hook_mlp_out") is None
    assert dict(cache).keys() == cache.keys()
    assert repr(cache).startswith("ActivationCache(66 activations: hook_embed, hook_cond, ")
    with pytest.raises(HookError) as caught:
        cache["hook_mlp_outt", 1]
    assert str(caught.value) == (
        "the cache holds no 'blocks.1.hook_mlp_outt'; did you mean 'blocks.1.hook_mlp_out'?"
    )
