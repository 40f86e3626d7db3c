"""Every edit against a hook written by hand, to the bit unless said otherwise."""

from typing import Any

import pytest
import torch

from transcoder.feature_edits import FeatureEdit
from transcoder.interventions import Ablate, Knockout, Patch, Scale, Set, Steer, interventions

MLP = "blocks.2.hook_mlp_out"


def bits(tensor):
    return tensor.detach().view(torch.int32)


@torch.no_grad()
def by_hand(model, x, functions, timesteps=None):
    with model.hooks(functions):
        return model(x, timesteps)


@pytest.fixture(scope="module")
def other(bundled, state):
    """Another state of the same length, everything kept."""
    with torch.no_grad():
        return bundled.run_with_cache(state.flip(1))[1]


@torch.no_grad()
def test_no_edit_leaves_every_bit(bundled, beside, state):
    plain = bits(bundled(state))
    for subject in (bundled, beside):
        assert torch.equal(bits(interventions(subject, [])(state)), plain)
        compared = interventions(subject, []).compare(state)
        assert torch.equal(bits(compared.logits_before), plain)
        assert torch.equal(bits(compared.logits_after), plain)


@torch.no_grad()
@pytest.mark.parametrize("hook", ["hook_embed", MLP, "blocks.1.ln1.hook_scale", "blocks.3.attn.hook_z"])
def test_scaling_by_one_and_patching_from_the_same_run_leave_every_bit(bundled, state, hook):
    _, own = bundled.run_with_cache(state, hook)  # of everything, attention would not be the fused kernel
    plain = bits(bundled(state))
    for edit in (Scale(1.0, hook=hook), Patch(own, hook=hook, positions=[1, 4])):
        assert torch.equal(bits(interventions(bundled, [edit])(state)), plain)
        assert not torch.equal(bits(interventions(bundled, [Ablate(hook=hook)])(state)), plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("edit", "function"),
    [
        (lambda other: Ablate(hook=MLP), lambda other, t: 0 * t),
        (lambda other: Scale(-2.5, hook=MLP), lambda other, t: -2.5 * t),
        (lambda other: Set(0.75, hook=MLP), lambda other, t: torch.full_like(t, 0.75)),
        (lambda other: Steer(torch.arange(192.0), hook=MLP), lambda other, t: t + torch.arange(192.0)),
        (lambda other: Patch(other, hook=MLP), lambda other, t: other[MLP]),
    ],
)
@pytest.mark.parametrize("positions", [None, [2, 9]])
def test_an_edit_of_a_hook_point_is_the_function_by_hand(bundled, state, other, edit, function, positions):
    def hand(tensor, hook):
        changed = function(other, tensor)
        if positions is None:
            return changed
        kept = tensor.clone()
        kept[:, positions] = changed[:, positions]
        return kept

    made = edit(other)
    found = interventions(bundled, [type(made)(**{**vars(made), "positions": positions})])(state)
    assert torch.equal(bits(found), bits(by_hand(bundled, state, {MLP: hand})))
    assert not torch.equal(found, bundled(state))


@torch.no_grad()
def test_positions_may_be_a_number_several_booleans_or_a_function(bundled, state):
    mask_id = bundled.config.mask_id
    masked = (state[0] == mask_id).nonzero()[:, 0]
    forms = [masked.tolist(), masked, state == mask_id, state[0] == mask_id, lambda x: x == mask_id]
    forms += [masked.numpy(), (state == mask_id).numpy()]
    found = [interventions(bundled, [Ablate(hook=MLP, positions=form)])(state) for form in forms]
    for one in found[1:]:
        assert torch.equal(one, found[0])
    first = int(masked[0])
    one = interventions(bundled, [Ablate(hook=MLP, positions=first)])(state)
    for form in ([first], masked.numpy()[0]):
        assert torch.equal(one, interventions(bundled, [Ablate(hook=MLP, positions=form)])(state))
    assert not torch.equal(one, found[0])


@torch.no_grad()
def test_positions_of_a_pattern_are_its_queries(bundled, state):
    def zero(tensor, hook):
        tensor[:, :, [3, 5]] = 0

    name = "blocks.2.attn.hook_pattern"
    found = interventions(bundled, Ablate(hook=name, positions=[3, 5]))(state)
    assert torch.equal(found, by_hand(bundled, state, {name: zero}))


@torch.no_grad()
def test_booleans_choose_in_each_sequence_of_a_batch(bundled, state):
    x = torch.cat([state, state.flip(1)])
    where = torch.zeros(x.shape, dtype=torch.bool)
    where[1, 3] = True

    def hand(tensor, hook):
        tensor[1, 3] = 0

    found = interventions(bundled, [Ablate(hook=MLP, positions=where)])(x)
    assert torch.equal(found, by_hand(bundled, x, {MLP: hand}))
    assert torch.equal(found[0], bundled(x)[0])
    assert not torch.equal(found[1], bundled(x)[1])


