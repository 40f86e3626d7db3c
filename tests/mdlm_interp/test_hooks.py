"""Hook points: which there are, when they fire, how the values at them relate."""

from __future__ import annotations

import pytest
import torch

from mdlm_interp.arithmetic import NativeArithmetic
from mdlm_interp.errors import DataError, HookError

B, P, D, H, E, M, C, V = 2, 7, 24, 3, 8, 96, 10, 41  # of the `model` and `ids` fixtures

OUTSIDE_BLOCKS = {
    "hook_embed": (B, P, D),
    "hook_cond": (B, C),
    "adaln_final.hook_shift": (B, 1, D),
    "adaln_final.hook_scale": (B, 1, D),
    "ln_final.hook_scale": (B, P, 1),
    "ln_final.hook_normalized": (B, P, D),
    "hook_final_in": (B, P, D),
    "hook_logits": (B, P, V),
}
PER_BLOCK = {
    "hook_resid_pre": (B, P, D),
    "hook_resid_mid": (B, P, D),
    "hook_resid_post": (B, P, D),
    "adaln.hook_shift_attn": (B, 1, D),
    "adaln.hook_scale_attn": (B, 1, D),
    "adaln.hook_gate_attn": (B, 1, D),
    "adaln.hook_shift_mlp": (B, 1, D),
    "adaln.hook_scale_mlp": (B, 1, D),
    "adaln.hook_gate_mlp": (B, 1, D),
    "ln1.hook_scale": (B, P, 1),
    "ln1.hook_normalized": (B, P, D),
    "ln2.hook_scale": (B, P, 1),
    "ln2.hook_normalized": (B, P, D),
    "attn.hook_in": (B, P, D),
    "attn.hook_q": (B, P, H, E),
    "attn.hook_k": (B, P, H, E),
    "attn.hook_v": (B, P, H, E),
    "attn.hook_rot_q": (B, P, H, E),
    "attn.hook_rot_k": (B, P, H, E),
    "attn.hook_z": (B, P, H, E),
    "attn.hook_attn_scores": (B, H, P, P),
    "attn.hook_pattern": (B, H, P, P),
    "attn.hook_out": (B, P, D),
    "hook_attn_out": (B, P, D),
    "mlp.hook_in": (B, P, D),
    "mlp.hook_pre": (B, P, M),
    "mlp.hook_post": (B, P, M),
    "mlp.hook_out": (B, P, D),
    "hook_mlp_out": (B, P, D),
}
"""DESIGN's table, written out apart from the code that is tested."""

TABLE = OUTSIDE_BLOCKS | {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in PER_BLOCK.items()}


class CountingArithmetic(NativeArithmetic):
    """Counts how often the explicit attention path is taken."""

    softmaxes = 0

    def softmax(self, scores):
        self.softmaxes += 1
        return super().softmax(scores)


def test_the_hook_points_are_those_of_the_table_with_its_shapes(model, cache):
    assert set(model.hook_names) == set(TABLE)
    assert {name: tuple(tensor.shape) for name, tensor in cache.items()} == TABLE


def test_every_hook_fires_exactly_once_in_the_order_of_hook_names(model, ids, sigma):
    fired: list[str] = []
    with model.hooks({"*": lambda tensor, hook: fired.append(hook.name)}):
        model(ids, sigma)
    assert tuple(fired) == model.hook_names


@pytest.mark.parametrize("point", ["attn_scores", "pattern"])
def test_scores_and_pattern_are_computed_only_for_a_listener(make_model, ids, sigma, point):
    arithmetic = CountingArithmetic()
    model = make_model(arithmetic=arithmetic)
    model(ids, sigma)
    model.run_with_cache(ids, lambda name: "scores" not in name and "pattern" not in name, timesteps=sigma)
    assert arithmetic.softmaxes == 0
    model.run_with_cache(ids, f"blocks.1.attn.hook_{point}", timesteps=sigma)
    assert arithmetic.softmaxes == 1  # in block 1 alone


def test_explicit_attention_agrees_with_the_fused_kernel_within_1e_5():
    """Bounded: both are float32 sums of 64 products and of 256 weighted values of order 1, so 1e-6 is
    rounding; 1e-5 is what the docstring promises."""
    q, k, v = torch.randn(3, 2, 256, 4, 64, generator=torch.Generator().manual_seed(3)).unbind()
    arithmetic = NativeArithmetic()
    explicit = arithmetic.mix(arithmetic.softmax(arithmetic.attention_scores(q, k)), v)
    worst = (explicit - arithmetic.attention(q, k, v)).abs().max()
    assert worst <= 1e-5, worst


