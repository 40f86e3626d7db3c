"""JumpReLU's three pseudo-gradients, each against a float64 reference written out from its definition; BatchTopK."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transcoder.activations import batch_topk_mask, jumprelu, topk
from transcoder.config import Ste

STES: tuple[Ste, ...] = ("gdm", "anthropic", "crosslayer-coding")
WIDTH = 0.5


def reference(ste, h, theta, gradient, width):
    """Value, and gradients by h and by log theta, of one pre-activation: reference/transcoders.md 2.2, row by row."""
    in_window = abs(h - theta) < width / 2
    if ste == "gdm":
        active, by_theta = h > theta, -theta / width if in_window else 0.0
        by_h = 1.0 if active else 0.0
    elif ste == "anthropic":
        active, by_theta = h > theta, -theta / width if in_window else 0.0
        # The loss moves h across the threshold too: the jump, of height theta, spread over the window.
        by_h = (1.0 if active else 0.0) + (theta / width if in_window else 0.0)
    else:
        active, by_theta = h >= theta, -h / width if in_window else 0.0
        by_h = 1.0 if active else 0.0
    return (h if active else 0.0), gradient * by_h, gradient * by_theta * theta


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    log_threshold = torch.randn(6, generator=generator, dtype=torch.float64) * 0.3 - 1.0
    h[0] = log_threshold.exp()  # exactly at the threshold
    h[1] = log_threshold.exp() + WIDTH / 2  # exactly at the window's edges, which are outside
    h[2] = log_threshold.exp() - WIDTH / 2
    return h, log_threshold, torch.randn(40, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ste", STES)
def test_value_and_gradients_equal_the_float64_reference(ste, case):
    h, log_threshold, gradient = (
        tensor.clone().requires_grad_(index < 2) for index, tensor in enumerate(case)
    )
    acts = jumprelu(h, log_threshold, ste, WIDTH)
    torch.autograd.backward(acts, gradient)
    thresholds, values = log_threshold.detach().exp(), h.detach()
    by_log = torch.zeros(6, dtype=torch.float64)
    n_in_window = 0
    for row in range(40):
        for feature in range(6):
            theta = float(thresholds[feature])
            value, by_h, of_row = reference(
                ste, float(values[row, feature]), theta, float(gradient[row, feature]), WIDTH
            )
            assert float(acts.detach()[row, feature]) == value
            assert float(h.grad[row, feature]) == pytest.approx(by_h, abs=1e-14)
            by_log[feature] += of_row
            n_in_window += of_row != 0
    assert n_in_window > 30
    torch.testing.assert_close(log_threshold.grad, by_log, rtol=1e-12, atol=1e-13)


def test_the_three_are_three(case):
    """The neighbour that fails: no two have the same gradients, so none can stand for another in the test above."""
    found = {}
    for ste in STES:
        h, log_threshold = (tensor.clone().requires_grad_() for tensor in case[:2])
        torch.autograd.backward(jumprelu(h, log_threshold, ste, WIDTH), case[2])
        found[ste] = (h.grad, log_threshold.grad)
    assert not torch.equal(found["gdm"][0], found["anthropic"][0])
    assert torch.equal(found["gdm"][1], found["anthropic"][1])
    assert not torch.allclose(found["gdm"][1], found["crosslayer-coding"][1], rtol=1e-2)


@pytest.mark.parametrize("ste", STES)
def test_away_from_the_window_the_gradient_is_the_finite_difference(ste, case):
    h, log_threshold, gradient = case
    far = (h - log_threshold.exp()).abs() > WIDTH / 2 + 1e-3
    h = h.clone().requires_grad_()
    torch.autograd.backward(jumprelu(h, log_threshold, ste, WIDTH), gradient)
    step = 1e-6
    above, below = (jumprelu(h.detach() + sign * step, log_threshold, ste, WIDTH) for sign in (1, -1))
    difference = gradient * (above - below) / (2 * step)
    torch.testing.assert_close(h.grad[far], difference[far], rtol=0, atol=1e-8)
    assert int(far.sum()) > 100


def test_gdm_is_the_gradient_of_a_window_average_in_theta():
    """With h spread evenly over the window, the mean pseudo-gradient is the derivative of the mean activation."""
    theta, width = 0.8, 0.2
    h = torch.linspace(theta - width / 2, theta + width / 2, 200_001, dtype=torch.float64)[1:-1]
    log_threshold = torch.tensor([math.log(theta)], dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(jumprelu(h[:, None], log_threshold, "gdm", width).mean())
    means = [float(h[h > theta + sign * 1e-3].sum()) / len(h) for sign in (1, -1)]
    # theta's derivative, times theta for its logarithm; the mean is quadratic in theta, so central differences are
    # exact but for the grid of h.
    assert log_threshold.grad is not None
    assert float(log_threshold.grad) == pytest.approx(theta * (means[0] - means[1]) / 2e-3, rel=1e-3)


@pytest.mark.parametrize("ste", STES)
def test_a_nan_stays_visible(ste):
    acts = jumprelu(torch.tensor([math.nan, 1.0]), torch.zeros(2) - 3, ste, 1.0)
    assert math.isnan(acts[0])
    assert acts[1] == 1.0


# BatchTopK


def batch_topk(pre_acts, k):
    return torch.where(batch_topk_mask(pre_acts.detach(), k), pre_acts.relu(), 0.0)


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 4)
)
def test_batch_topk_keeps_the_k_times_batch_largest_of_each_layer(rows, k):
    pre_acts = torch.tensor([rows, [row[::-1] for row in rows]], dtype=torch.float32)
    found = batch_topk(pre_acts, k)
    for layer in range(2):
        flat = pre_acts[layer].flatten().tolist()
        kept = sorted(range(len(flat)), key=lambda index: -flat[index])[: k * len(rows)]
        expected = [max(0.0, value) if index in kept else 0.0 for index, value in enumerate(flat)]
        assert found[layer].flatten().tolist() == expected


def test_batch_topk_gives_rows_what_they_need_and_topk_does_not():
    pre_acts = torch.tensor([[[3.0, 2.0, 1.0], [0.3, 0.2, 0.1]]])
    assert (batch_topk(pre_acts, 1) > 0).sum(-1).tolist() == [[2, 0]]
    assert (topk(pre_acts, 1) > 0).sum(-1).tolist() == [[1, 1]]
