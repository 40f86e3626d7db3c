"""A plot shows what there is to see: outliers do not hide the rest, legends lie on nothing, a flat L0 says why."""

from dataclasses import replace
from pathlib import Path

import pytest

from mdlm_interp import HookedMDLM
from transcoder.checkpoint import load_clt
from transcoder.cost_plots import plot_nelbo
from transcoder.evaluation import NoisedSequences, evaluate
from transcoder.plots import FVU_END, draw_fvu, plot_fvu
from transcoder.training_plots import draw_l0


@pytest.fixture(scope="module")
def evaluation(model_directory: Path, trained_directory: Path, store):
    model = HookedMDLM.from_pretrained(model_directory)
    noised = NoisedSequences.from_store(store, [0, 1, 2])
    return evaluate(model, load_clt(trained_directory), noised, oracle_sequences=None)


def tallest(axes):
    """Height of the highest bar."""
    return max(bar.get_bbox().ymax for bar in axes.patches)


def test_a_layer_that_is_far_off_is_cut_and_its_value_written(evaluation):
    layers = {stratum: list(found) for stratum, found in evaluation.layers.items()}
    layers["all"][1] = replace(layers["all"][1], fvu=31.4)
    axes = draw_fvu(layers, "").axes[0]
    assert axes.get_ylim()[1] < 1.4 * FVU_END
    assert tallest(axes) == FVU_END
    (text,) = axes.texts
    assert (text.get_text(), text.get_rotation()) == ("31.4 →", 90)
    axes.figure.canvas.draw()
    box = text.get_window_extent()
    assert axes.get_window_extent().containsx(box.x0)
    assert axes.get_window_extent().containsy(box.y1)
    legend = axes.get_legend()
    assert legend is not None
    assert not box.overlaps(legend.get_window_extent())
    assert not any(box.overlaps(bar.get_window_extent()) for bar in axes.patches)


def test_where_most_is_far_off_the_axis_shows_it(evaluation):
    layers = {
        stratum: [replace(layer, fvu=9.0) for layer in found] for stratum, found in evaluation.layers.items()
    }
    axes = draw_fvu(layers, "").axes[0]
    assert tallest(axes) == 9.0
    assert not axes.texts


def test_an_outlier_in_one_part_of_t_does_not_hide_the_others(evaluation):
    by_t = {stratum: [list(layers) for layers in bins] for stratum, bins in evaluation.layers_by_t.items()}
    known = [number for number, layers in enumerate(by_t["masked"]) if layers[0].undefined is None]
    by_t["masked"][known[0]][0] = replace(by_t["masked"][known[0]][0], fvu=400.0)
    figure = plot_fvu(replace(evaluation, layers_by_t=by_t))
    assert figure.axes[2].get_ylim()[1] < 1.3 * FVU_END
    assert "↑ 400" in [text.get_text() for text in figure.axes[2].texts]


@pytest.mark.parametrize(
    ("fvus", "says"), [([1.6], "↑ 1.6"), ([2.25, 1.6], "↑ 2.25\n↑ 1.6"), ([1.6, 400.0, 2.0], "3 up\nto 400")]
)
def test_layers_cut_in_the_same_part_of_t_are_written_once_and_inside_the_panel(evaluation, fvus, says):
    by_t = {stratum: [list(layers) for layers in bins] for stratum, bins in evaluation.layers_by_t.items()}
    known = next(number for number, layers in enumerate(by_t["masked"]) if layers[0].undefined is None)
    for layer, fvu in enumerate(fvus):
        by_t["masked"][known][layer] = replace(by_t["masked"][known][layer], fvu=fvu)
    figure = plot_fvu(replace(evaluation, layers_by_t=by_t))
    axes = figure.axes[2]
    assert says in [text.get_text() for text in axes.texts]
    figure.canvas.draw()
    (box,) = [text.get_window_extent() for text in axes.texts if text.get_text() == says]
    panel = axes.get_window_extent()
    assert panel.y0 < box.y0 < box.y1 <= panel.y1


def test_no_legend_lies_on_what_is_written_in_a_panel(evaluation):
    figure = plot_nelbo(evaluation)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    written = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    assert any("undefined" in text.get_text() for text in written)
    assert not any(box.overlaps(text.get_window_extent()) for text in written)
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert [axes.get_legend() for axes in figure.axes] == [None] * 4


@pytest.mark.parametrize(("k", "l0", "says"), [(2, 2.0, True), (2, 1.9, False), (None, 2.0, False)])
def test_an_l0_that_is_flat_by_design_says_so(k, l0, says):
    log = [{"rows": 10 * step, "l0_by_layer": [2.0, l0]} for step in range(1, 4)]
    texts = [text.get_text() for text in draw_l0(log, k).axes[0].texts]
    assert texts == (["flat by design: the activation keeps the k = 2 largest"] if says else [])
