"""Functions that change an activation: what takes effect, what never leaks, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdlm_interp.config import MDLMConfig
from mdlm_interp.errors import HookError
from mdlm_interp.model import all_hook_names

NAMES = all_hook_names(2)
EXPLICIT = ("attn.hook_attn_scores", "attn.hook_pattern")
"""Points whose listeners make attention explicit, which by itself changes bits (see test_hooks)."""


def noised(tensor: Tensor, hook: object) -> Tensor:
    # A constant would not do: softmax ignores what it adds to every key.
    return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)).to(
        tensor.dtype
    )


def unhooked(model, ids, sigma, name: str):
    """The logits when someone only looks at this point."""
    return model.run_with_cache(ids, name, timesteps=sigma)[0]


@pytest.mark.parametrize("name", NAMES)
def test_replacing_at_any_point_changes_the_logits(model, ids, sigma, name):
    """Behavioural: the returned tensor is what the rest of the network reads."""
    with model.hooks({name: noised}):
        edited = model(ids, sigma)
    assert (edited - unhooked(model, ids, sigma, name)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_replacement_leaves_the_logits_bitwise_unchanged(model, ids, sigma, name):
    """Exact, but bounded at a LayerNorm's scale: with a given scale its output is computed by the formula
    and no longer by the fused kernel. 1e-4 is that rounding (1e-7) times what this network amplifies."""
    expected = unhooked(model, ids, sigma, name)
    with model.hooks({name: lambda tensor, hook: tensor}):
        found = model(ids, sigma)
    if "ln" in name and name.endswith("hook_scale"):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    else:
        assert torch.equal(found, expected)


def test_looking_at_every_point_changes_no_bit(model, ids, sigma):
    """Exact, for functions that may edit but do not; scores are looked at in both runs."""
    seen: list[str] = []
    with model.hooks({"*": lambda tensor, hook: seen.append(hook.name)}):
        looked = model(ids, sigma)
    assert seen == NAMES
    assert torch.equal(looked, unhooked(model, ids, sigma, "*hook_attn_scores"))


def write(tensor: Tensor, hook: object) -> None:
    tensor[:, 1:].mul_(0.5)


def write_through_data(tensor: Tensor, hook: object) -> None:
    tensor.data[:, 1:] *= 0.5


def write_through_numpy(tensor: Tensor, hook: object) -> None:
    tensor.detach().numpy()[:, 1:] *= 0.5


def replace_by_half(tensor: Tensor, hook: object) -> Tensor:
    return torch.cat((tensor[:, :1], tensor[:, 1:] * 0.5), dim=1)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("written", [write, write_through_data, write_through_numpy])
@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.ln1.hook_scale", "blocks.0.attn.hook_v", "blocks.0.hook_mlp_out"]
)
def test_writing_in_place_and_returning_nothing_is_the_same_as_replacing(
    model, ids, sigma, name, written, mode
):
    """Exact."""
    with mode():
        with model.hooks({name: replace_by_half}):
            expected = model(ids, sigma)
        with model.hooks({name: written}):
            found = model(ids, sigma)
        assert torch.equal(found, expected)
        assert not torch.equal(found, model(ids, sigma))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("clone", [True, False])
def test_a_write_never_reaches_a_tensor_that_was_cached_before_it(model, ids, sigma, clone, mode):
    """Exact. The looking function holds the live tensor, which an editing one never gets."""
    name = "blocks.0.hook_resid_mid"
    held: dict[str, Tensor] = {}

    def look(tensor, hook):
        held[hook.name] = tensor.clone() if clone else tensor

    with mode():
        _, clean = model.run_with_cache(ids, name, timesteps=sigma)
        with model.hooks({name: look}, read_only=True), model.hooks({name: write}):
            model(ids, sigma)
        assert torch.equal(held[name], clean[name])


def test_a_function_that_keeps_its_tensor_and_returns_it_is_safe_from_later_writes(model, ids, sigma):
    kept: list[Tensor] = []

    def keep(tensor, hook):
        kept.append(tensor)
        return tensor

    with model.hooks({"hook_embed": [keep, write]}):
        model(ids, sigma)
    assert torch.equal(kept[0], unhooked_embedding(model, ids))


def unhooked_embedding(model, ids):
    return model.run_with_cache(ids, "hook_embed", timesteps=torch.zeros(2))[1]["hook_embed"]


def test_patching_from_another_cache_does_not_let_writes_into_it(model, ids, sigma):
    donor = model.run_with_cache(ids.flip(0), "hook_embed", timesteps=sigma)[1]
    before = donor["hook_embed"].clone()
    with model.hooks({"hook_embed": [lambda tensor, hook: donor[hook.name], write]}):
        model(ids, sigma)
    assert torch.equal(donor["hook_embed"], before)


def test_a_cache_shows_activations_as_earlier_edits_leave_them(model, ids, sigma):
    """Exact, at the edited point and after it."""
    with model.hooks({"blocks.0.hook_attn_out": lambda tensor, hook: tensor * 0}):
        _, cache = model.run_with_cache(ids, "blocks.0.hook_*", timesteps=sigma)
    assert not cache["hook_attn_out", 0].any()
    assert torch.equal(cache["hook_resid_mid", 0], cache["hook_resid_pre", 0])


def test_functions_at_one_point_run_in_the_order_of_installation(model, ids, sigma):
    order: list[str] = []
    first, second, third = (lambda tensor, hook, tag=tag: order.append(tag) for tag in "abc")
    with model.hooks({"hook_embed": [first, second]}), model.hooks({"hook_*": third}):
        model(ids, sigma)
    assert "".join(order) == "abcccc"  # `hook_*` also matches cond, final_in and logits


def test_editing_the_scale_recomputes_the_norm_with_it(model, ids, sigma):
    """Bounded by rounding: without its mean, a tensor times twice the scale is twice the output."""
    name = "blocks.0.ln2.hook_normalized"
    expected = 2 * model.run_with_cache(ids, name, timesteps=sigma)[1][name]
    with model.hooks({"blocks.0.ln2.hook_scale": lambda tensor, hook: 2 * tensor}):
        found = model.run_with_cache(ids, name, timesteps=sigma)[1][name]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda tensor, hook: tensor[:1], r"returned shape (1, 7, 24), expected (2, 7, 24)"),
        (lambda tensor, hook: tensor.flatten(1), r"returned shape (2, 168), expected (2, 7, 24)"),
        (lambda tensor, hook: tensor.double(), "returned dtype torch.float64, expected torch.float32"),
        (lambda tensor, hook: tensor.to("meta"), "returned device meta, expected cpu"),
        (lambda tensor, hook: tensor.detach().numpy(), "must return a tensor or None, got ndarray"),
        (lambda tensor, hook: (tensor,), "must return a tensor or None, got tuple"),
        (lambda tensor, hook: True, "must return a tensor or None, got bool"),
    ],
    ids=["shape", "rank", "dtype", "device", "ndarray", "tuple", "bool"],
)
def test_a_wrong_return_is_an_error_that_names_the_hook_point(model, ids, sigma, wrong, message):
    with pytest.raises(HookError) as caught, model.hooks({"blocks.1.mlp.hook_in": wrong}):
        model(ids, sigma)
    assert str(caught.value) == f"the hook on blocks.1.mlp.hook_in {message}"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.ln1.hook_scale", "blocks.1.attn.hook_pattern"])
def test_a_read_only_function_that_writes_is_an_error(model, ids, sigma, name, mode):
    with mode(), pytest.raises(HookError) as caught, model.hooks({name: write_detached}, read_only=True):
        model(ids, sigma)
    assert str(caught.value) == (
        f"a read-only hook on {name} wrote to its tensor; install it without read_only to edit"
    )


def write_detached(tensor: Tensor, hook: object) -> None:
    tensor.detach().mul_(0.5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_read_only_function_that_returns_is_an_error(model, ids, sigma, mode):
    with mode(), pytest.raises(HookError) as caught, model.hooks({"hook_cond": noised}, read_only=True):
        model(ids, sigma)
    assert str(caught.value) == (
        "a read-only hook on hook_cond returned a value; install it without read_only to edit"
    )


def test_a_read_only_function_gets_the_live_tensor(model, ids, sigma):
    seen: list[int] = []
    with model.hooks({"blocks.*.hook_resid_p*": lambda x, _: seen.append(x.data_ptr())}, read_only=True):
        model(ids, sigma)
    assert seen[1] == seen[2]  # one block's output is the next one's input


def test_a_model_without_blocks_still_has_its_other_points(make_model):
    model = make_model(MDLMConfig(vocab_size=9, hidden_dim=8, cond_dim=4, n_blocks=0, n_heads=2))
    tokens = torch.arange(9)[None]
    _, cache = model.run_with_cache(tokens)
    assert list(cache) == all_hook_names(0)
    assert torch.equal(model(tokens, stop_at_block=0), cache["hook_embed"])
