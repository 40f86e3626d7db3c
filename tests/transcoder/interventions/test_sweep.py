"""Patching sweeps against patches by hand and finite differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import DataError
from mdlm_interp.filling import encode_prompt
from oracle import Oracle
from oracle.errors import ExactError
from transcoder.interventions import (
    Patch,
    interventions,
    log_odds,
    patching_sweep,
)
from transcoder.interventions.sweep import COMPONENTS, check_request
from transcoder.interventions.swept import PatchingSweep

PAIR = ("The dog ran in the park. The [MASK] was happy.", "The bird ran in the park. The [MASK] was happy.")


@pytest.fixture(scope="module")
def doubles():
    return HookedMDLM.from_pretrained("bundled", dtype=torch.float64)


@pytest.fixture(scope="module")
def states(doubles, tokenizer):
    return [encode_prompt(doubles, tokenizer, text) for text in PAIR]


@pytest.fixture(scope="module")
def metric(states, doubles, tokenizer):
    position = int((states[0][0] == doubles.config.mask_id).nonzero()[0])
    return log_odds(position, tokenizer.encode(" dog")[0])


@pytest.fixture(scope="module")
def sweep(doubles, states, metric):
    return patching_sweep(doubles, states[0], states[1], metric, batch_size=7)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_exact_effects_are_patches_by_hand(sweep, doubles, states, metric, layer):
    clean, corrupted = states
    _, source = doubles.run_with_cache(clean)
    base = metric(doubles(corrupted))
    for position in (1, 4, int((clean[0] == doubles.config.mask_id).nonzero()[0])):
        for part in ("resid_pre", "attn_out", "mlp_out"):
            edit = Patch(source, hook=f"blocks.{layer}.hook_{part}", positions=position)
            by_hand = float(metric(interventions(doubles, [edit])(corrupted)) - base)
            # Batches of other sizes round otherwise: float64.
            assert float(sweep.exact[part][layer, position]) == pytest.approx(by_hand, abs=1e-10)
        for head in (0, 5):
            edit = Patch(source, head=(layer, head), positions=position)
            by_hand = float(metric(interventions(doubles, [edit])(corrupted)) - base)
            assert float(sweep.exact["heads"][layer, head, position]) == pytest.approx(by_hand, abs=1e-10)
    assert float(sweep.exact["resid_pre"][0].abs().max()) > 0.5


@torch.no_grad()
def test_estimates_are_derivatives_along_the_difference(sweep, doubles, states, metric):
    clean, corrupted = states
    _, source = doubles.run_with_cache(clean)
    step = 1e-5
    for part, layer, position in (("resid_pre", 1, 8), ("attn_out", 0, 8), ("mlp_out", 0, 1)):
        name = f"blocks.{layer}.hook_{part}"

        def moved(sign, name=name, position=position):
            def move(tensor, hook):
                difference = source[name][:, position] - tensor[:, position]
                tensor[:, position] += sign * step * difference

            with doubles.hooks({name: move}):
                return float(metric(doubles(corrupted)))

        slope = (moved(1) - moved(-1)) / (2 * step)
        # Central differences in float64: rounding 1e-15 / 1e-5 and curvature 1e-10.
        assert float(sweep.estimated[part][layer, position]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
        assert abs(slope) > 1e-4


def test_heads_add_up_to_their_layer_by_gradient(sweep):
    """attn_out is linear in z, so that estimates of heads sum to that of the layer."""
    torch.testing.assert_close(
        sweep.estimated["heads"].sum(1), sweep.estimated["attn_out"], rtol=0, atol=1e-10
    )


def test_what_cannot_reach_the_metric_has_no_effect_at_all(bundled, states, metric):
    """In float32, where a batch of another size rounds otherwise: the last layer elsewhere than at the mask."""
    sweep = patching_sweep(
        bundled, states[0], states[1], metric, components=["attn_out", "mlp_out", "resid_pre"]
    )
    elsewhere = states[0][0] != bundled.config.mask_id
    for part in ("attn_out", "mlp_out"):
        assert bool((sweep.exact[part][-1, elsewhere] == 0).all())
        assert float(sweep.exact[part][-1, ~elsewhere].abs().max()) > 0
    equal = states[0][0] == states[1][0]
    assert bool((sweep.exact["resid_pre"][0, equal] == 0).all())
    assert bool((sweep.estimated["resid_pre"][0, equal] == 0).all())


def test_patching_the_only_difference_brings_the_clean_metric_back(sweep, states):
    where = int((states[0][0] != states[1][0]).nonzero()[0])
    assert float(sweep.recovered("resid_pre")[0, where]) == pytest.approx(1.0, abs=1e-9)
    assert sweep.metric_clean > sweep.metric_corrupted + 1


def test_the_agreement_is_pearsons_over_cells_that_count(sweep):
    both = [
        torch.cat([side[part].flatten() for part in side]).numpy() for side in (sweep.exact, sweep.estimated)
    ]
    counts = (both[0] != 0) | (both[1] != 0)
    found = sweep.agreement()
    assert found.n == counts.sum() < len(counts)
    expected = np.corrcoef(both[0][counts], both[1][counts])[0, 1]
    assert found.correlation == pytest.approx(expected, abs=1e-12)
    slope = np.linalg.lstsq(both[1][counts][:, None], both[0][counts], rcond=None)[0][0]
    assert found.slope == pytest.approx(slope, abs=1e-12)
    same = np.mean(np.sign(both[0][counts]) == np.sign(both[1][counts]))
    assert found.same_sign == pytest.approx(same)
    assert sweep.agreement_table().splitlines()[-1].split()[1] == str(found.n)


def test_estimates_follow_the_exact_effects_on_the_bundled_model(sweep):
    for part in (None, "resid_pre", "attn_out", "mlp_out", "heads"):
        assert sweep.agreement(part).correlation > 0.95
        assert sweep.agreement(part).same_sign > 0.9
    shuffled = {part: effects.roll(1, -1) for part, effects in sweep.estimated.items()}
    wrong = PatchingSweep(**{**vars(sweep), "estimated": shuffled})
    assert wrong.agreement().correlation < 0.5  # the neighbour that fails


def test_what_is_undefined_says_so(sweep):
    zero = {part: torch.zeros_like(effects) for part, effects in sweep.exact.items()}
    nothing = PatchingSweep(**{**vars(sweep), "exact": zero, "estimated": zero}).agreement()
    assert nothing.n == 0
    assert math.isnan(nothing.correlation)
    assert math.isnan(nothing.slope)
    assert math.isnan(nothing.same_sign)
    with pytest.raises(DataError, match="both have the metric 2, so no share"):
        PatchingSweep(**{**vars(sweep), "metric_clean": 2.0, "metric_corrupted": 2.0}).recovered("heads")


def test_the_table_lists_the_largest_first(sweep, tokenizer):
    lines = sweep.table(tokenizer, k=6).splitlines()
    largest = max(float(effects.abs().max()) for effects in sweep.exact.values())
    assert len(lines) == 7
    assert abs(float(lines[1].split()[-2])) == pytest.approx(largest, abs=5e-4)


def test_heat_maps_are_drawn(sweep, tokenizer, tmp_path):
    image = imread(sweep.plot(tmp_path / "sweep.png", tokenizer))
    assert image.shape[0] > 800
    assert image.shape[1] > 800
    red, blue = image[..., 0] - image[..., 2], image[..., 2] - image[..., 0]
    assert float(red.max()) > 0.4  # a large effect is strongly coloured
    assert sweep.labels(tokenizer)[1] == "' bird' → ' dog'"
    flat = {part: torch.zeros_like(effects) for part, effects in sweep.exact.items()}
    grey = imread(
        PatchingSweep(**{**vars(sweep), "exact": flat, "estimated": {}}).plot(tmp_path / "flat.png")
    )
    assert grey.shape[1] < image.shape[1]  # one column without gradients
    assert float(blue.max()) >= 0.0


def test_a_sweep_without_gradients_runs_under_the_oracle(model, ids, sigma):
    exact = Oracle(model).model
    metric = log_odds(5, 40)
    clean, corrupted = ids[:1, :12], ids[1:, :12]
    settings: dict[str, Any] = {"components": ["attn_out"], "batch_size": 12}
    found = patching_sweep(exact, clean, corrupted, metric, sigma[:1], gradient=False, **settings)
    native = patching_sweep(model, clean, corrupted, metric, sigma[:1], gradient=False, **settings)
    # Bounded: native float32 against the exact value of the same sums.
    torch.testing.assert_close(found.exact["attn_out"], native.exact["attn_out"], rtol=0, atol=1e-3)
    assert float(found.exact["attn_out"].abs().max()) > 0.1
    with pytest.raises(DataError, match="made without gradients; repeat it with gradient=True"):
        found.agreement()
    with pytest.raises(ExactError):
        patching_sweep(exact, clean, corrupted, metric, sigma[:1], **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": ["resid"]}, "'resid' is no component of a sweep; did you mean 'resid_pre'"),
        ({"components": []}, "a sweep needs a component, got none; there are resid_pre, attn_out"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(doubles, states, metric, change, message):
    with pytest.raises(DataError, match=message):
        patching_sweep(doubles, states[0], states[1], metric, **change)


def test_states_that_cannot_be_compared_are_refused(doubles, states, metric):
    with pytest.raises(DataError, match=r"the clean state has shape \[1, 5\], the corrupted one \[1, "):
        patching_sweep(doubles, states[0][:, :5], states[1], metric)
    two = [torch.cat([state, state]) for state in states]
    with pytest.raises(DataError, match=r"a sweep is of one sequence \[1 pos\], got \[2, "):
        check_request(two[0], two[1], COMPONENTS, 1)
    with pytest.raises(DataError, match="are equal, so no patch can have an effect"):
        patching_sweep(doubles, states[0], states[0], metric)
