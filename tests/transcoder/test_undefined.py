"""A figure without a value: null in JSON, "undefined" with its reason in text, marked in plots; never huge."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from transcoder import evaluate
from transcoder.evaluation import ORIGINAL, ZERO, ConditionScore
from transcoder.metrics import ReconstructionMetrics
from transcoder.plots import plot_density, plot_fvu, plot_nelbo
from transcoder.report import MEAN_NOTE, layer_table, markdown, mean_fvu, summary, write_report


@pytest.fixture(scope="module")
def evaluation(model, trained_directory, store):
    from transcoder.checkpoint import load_clt

    return evaluate(model, load_clt(trained_directory), store)


def with_zero_cost(evaluation, cost):
    """As if ablation to zero, of all MLPs and of each, cost this much."""
    nelbo = evaluation.conditions[ORIGINAL].nelbo + cost
    zero = ConditionScore(nelbo=nelbo, kl=1.0, top1_agreement=0.5)
    conditions = {**evaluation.conditions, ZERO: zero}
    return replace(evaluation, conditions=conditions, zero_alone=[zero] * 3)


def measured(clt, x, y, is_masked):
    metrics = ReconstructionMetrics(clt)
    metrics.update(x, y, is_masked)
    return metrics


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_the_share_of_a_variance_that_is_hardly_there_is_undefined(clt, rows, noise):
    is_masked = torch.arange(64) % 2 == 0
    x, y = rows[0], rows[1].clone()
    scale = 1 / float(clt.out_scale[1])
    y[1, is_masked] = y[1, 0] + noise * scale * torch.randn_like(y[1, is_masked])
    metrics = measured(clt.requires_grad_(False), x, y, is_masked)
    masked = metrics.layers("masked")
    assert math.isnan(masked[1].fvu)
    assert math.isnan(masked[1].explained_variance)
    assert re.search(
        r"at these 32 positions hardly vary: by \d.\de[-+]\d\d of the variance", masked[1].undefined
    )
    assert math.isfinite(masked[1].cosine)
    for defined in (masked[0], masked[2], *metrics.layers("all"), *metrics.layers("unmasked")):
        assert math.isfinite(defined.fvu)
        assert defined.undefined is None


def test_a_stratum_without_rows_says_so(clt, rows):
    none = measured(clt, rows[0], rows[1], torch.zeros(64, dtype=torch.bool)).layers("masked")
    assert [(layer.n_rows, layer.undefined) for layer in none] == [(0, "there are no such positions")] * 3
    assert math.isnan(none[0].fvu)
    assert math.isnan(none[0].l0)


@pytest.mark.parametrize("cost", [0.0, 1e-12, 0.019, -0.5])
def test_a_share_of_a_cost_that_is_not_there_is_undefined(evaluation, cost):
    free = with_zero_cost(evaluation, cost)
    assert math.isnan(free.share_recovered)
    assert all(map(math.isnan, free.share_recovered_alone))
    reason = free.undefined["share recovered, all MLPs"]
    assert reason.startswith(
        f"ablation to zero changes the NELBO by {cost:+.4f} nats per token, which is not "
    )
    assert set(free.undefined) == {
        f"share recovered, {name}" for name in ("all MLPs", "MLP 0", "MLP 1", "MLP 2")
    }


def test_a_share_of_a_real_cost_is_defined(evaluation):
    costly = with_zero_cost(evaluation, 0.5)
    replaced = costly.delta_nelbo("replaced")
    assert costly.share_recovered == pytest.approx((0.5 - replaced) / 0.5)
    assert costly.undefined == {}


def test_a_report_with_undefined_figures_has_no_odd_number_and_every_reason(clt, rows, evaluation, tmp_path):
    y = rows[1].clone()
    y[1] = y[1, :1]
    metrics = measured(clt.requires_grad_(False), rows[0], y, torch.ones(64, dtype=torch.bool))
    layers = {stratum: metrics.layers(stratum) for stratum in ("all", "unmasked", "masked")}
    odd = replace(with_zero_cost(evaluation, -0.25), layers=layers)
    write_report(odd, tmp_path, about={})
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert stored["share_recovered"] is None
    assert stored["share_recovered_alone"] == [None] * 3
    assert "-0.2500 nats per token" in stored["undefined"]["share recovered, all MLPs"]
    assert stored["layers"]["all"][1]["fvu"] is None
    assert "hardly vary" in stored["layers"]["all"][1]["undefined"]
    assert stored["layers"]["unmasked"][0]["undefined"] == "there are no such positions"
    text = (tmp_path / "report.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", text + "\n".join(summary(odd)), re.IGNORECASE)
    assert "recovered, (zero - replaced) / (zero - original): **undefined**." in text
    assert "- share recovered, all MLPs: ablation to zero changes the NELBO by -0.2500" in text
    assert "- FVU and EV, all positions, layer 1: the MLP outputs at these 64 positions hardly vary" in text
    assert "- FVU and EV, unmasked positions, layer 0, 1, 2: there are no such positions" in text
    assert any(line.startswith("undefined: share recovered, all MLPs: ") for line in summary(odd))
    assert layer_table(odd)[3].count("undefined") == 5  # three FVUs, EV, recovered
    fvus = [layer.fvu for layer in layers["all"]]
    assert mean_fvu(odd) == f"{(fvus[0] + fvus[2]) / 2:.3f} (of 2 of 3 layers)"


def test_plots_mark_what_is_undefined(clt, rows, evaluation):
    metrics = measured(clt.requires_grad_(False), rows[0], rows[1], torch.ones(64, dtype=torch.bool))
    layers = {stratum: metrics.layers(stratum) for stratum in ("all", "unmasked", "masked")}
    broken = ConditionScore(nelbo=math.inf, kl=math.nan, top1_agreement=0.0)
    odd = replace(evaluation, layers=layers, replaced_alone=[broken, *evaluation.replaced_alone[1:]])
    assert odd.undefined["replaced 0"] == "the model's prediction is not finite"
    for figure, count in ((plot_fvu(odd), 3), (plot_nelbo(odd), 1), (plot_fvu(evaluation), 0)):
        figure.canvas.draw()
        assert [text.get_text() for text in figure.axes[0].texts] == ["undefined"] * count
    plot_density(odd).canvas.draw()


def test_the_report_says_why_the_mean_can_cost_more_than_zero(evaluation):
    assert MEAN_NOTE in markdown(evaluation, {})
    assert "the mean mixes masked and unmasked positions" in MEAN_NOTE
