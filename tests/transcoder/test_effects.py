"""Attribution against derivatives and against real ablations."""

import numpy as np
import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.errors import DataError
from transcoder import ReplacementModel
from transcoder.checkpoint import load_clt
from transcoder.effects import attribute_features, feature_effects
from transcoder.evaluation import masked_log_probs
from transcoder.feature_edits import FeatureEdit

POSITION, TOKEN = 5, 40


@pytest.fixture(scope="module")
def exact(model_directory, trained_directory):
    """Model and transcoder in float64."""
    model = HookedMDLM.from_pretrained(model_directory, dtype=torch.float64)
    return ReplacementModel(model, load_clt(trained_directory).double().requires_grad_(False))


@pytest.fixture(scope="module")
def one(store):
    return store.tokens()[1][4:5]


@pytest.fixture
def noise(sigma):
    return sigma[:1].double()


@torch.no_grad()
def log_odds(replacement, ids, noise, edits=()):
    with replacement.edited(list(edits)):
        logits = replacement.model(ids, noise)[0, POSITION]
    p = logits[:-1].softmax(0)[TOKEN]
    return float((p / (1 - p)).log())


def test_attribution_is_the_derivative_by_the_features_scale(exact, one, noise):
    rows = attribute_features(exact, one, POSITION, TOKEN, noise)
    step = 1e-5
    for row in [*rows[:6], rows[len(rows) // 2]]:
        edits = [[FeatureEdit(row.layer, row.feature, (row.position,), 1 + sign * step)] for sign in (1, -1)]
        up, down = (log_odds(exact, one, noise, edit) for edit in edits)
        # Central differences in float64: rounding 1e-15 / 1e-5 and curvature 1e-10.
        assert -row.attribution == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


@torch.no_grad()
def test_every_active_feature_is_listed_once_in_order(exact, one, noise):
    rows = attribute_features(exact, one, POSITION, TOKEN, noise)
    acts = exact.feature_acts(one, noise)[:, 0]
    assert len({(row.layer, row.feature, row.position) for row in rows}) == len(rows) == int((acts > 0).sum())
    assert all(row.activation == float(acts[row.layer, row.position, row.feature]) > 0 for row in rows)
    sizes = [abs(row.attribution) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert attribute_features(exact, one, POSITION, TOKEN, noise, limit=7) == rows[:7]


def test_attribution_agrees_with_real_ablation(exact, one, noise):
    found = feature_effects(exact, one, POSITION, TOKEN, noise, n_ablations=40).effects
    estimated, measured = np.array([[row.attribution, row.logit_change] for row in found]).T
    assert np.corrcoef(estimated, measured)[0, 1] > 0.9
    assert np.corrcoef(np.roll(estimated, 1), measured)[0, 1] < 0.5  # the neighbour that fails


def test_effects_are_ablations_by_hand_largest_first(exact, one, noise):
    result = feature_effects(exact, one, POSITION, TOKEN, noise, n_ablations=6, n_top=3)
    before = log_odds(exact, one, noise)
    for row in result.effects:
        after = log_odds(exact, one, noise, [FeatureEdit(row.layer, row.feature, (row.position,))])
        assert row.logit_change == pytest.approx(after - before, abs=1e-12)
    sizes = [abs(row.logit_change) for row in result.effects]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 6


@torch.no_grad()
def test_the_likeliest_tokens_before_and_after_are_the_models(exact, one, noise):
    result = feature_effects(exact, one, POSITION, TOKEN, noise, n_ablations=3, n_top=4)
    best = result.effects[0]
    with exact.edited([FeatureEdit(best.layer, best.feature, (best.position,))]):
        edited = exact.model(one, noise)
    for logits, listed in ((exact.model(one, noise), result.top_before), (edited, result.top_after)):
        probabilities = masked_log_probs(logits[0], exact.model.config.mask_id)[POSITION].exp()
        assert listed == [
            (int(i), float(probabilities[i])) for i in probabilities.argsort(descending=True)[:4]
        ]
    assert best.probability_before == pytest.approx(
        float(masked_log_probs(exact.model(one, noise)[0], exact.model.config.mask_id)[POSITION, TOKEN].exp())
    )


def test_no_gradient_is_left_on_the_model(exact, one, noise, listening):
    feature_effects(exact, one, POSITION, TOKEN, noise, n_ablations=1)
    assert all(parameter.grad is None for parameter in exact.model.parameters())
    assert listening(exact.model) == 0


@pytest.mark.parametrize(
    ("position", "token", "message"),
    [
        (24, 0, r"position must be in \[0, 24\), got 24"),
        (0, -1, r"token must be in \[0, \d+\), which leaves out"),
    ],
)
def test_a_target_outside_the_model_is_refused(exact, one, noise, position, token, message):
    with pytest.raises(DataError, match=message):
        attribute_features(exact, one, position, token, noise)
    with pytest.raises(DataError, match="which leaves out the mask"):
        attribute_features(exact, one, 0, exact.model.config.mask_id, noise)
