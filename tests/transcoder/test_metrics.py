"""Every figure of reconstruction against a plain float64 computation over the rows of its stratum."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch

from transcoder.metrics import DENSITY_EDGES, STRATA, ReconstructionMetrics, t_bin_of
from transcoder.plots import draw_density

T_BINS = 4


@pytest.fixture
def grouped(clt, rows):
    """64 rows in three batches, a third of them masked, in three of four t-bins."""
    clt.double().requires_grad_(False)
    x, y = (tensor.double() for tensor in rows)
    is_masked = torch.arange(64) % 3 == 0
    t_bin = torch.arange(64) // 8 % 3
    metrics = ReconstructionMetrics(clt, T_BINS)
    for part in (slice(0, 10), slice(10, 11), slice(11, 64)):
        metrics.update(x[:, part], y[:, part], is_masked[part], t_bin[part])
    return metrics, x, y, is_masked, t_bin


def chosen_rows(is_masked, t_bin, stratum, number):
    chosen = {"all": is_masked | True, "unmasked": ~is_masked, "masked": is_masked}[stratum]
    return chosen if number is None else chosen & (t_bin == number)


@pytest.mark.parametrize("stratum", STRATA)
@pytest.mark.parametrize("number", [None, 0, 1, 2])
def test_every_figure_is_that_of_its_rows_together_whatever_the_batches(clt, grouped, stratum, number):
    metrics, x, y, is_masked, t_bin = grouped
    chosen = chosen_rows(is_masked, t_bin, stratum, number)
    acts, y_hat = clt.encode(x)[:, chosen], clt(x)[:, chosen]
    for layer, found in enumerate(metrics.layers(stratum, number)):
        target, error = y[layer, chosen], y_hat[layer] - y[layer, chosen]
        n = int(chosen.sum())
        variance = target.var(0, correction=0)
        assert found.n_rows == n > 1
        assert found.undefined is None
        assert found.fvu == pytest.approx(float(error.square().sum() / (n * variance.sum())), rel=1e-9)
        nmse = float((error * clt.out_scale[layer]).square().mean())
        assert found.nmse == pytest.approx(nmse, rel=1e-9)
        error_variance = error.var(0, correction=0)
        pooled = 1 - float(error_variance.sum() / variance.sum())
        assert found.explained_variance == pytest.approx(pooled, rel=1e-9)
        by_dimension = float((1 - error_variance / variance).mean())
        assert found.explained_variance_by_dimension == pytest.approx(by_dimension, rel=1e-9)
        assert found.dimensions_left_out == 0
        norms = target.norm(dim=1) * y_hat[layer].norm(dim=1)
        cosine = float(((target * y_hat[layer]).sum(1) / norms).mean())
        assert found.cosine == pytest.approx(cosine, rel=1e-9)
        active = acts[layer] > 0
        assert found.l0 == pytest.approx(float(active.sum(1).double().mean()), rel=1e-9)
        share = active.double().mean(0)
        assert found.dead == int((share == 0).sum())
        assert found.dense == float((share > 0.1).double().mean())
        histogram = [int(((share > low) & (share <= high)).sum()) for low, high in pairwise(DENSITY_EDGES)]
        assert found.density_histogram == tuple(histogram)
    if number is None:
        density = torch.from_numpy(metrics.density(stratum))
        assert torch.allclose(density, (acts > 0).double().mean(1), rtol=1e-12)


def test_the_two_explained_variances_differ_where_dimensions_do(grouped):
    for layer in grouped[0].layers():
        assert abs(layer.explained_variance - layer.explained_variance_by_dimension) > 1e-3


def test_strata_sum_to_the_total(clt, grouped):
    metrics = grouped[0]
    for layer, total in enumerate(metrics.layers()):
        parts = [
            metrics.layers(stratum, number)[layer]
            for stratum in ("unmasked", "masked")
            for number in range(T_BINS)
        ]
        assert sum(part.n_rows for part in parts) == total.n_rows == 64
        present = [part for part in parts if part.n_rows]
        assert len(present) == 6
        for name in ("nmse", "cosine", "l0"):
            summed = sum(part.n_rows * getattr(part, name) for part in present)
            assert summed == pytest.approx(64 * getattr(total, name), rel=1e-12)
        assert sum(total.density_histogram) + total.dead == clt.config.n_features
        assert total.dead <= min(part.dead for part in present)


def test_a_dimension_that_hardly_varies_is_left_out_of_the_mean_and_counted(clt, rows):
    clt.double().requires_grad_(False)
    x, y = (tensor.double() for tensor in rows)
    y[1, :, 3] = 7.0 + 1e-6 * y[1, :, 3]
    metrics = ReconstructionMetrics(clt)
    metrics.update(x, y, torch.zeros(64, dtype=torch.bool))
    found = metrics.layers()[1]
    assert found.dimensions_left_out == 1
    kept = [dimension for dimension in range(y.shape[-1]) if dimension != 3]
    error, target = (clt(x) - y)[1][:, kept], y[1][:, kept]
    expected = float((1 - error.var(0, correction=0) / target.var(0, correction=0)).mean())
    assert found.explained_variance_by_dimension == pytest.approx(expected, rel=1e-9)
    assert metrics.layers()[0].dimensions_left_out == 0


def test_without_rows_nothing_is_a_number(clt, rows):
    metrics = ReconstructionMetrics(clt.requires_grad_(False), T_BINS)
    metrics.update(rows[0], rows[1], torch.zeros(64, dtype=torch.bool))
    for found in (*metrics.layers("masked"), *metrics.layers("all", 2)):
        assert found.n_rows == 0
        assert found.undefined == "there are no such positions"
        figures = [value for name, value in vars(found).items() if name not in ("n_rows", "undefined")]
        assert all(value is None or math.isnan(value) for value in figures)


def test_a_reconstruction_that_is_not_finite_is_undefined(clt, rows):
    clt.requires_grad_(False)
    clt.b_dec[1, 0] = torch.inf
    metrics = ReconstructionMetrics(clt)
    metrics.update(rows[0], rows[1], torch.zeros(64, dtype=torch.bool))
    assert metrics.layers()[1].undefined == "the targets or their reconstruction are not finite"
    assert math.isnan(metrics.layers()[1].fvu)
    assert metrics.layers()[0].undefined is None


def test_t_bins_are_those_of_the_stores_statistics(store):
    bins = t_bin_of(store.times(), 10)
    masked = store.tokens()[1] == int(store.tokens()[1].max())
    counts = store.statistics("blocks.0.hook_mlp_out").count
    for number in range(10):
        assert int(counts[1, number]) == int(masked[bins == number].sum())
        assert int(counts[:, number].sum()) == int((bins == number).sum()) * store.length


def test_a_density_on_an_edge_belongs_below_it_and_dead_features_nowhere(clt, rows):
    clt.requires_grad_(False)
    metrics = ReconstructionMetrics(clt)
    members = metrics.add_rows(torch.zeros(10, dtype=torch.bool))
    acts = torch.zeros(10, 24)
    acts[:, 0] = acts[:1, 1] = 1.0  # in all of ten rows, in one, and in none
    for layer in range(3):
        metrics.add_layer(layer, members, acts, rows[1][layer, :10], rows[1][layer, :10])
    found = metrics.layers()[0]
    histogram = [0] * 25
    histogram[-1] = histogram[-5] = 1  # up to 1, and up to 10^-1
    assert found.density_histogram == tuple(histogram)
    assert found.dead == 22
    assert [found.l0, found.dense] == pytest.approx([1.1, 1 / 24])


@pytest.mark.parametrize("n_rows", [3, 10, 1000, 4202, 8192, 10**6])
def test_every_feature_that_was_active_is_in_the_density_plot(n_rows):
    """Exact: features active at one row and at all of them have bars too."""
    counts = np.array([[0, 1, 1, 2, n_rows - 1, n_rows], [0, 0, 0, 1, n_rows, n_rows]])
    axes = draw_density(counts / n_rows, n_rows, "").axes[0]
    drawn = [patch.get_data()[0].sum() for patch in axes.patches if isinstance(patch, StepPatch)]
    assert drawn == [5, 3]