@torch.no_grad()
def test_a_glob_edits_every_layer(bundled, state):
    found = interventions(bundled, [Ablate(hook="blocks.*.hook_mlp_out")])(state)
    assert torch.equal(found, by_hand(bundled, state, {"blocks.*.hook_mlp_out": lambda t, hook: 0 * t}))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Ablate, Knockout])
def test_a_head_is_a_slice_of_z(bundled, state, other, kind):
    def zero(tensor, hook):
        tensor[:, [4, 5], 2] = 0

    def patch(tensor, hook):
        tensor[:, :, 2] = other[hook.name][:, :, 2]

    name = "blocks.1.attn.hook_z"
    found = interventions(bundled, [kind(head=(1, 2), positions=[4, 5])])(state)
    assert torch.equal(found, by_hand(bundled, state, {name: zero}))
    patched = interventions(bundled, [Patch(other, head=(1, 2))])(state)
    assert torch.equal(patched, by_hand(bundled, state, {name: patch}))
    assert not torch.equal(found, bundled(state))


@torch.no_grad()
def test_a_knockout_with_renormalisation_is_a_softmax_that_does_not_see_the_keys(bundled, state):
    def unseen(tensor, hook):
        tensor[:, 1, [3, 7], 5] = -torch.inf

    found = interventions(bundled, [Knockout(edge=(2, 1), positions=[3, 7], keys=5)])(state)
    expected = by_hand(bundled, state, {"blocks.2.attn.hook_attn_scores": unseen})
    # Bounded: the sum of a row is taken in another order; logits are of size 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((found - bundled(state)).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("head", [4, None])
def test_a_knockout_without_renormalisation_is_zero_in_the_pattern(bundled, state, head):
    heads = slice(None) if head is None else slice(head, head + 1)

    def zero(tensor, hook):
        tensor[:, heads, 3, 5:7] = 0

    edit = Knockout(edge=(2, head), positions=3, keys=[5, 6], renormalise=False)
    expected = by_hand(bundled, state, {"blocks.2.attn.hook_pattern": zero})
    assert torch.equal(interventions(bundled, [edit])(state), expected)
    again = Ablate(edge=(2, head), positions=3, keys=[5, 6])
    assert torch.equal(interventions(bundled, [again])(state), expected)