def test_reading_the_pattern_moves_no_logit_by_more_than_1e_5(model, ids, sigma):
    """Bounded, for the same reason."""
    logits, _ = model.run_with_cache(ids, "*pattern", timesteps=sigma)
    worst = (logits - model(ids, sigma)).abs().max()
    assert worst <= 1e-5, worst


def test_patterns_are_softmaxes_of_scores_and_rows_sum_to_one(cache):
    pattern = cache["attn.hook_pattern", 0]
    assert torch.equal(pattern, cache["attn.hook_attn_scores", 0].softmax(-1))
    torch.testing.assert_close(pattern.sum(-1), torch.ones(B, H, P))


@pytest.mark.parametrize("training", [False, True])
def test_the_residual_stream_is_the_bitwise_sum_of_its_parts(model, ids, sigma, training):
    """Exact, also with dropout, which acts before the points that are added."""
    cache = model.train(training).run_with_cache(ids, timesteps=sigma)[1]
    for i in range(2):
        before = cache["hook_embed"] if i == 0 else cache["hook_resid_post", i - 1]
        assert torch.equal(cache["hook_resid_pre", i], before)
        assert torch.equal(cache["hook_resid_mid", i], cache["hook_resid_pre", i] + cache["hook_attn_out", i])
        assert torch.equal(cache["hook_resid_post", i], cache["hook_resid_mid", i] + cache["hook_mlp_out", i])


def test_gates_and_modulation_relate_their_neighbours_exactly(cache):
    for i in range(2):
        for branch, norm in (("attn", "ln1"), ("mlp", "ln2")):
            gate, scale, shift = (
                cache[f"adaln.hook_{part}_{branch}", i] for part in ("gate", "scale", "shift")
            )
            assert torch.equal(cache[f"hook_{branch}_out", i], gate * cache[f"{branch}.hook_out", i])
            modulated = cache[f"{norm}.hook_normalized", i] * (1 + scale) + shift
            assert torch.equal(cache[f"{branch}.hook_in", i], modulated)


def test_the_scale_is_the_inverse_standard_deviation(cache):
    """Bounded: one kernel against the formula, rounding of a few units in the last place."""
    x = cache["hook_resid_mid", 1]
    torch.testing.assert_close(
        cache["ln2.hook_scale", 1], (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    )


def test_dropout_acts_in_training_only(model, ids, sigma):
    assert torch.equal(model(ids, sigma), model(ids, sigma))
    model.train()
    assert not torch.equal(model(ids, sigma), model(ids, sigma))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_stop_at_block_returns_what_that_block_would_have_read_and_skips_the_rest(model, ids, sigma, stop):
    """Exact."""
    fired: list[str] = []
    _, whole = model.run_with_cache(ids, "*resid*", timesteps=sigma)
    with model.hooks({"*": lambda _, hook: fired.append(hook.name)}):
        model(ids, sigma, stop_at_block=stop)
    assert fired == list(model.hook_names[: 2 + stop * len(PER_BLOCK)])
    stopped, partial = model.run_with_cache(
        ids, ["hook_cond", *(["*resid*"] if stop else [])], timesteps=sigma, stop_at_block=stop
    )
    assert torch.equal(stopped, whole["hook_resid_pre", stop] if stop < 2 else whole["hook_resid_post", 1])
    assert list(partial) == ["hook_cond", *list(whole)[: 3 * stop]]
    assert all(torch.equal(partial[name], whole[name]) for name in list(partial)[1:])


@pytest.mark.parametrize("stop", [-1, 3, True])
def test_stop_at_block_outside_the_model_is_an_error(model, ids, sigma, stop):
    for call in (model, model.run_with_cache):
        with pytest.raises(DataError, match=rf"stop_at_block must be a whole number in \[0, 2\], got {stop}"):
            call(ids, timesteps=sigma, stop_at_block=stop)


@pytest.mark.parametrize(
    ("names", "late"),
    [
        ("hook_logits", "hook_logits"),
        (["hook_embed", "blocks.1.hook_mlp_out"], "blocks.1.hook_mlp_out"),
        (["*hook_resid_pre", "hook_final_in"], "hook_final_in"),
        (lambda name: "final" in name, "hook_final_in"),
    ],
)
def test_a_name_that_lies_beyond_stop_at_block_is_an_error(model, ids, sigma, names, late):
    with pytest.raises(HookError, match=f"stop_at_block=1 ends the pass before {late}; raise it or drop it"):
        model.run_with_cache(ids, names, timesteps=sigma, stop_at_block=1)


def test_a_glob_that_reaches_beyond_stop_at_block_caches_what_is_reached(model, ids, sigma):
    _, cache = model.run_with_cache(ids, "blocks.*.hook_resid_pre", timesteps=sigma, stop_at_block=1)
    assert list(cache) == ["blocks.0.hook_resid_pre"]
