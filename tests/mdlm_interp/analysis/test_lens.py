"""The logit lens against the model itself, whose last residual stream is replaced by an earlier one."""

from dataclasses import replace

import pytest
import torch

from mdlm_interp.analysis import filled, lens_logits, logit_lens, sigma_at
from mdlm_interp.diffusion import subs_log_probs

FINAL = ("blocks.1.hook_resid_post", "adaln_final.hook_shift", "adaln_final.hook_scale")
RESIDS = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_depth_is_the_models_own_logits_bit_for_bit(make_model, trajectory, dtype):
    model = make_model().to(dtype)
    for step in range(trajectory.n_steps):
        sigma = sigma_at(trajectory, step)
        logits, cache = model.run_with_cache(trajectory.states[step], FINAL, timesteps=sigma)
        assert torch.equal(lens_logits(model, *(cache[name] for name in FINAL)), logits)


def substituted(model, x, sigma, name):
    """Logits of the model if the last block left what stands at an earlier point."""
    _, cache = model.run_with_cache(x, name, timesteps=sigma)
    with model.hooks({RESIDS[-1]: lambda tensor, hook: cache[name]}):
        return model(x, sigma)


@pytest.mark.parametrize("name", ["trajectory", "timed", "revised"])
def test_every_depth_is_the_model_with_its_last_residual_stream_replaced(exact, name, request):
    trajectory = request.getfixturevalue(name)
    lens = logit_lens(exact, trajectory)
    assert lens.depths == ("embedding", "block 0", "block 1")
    for step in range(trajectory.n_steps):
        x, sigma = trajectory.states[step], sigma_at(trajectory, step)
        assert torch.equal(lens.is_masked[step], x == exact.config.mask_id)
        for depth, resid in enumerate(RESIDS):
            logits = substituted(exact, x, sigma, resid)
            expected = subs_log_probs(logits, x, exact.config.mask_id).exp()
            chance = expected.gather(-1, trajectory.final[..., None])[..., 0]
            order = expected.argsort(-1, descending=True)
            where = (order == trajectory.final[..., None]).int().argmax(-1)
            # Of a token that stands, all others tie at zero: the sorted place says nothing there.
            masked = x == exact.config.mask_id
            torch.testing.assert_close(lens.probability[step, depth], chance, rtol=1e-12, atol=0)
            assert torch.equal(lens.rank[step, depth][masked], where[masked])
            assert torch.equal(lens.top_token[step, depth], order[..., 0])
            best = expected.gather(-1, order)[..., 0]
            torch.testing.assert_close(lens.top_probability[step, depth], best, rtol=1e-12, atol=0)


def test_the_mask_is_never_predicted_and_a_standing_token_is_certain(exact, revised):
    with torch.no_grad():
        exact.backbone.output_layer.linear.bias[exact.config.mask_id] = 100.0
    assert int(exact(revised.states[0], sigma_at(revised, 0))[0, 0].argmax()) == exact.config.mask_id
    lens = logit_lens(exact, revised)
    assert not bool((lens.top_token == exact.config.mask_id).any())
    stands = (~lens.is_masked)[:, None].expand_as(lens.top_token)
    states = revised.states[:-1, None].expand_as(lens.top_token)
    assert torch.equal(lens.top_token[stands], states[stands])
    assert bool((lens.top_probability[stands] == 1).all())
    other = stands & (states != revised.final)
    assert bool(other.any())  # a token that was taken back later
    assert bool((lens.probability[other] == 0).all())
    assert bool((lens.rank[other] == 1).all())
    same = stands & (states == revised.final)
    assert bool((lens.probability[same] == 1).all())
    assert bool((lens.rank[same] == 0).all())


def test_a_position_that_stays_a_mask_has_no_token_to_find(exact, trajectory):
    step = trajectory.n_steps - 1
    unfinished = shortened(trajectory)
    lens = logit_lens(exact, unfinished, steps=[0])
    open_ = unfinished.final == exact.config.mask_id
    assert int(open_.sum()) == int((trajectory.revealed_at == step).sum()) > 0
    assert bool((lens.probability[0, :, open_] == 0).all())
    assert bool((lens.rank[0, :, open_] == exact.config.mask_id).all())
    assert bool((lens.commit[open_] == -1).all())


def shortened(trajectory):
    """Without its last step."""
    names = ("confidence", "entropy", "t", "top_tokens", "top_probabilities")
    parts = {name: getattr(trajectory, name)[:-1] for name in names}
    revealed = trajectory.revealed_at.masked_fill(trajectory.revealed_at == trajectory.n_steps - 1, -1)
    return replace(trajectory, states=trajectory.states[:-1], revealed_at=revealed, **parts)


def test_a_selection_is_a_part_of_the_whole(exact, trajectory):
    whole = logit_lens(exact, trajectory)
    part = logit_lens(exact, trajectory, steps=[3, 1], positions=[8, 0, 4])
    assert (part.steps, part.positions) == ((3, 1), (8, 0, 4))
    for name in ("rank", "top_token", "probability"):
        expected = getattr(whole, name)[[3, 1]][..., [8, 0, 4]]
        torch.testing.assert_close(getattr(part, name), expected, rtol=1e-12, atol=0)
    one = logit_lens(exact, trajectory, rows=[1])
    torch.testing.assert_close(one.probability, whole.probability[:, :, 1:], rtol=1e-10, atol=0)
    assert len(part.table()) == 2 * 3 * 2 * 3
    entry = part.table()[-1]
    assert (entry["step"], entry["depth"]) == (1, "block 1")
    assert (entry["row"], entry["position"]) == (1, 4)
    assert entry["probability"] == float(part.probability[1, 2, 1, 2])


def test_the_summary_is_over_masks_that_will_be_filled(exact, revised):
    lens = logit_lens(exact, revised)
    commit = revised.revealed_at.masked_fill(~filled(revised), -1)
    found = {(row["to_commit"], row["depth"]): row for row in lens.summary()}
    expected: dict[tuple[int, str], list[tuple[float, bool]]] = {}
    for step in range(revised.n_steps):
        for b, p in (commit >= step).nonzero().tolist():
            if int(revised.states[step, b, p]) != revised.mask_id:
                continue
            for d, depth in enumerate(lens.depths):
                key = step - int(commit[b, p]), depth
                value = float(lens.probability[step, d, b, p]), int(lens.rank[step, d, b, p]) == 0
                expected.setdefault(key, []).append(value)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key]["positions"] == len(values)
        assert found[key]["probability"] == pytest.approx(sum(v for v, _ in values) / len(values), rel=1e-12)
        assert found[key]["is_top"] == pytest.approx(sum(top for _, top in values) / len(values), rel=1e-12)