@torch.no_grad()
def test_rows_that_lose_no_edge_keep_every_bit_and_the_others_sum_to_one(bundled, state):
    name = "blocks.2.attn.hook_pattern"
    _, plain = bundled.run_with_cache(state, name)
    with interventions(bundled, [Knockout(edge=(2, 1), positions=[3], keys=[5, 6])]):
        _, cut = bundled.run_with_cache(state, name)
    same = torch.ones(plain[name].shape, dtype=torch.bool)
    same[:, 1, 3] = False
    assert torch.equal(plain[name][same], cut[name][same])
    assert float(cut[name][0, 1, 3, 5:7].abs().max()) == 0.0
    assert float(cut[name][0, 1, 3].double().sum()) == pytest.approx(1.0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_an_edit_of_a_feature_is_the_hook_by_hand(beside, bundled, state, scale):
    clt, layer, at = beside.clt, 1, [4, 6]
    acts = beside.feature_acts(state)[layer]
    feature = int(acts[0, 4].argmax())
    changes = {}

    def read(tensor, hook):
        changes[layer] = (scale - 1) * clt.encode_layer(tensor, layer)[..., feature]

    def add(tensor, hook):
        target = int(hook.name.split(".")[1])
        row = clt.W_dec[layer][feature, target - layer] / clt.out_scale[target]
        tensor[:, at] += changes[layer][:, at, None] * row

    functions = {f"blocks.{layer}.mlp.hook_in": read}
    functions |= {f"blocks.{target}.hook_mlp_out": add for target in range(layer, 5)}
    expected = by_hand(bundled, state, functions)
    found = interventions(beside, [Scale(scale, feature=(layer, feature), positions=at)])(state)
    # One rounding in (scale * a - a) * row is elsewhere by hand.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((found - bundled(state)).abs().max()) > 1e-3
    with beside.edited([FeatureEdit(layer, feature, tuple(at), scale)]):
        assert torch.equal(found, bundled(state))
    if scale == 0.0:
        ablated = interventions(beside, [Ablate(feature=(layer, feature), positions=at)])(state)
        assert torch.equal(ablated, found)


@torch.no_grad()
def test_a_feature_that_is_set_has_that_activation_and_writes_its_decoder_rows(replacement, ids, sigma):
    model, clt = replacement.model, replacement.clt
    acts = replacement.feature_acts(ids, sigma)
    feature = int((acts[1, :, 5] == 0).all(0).nonzero()[0])  # silent: all that it writes is what is set
    _, plain = model.run_with_cache(ids, ["blocks.1.hook_mlp_out"], timesteps=sigma)
    for edit, value in (
        (Set(2.0, feature=(1, feature), positions=5), 2.0),
        (Steer(2.0, feature=(1, feature), positions=5), 2.0),
    ):
        with interventions(replacement, [edit]):
            _, cache = model.run_with_cache(ids, ["blocks.1.hook_mlp_out"], timesteps=sigma)
        difference = cache["hook_mlp_out", 1] - plain["hook_mlp_out", 1]
        expected = torch.zeros_like(difference)
        expected[:, 5] = value * clt.decoder_rows(1, feature)[0]
        torch.testing.assert_close(difference, expected, rtol=0, atol=1e-4)
        assert float(expected.abs().max()) > 1e-2


@torch.no_grad()
def test_a_patched_feature_has_the_other_runs_activation(replacement, active, ids, sigma):
    model = replacement.model
    _, source = model.run_with_cache(ids.flip(1), "blocks.*.mlp.hook_in", timesteps=sigma)
    value = replacement.feature_acts(ids.flip(1), sigma)[1, ..., active]
    patched = interventions(replacement, [Patch(source, feature=(1, active))])(ids, sigma)
    by_value = interventions(replacement, [Set(value, feature=(1, active))])(ids, sigma)
    torch.testing.assert_close(patched, by_value, rtol=0, atol=1e-4)
    assert float((patched - model(ids, sigma)).abs().max()) > 1e-3


@torch.no_grad()
def test_edits_of_one_feature_chain_in_order(replacement, active, ids, sigma):
    place: dict[str, Any] = {"feature": (1, active), "positions": 5}

    def run(*edits):
        return interventions(replacement, edits)(ids, sigma)

    tripled_after = run(Set(2.0, **place), Scale(3.0, **place))
    torch.testing.assert_close(tripled_after, run(Set(6.0, **place)), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        run(Scale(3.0, **place), Set(2.0, **place)), run(Set(2.0, **place)), rtol=0, atol=1e-4
    )
    assert float((tripled_after - run(Set(2.0, **place))).abs().max()) > 1e-3
    # Exact: what reaches the outputs is one change, so only what the last edit leaves counts.
    assert torch.equal(run(Scale(3.0, **place), Set(2.0, **place)), run(Set(2.0, **place)))
    assert torch.equal(run(Scale(2.0, **place), Scale(0.5, **place)), run())
    assert not torch.equal(run(Scale(2.0, **place), Scale(0.25, **place)), run())


@torch.no_grad()
def test_features_are_encoded_after_edits_of_what_the_encoder_reads(replacement, active, ids, sigma):
    hook = "blocks.1.mlp.hook_in"
    steer = Steer(0.5, hook=hook)
    feature = Ablate(feature=(1, active))
    found = interventions(replacement, [feature, steer])(ids, sigma)
    assert torch.equal(found, interventions(replacement, [steer, feature])(ids, sigma))
    # By hand: the context further out is installed first, so that encoding comes after it.
    with replacement.model.hooks({hook: lambda t, h: t + 0.5}), replacement.edited([FeatureEdit(1, active)]):
        assert torch.equal(found, replacement.model(ids, sigma))


@torch.no_grad()
def test_a_value_set_at_an_output_stands_whatever_features_write(replacement, active, ids, sigma):
    edits = [Set(0.25, hook="blocks.*.hook_mlp_out"), Set(9.0, feature=(1, active))]
    alone = interventions(replacement, edits[:1])(ids, sigma)
    assert torch.equal(interventions(replacement, edits)(ids, sigma), alone)


@torch.no_grad()
def test_the_context_acts_on_the_model_itself_and_leaves_nothing(replacement, active, ids, sigma, listening):
    model = replacement.model
    edits = [Ablate(feature=(1, active)), Knockout(edge=(0, 1), keys=3), Scale(2.0, head=(2, 0))]
    changed = interventions(replacement, edits)
    with changed:
        inside = model(ids, sigma)
        assert torch.equal(changed(ids, sigma), inside)
    assert torch.equal(changed(ids, sigma), inside)
    with pytest.raises(RuntimeError, match="stop"), changed:
        raise RuntimeError("stop")
    assert listening(model) == 0
    assert not model._forward_pre_hooks
    assert not torch.equal(inside, model(ids, sigma))


@torch.no_grad()
def test_a_pass_that_stops_half_way_leaves_nothing_for_the_next(replacement, active, ids, sigma):
    edits = [Scale(3.0, feature=(0, 1)), Scale(3.0, feature=(1, active))]
    with interventions(replacement, edits):
        expected = replacement.model(ids, sigma)
        replacement.model(ids.flip(1), sigma, stop_at_block=1)
        assert torch.equal(replacement.model(ids, sigma), expected)
