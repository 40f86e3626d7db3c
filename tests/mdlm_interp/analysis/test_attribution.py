"""Contributions add up to the logit, and each is what taking its component away would change."""

from typing import Any

import pytest
import torch

from mdlm_interp.analysis import attribute_commits, attribute_logits, sigma_at
from mdlm_interp.errors import DataError

PLACES = torch.tensor([[0, 0], [1, 5], [0, 6], [1, 1]])
TOKENS = torch.tensor([7, 40, 0, 12])


@pytest.fixture
def state(trajectory):
    return trajectory.states[2], sigma_at(trajectory, 2)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("against", ["nothing", "mean"])
def test_contributions_and_constant_add_up_to_the_logit(exact, state, heads, against):
    found = attribute_logits(exact, state[0], state[1], PLACES, TOKENS, heads=heads, against=against)
    logits = exact(*state).detach()[PLACES[:, 0], PLACES[:, 1]]
    expected = logits.gather(1, TOKENS[:, None])[:, 0]
    if against == "mean":
        expected = expected - logits[:, :-1].mean(1)
    total = found.contributions.sum(1) + found.constant
    # A few hundred float64 products and sums of terms no larger than this.
    bound = 1e-13 * float(found.contributions.abs().sum(1).max())
    assert float((total - expected).abs().max()) < bound
    assert float(found.error.abs().max()) < bound
    assert bool((found.contributions.abs() > 1e-3).any(0).all())


def test_in_float32_the_parts_miss_the_logit_by_its_rounding(make_model, state):
    found = attribute_logits(make_model(), state[0], state[1], PLACES, TOKENS)
    assert 0 < float(found.error.abs().max()) < 1e-5 * float(found.contributions.abs().sum(1).max())


def without(model, state, component):
    """Change of all logits when a component is taken out of the last residual stream, the final scale frozen."""
    logits, cache = model.run_with_cache(state[0], timesteps=state[1])
    kind, *rest = component.split()
    block = int(rest[0]) if rest else 0
    if kind == "embedding":
        taken = cache["hook_embed"]
    elif "head" in rest:
        kept = torch.zeros_like(cache["attn.hook_z", block])
        kept[:, :, int(rest[-1])] = cache["attn.hook_z", block][:, :, int(rest[-1])]
        weight = model.backbone.blocks[block].attn_out.weight
        taken = (kept.flatten(-2) @ weight.T) * cache["adaln.hook_gate_attn", block]
    else:
        taken = cache[f"hook_{kind}_out", block]
    scale = cache["ln_final.hook_scale"]
    changed = {
        "blocks.1.hook_resid_post": lambda tensor, hook: tensor - taken,
        "ln_final.hook_scale": lambda tensor, hook: scale,
    }
    with model.hooks(changed):
        return logits - model(*state)


@pytest.mark.parametrize("heads", [False, True])
def test_a_contribution_is_what_the_logit_loses_without_the_component(exact, state, heads):
    found = attribute_logits(exact, state[0], state[1], PLACES, TOKENS, heads=heads)
    assert len(found.components) == (1 + 2 * (3 + 1) if heads else 1 + 2 * 2)
    for number, component in enumerate(found.components):
        lost = without(exact, state, component)[PLACES[:, 0], PLACES[:, 1], TOKENS]
        torch.testing.assert_close(found.contributions[:, number], lost, rtol=1e-9, atol=1e-11)


def test_heads_add_up_to_their_attention(exact, state):
    whole = attribute_logits(exact, state[0], state[1], PLACES, TOKENS)
    parts = attribute_logits(exact, state[0], state[1], PLACES, TOKENS, heads=True)
    for block in range(2):
        heads = [i for i, name in enumerate(parts.components) if name.startswith(f"attn {block} head")]
        at = whole.components.index(f"attn {block}")
        torch.testing.assert_close(
            parts.contributions[:, heads].sum(1), whole.contributions[:, at], rtol=1e-12, atol=1e-13
        )


def test_every_commit_is_attributed_in_the_state_it_was_drawn_from(exact, timed):
    found = attribute_commits(exact, timed, against="nothing")
    written = (timed.revealed_at >= 0).nonzero().tolist()
    assert sorted(zip(found.row.tolist(), found.position.tolist(), strict=True)) == [
        tuple(w) for w in written
    ]
    for i in range(len(found.token)):
        row, position, step = int(found.row[i]), int(found.position[i]), int(found.step[i])
        assert step == int(timed.revealed_at[row, position])
        assert int(found.token[i]) == int(timed.final[row, position])
        x, sigma = timed.states[step, row : row + 1], sigma_at(timed, step)[row : row + 1]
        one = attribute_logits(exact, x, sigma, torch.tensor([[0, position]]), found.token[i : i + 1])
        torch.testing.assert_close(found.contributions[i], one.contributions[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.logit[i], one.logit[0], rtol=1e-9, atol=1e-11)
    chosen = attribute_commits(exact, timed, rows=[1])
    assert set(chosen.row.tolist()) == {1}


def test_the_tables_hold_every_part(exact, trajectory):
    found = attribute_commits(exact, trajectory)
    table = found.table()
    assert len(table) == len(found.token) * (len(found.components) + 1)
    first = [row["contribution"] for row in table[: len(found.components) + 1]]
    assert sum(first) == pytest.approx(float(found.logit[0]), rel=1e-9)
    for row in found.summary():
        values = torch.tensor(
            [each["contribution"] for each in table if each["component"] == row["component"]]
        )
        assert row["mean"] == pytest.approx(float(values.double().mean()), rel=1e-5)
        assert row["std"] == pytest.approx(float(values.double().std(correction=0)), rel=1e-5)


@pytest.mark.parametrize(
    ("places", "tokens", "message"),
    [
        ([[2, 0]], [1], r"places' sequences must be in \[0, 2\), got 2"),
        ([[0, 9]], [1], r"places' positions must be in \[0, 9\), got 9"),
        ([[0, -1]], [1], r"places' positions must be in \[0, 9\), got -1"),
        ([[0, 0]], [41], r"tokens must be in \[0, 41\), got 41"),
    ],
)
def test_what_is_out_of_range_is_named(exact, state, places, tokens, message):
    with pytest.raises(DataError, match=message):
        attribute_logits(exact, state[0], state[1], torch.tensor(places), torch.tensor(tokens))


def test_an_unknown_reference_and_missing_tokens_are_refused(exact, state, unchecked):
    typo: Any = "means"
    with pytest.raises(DataError, match="against must be nothing or mean, got 'means'; did you mean 'mean'"):
        attribute_logits(exact, state[0], state[1], PLACES, TOKENS, against=typo)
    with pytest.raises(DataError, match="each place has one token, got 4 places and 3 tokens"):
        attribute_logits(exact, state[0], state[1], PLACES, TOKENS[:3])
