"""A figure without a value: null in JSON, "undefined" with its reason in text, marked in plots; never huge."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from transcoder import evaluate
from transcoder.checkpoint import load_clt
from transcoder.cost_plots import plot_nelbo
from transcoder.eval_scores import MEAN, ORIGINAL, REPLACED, ZERO, Condition, SequenceSums
from transcoder.eval_tables import by_t_tables
from transcoder.evaluation import NoisedSequences
from transcoder.metrics import STRATA, ReconstructionMetrics
from transcoder.plots import plot_density, plot_fvu
from transcoder.report import (
    MEAN_NOTE,
    error_term_lines,
    layer_table,
    markdown,
    mean_fvu,
    summary,
    write_report,
)


@pytest.fixture(scope="module")
def evaluation(model, trained_directory, store):
    return evaluate(model, load_clt(trained_directory), store)


def with_cost(evaluation, cost, kinds=("zero", "mean")):
    """As if ablation, of all MLPs and of each, cost this much in every sequence."""
    scores = evaluation.scores
    nelbo = scores.sums[ORIGINAL].nelbo + cost * scores.n_positions
    names = [Condition(kind, layer) for kind in kinds for layer in (None, 0, 1, 2)]
    changed = {name: replace(scores.sums[name], nelbo=nelbo) for name in names}
    return replace(evaluation, scores=replace(scores, sums={**scores.sums, **changed}))


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
    assert math.isnan(masked[1].explained_variance_by_dimension)
    assert masked[1].dimensions_left_out is None
    assert re.search(
        r"at these 32 positions hardly vary: by \d.\de[-+]\d\d of the variance", masked[1].undefined
    )
    assert math.isfinite(masked[1].cosine)
    for defined in (masked[0], masked[2], *metrics.layers("all"), *metrics.layers("unmasked")):
        assert math.isfinite(defined.fvu)
        assert defined.undefined is None


@pytest.mark.parametrize("cost", [0.0, 1e-12, 0.019, -0.5])
def test_a_share_of_a_cost_that_is_not_there_is_undefined(evaluation, cost):
    free = with_cost(evaluation, cost).scores
    for layer in (None, 0, 1, 2):
        for against in ("zero", "mean"):
            for t_bin in (None, int(10 * free.t[0])):
                found = free.recovered(layer, against, t_bin)
                assert math.isnan(found.value)
                assert math.isnan(found.se)
                changed = abs(cost) > 1e-9
                said = f"{cost:+.4f}" if changed else r"[-+]0\.0000"
                message = f"ablation to {against} changes the NELBO by {said} nats per token, which is not "
                assert re.match(message.replace("+", r"\+") if changed else message, found.undefined)


def test_a_share_of_a_real_cost_is_defined(evaluation):
    costly = with_cost(evaluation, 0.5).scores
    replaced = costly.delta_nelbo(REPLACED)
    found = costly.recovered(None, "zero")
    assert found.value == pytest.approx((0.5 - replaced.value) / 0.5)
    # The cost is the same in every sequence, so all spread is the replacement's.
    assert found.se == pytest.approx(replaced.se / 0.5)
    assert costly.recovered(2, "mean").undefined is None
    only = with_cost(evaluation, 0.5, kinds=("mean",)).scores
    assert only.recovered(1, "mean").value == pytest.approx(costly.recovered(1, "mean").value)


@pytest.fixture
def odd(clt, rows, evaluation):
    """One layer that does not vary, no unmasked position, and ablation that helps."""
    y = rows[1].clone()
    y[1] = y[1, :1]
    metrics = measured(clt.requires_grad_(False), rows[0], y, torch.ones(64, dtype=torch.bool))
    layers = {stratum: metrics.layers(stratum) for stratum in STRATA}
    return replace(with_cost(evaluation, -0.25), layers=layers)


def test_a_report_with_undefined_figures_has_no_odd_number_and_every_reason(odd, tmp_path):
    write_report(odd, tmp_path, about={})
    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    recovered = [stored["in_model"]["all"]["replaced"]["recovered"]["zero"]]
    recovered += [alone["recovered"]["mean"] for alone in stored["in_model"]["alone"]["replaced"]]
    assert [figure["value"] for figure in recovered] == [None] * 4
    assert all("-0.2500 nats per token" in figure["undefined"] for figure in recovered)
    assert stored["layers"]["all"][1]["fvu"] is None
    assert "hardly vary" in stored["layers"]["all"][1]["undefined"]
    assert stored["layers"]["unmasked"][0]["undefined"] == "there are no such positions"
    text = (tmp_path / "report.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", text + "\n".join(summary(odd)), re.IGNORECASE)
    assert "(ablated - replaced) / (ablated - original): **undefined** of what ablation to zero" in text
    assert "- share recovered of ablation to zero, all MLPs: ablation to zero changes the NELBO by -" in text
    assert "- FVU and EV, all positions, layer 1: the MLP outputs at these 64 positions hardly vary" in text
    assert "- FVU and EV, unmasked positions, layer 0, 1, 2: there are no such positions" in text
    assert any(line.startswith("undefined: share recovered of ablation to zero") for line in summary(odd))
    assert layer_table(odd)[3].count("undefined") == 5  # three FVUs, EV, recovered
    fvus = [layer.fvu for layer in odd.layers["all"]]
    assert mean_fvu(odd) == f"{(fvus[0] + fvus[2]) / 2:.3f} (of 2 of 3 layers)"


def nulls_without_reason(value, path=""):
    """Places in a report where a figure is null and nothing beside it says why."""
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in nulls_without_reason(item, f"{path}.{i}")]
    if not isinstance(value, dict):
        return []
    own = [f"{path}.{key}" for key, item in value.items() if item is None and "undefined" not in value]
    return own + [
        found for key, item in value.items() for found in nulls_without_reason(item, f"{path}.{key}")
    ]


def test_every_null_of_a_report_has_its_reason(odd, evaluation, model, trained, store, tmp_path):
    two = NoisedSequences.from_store(store, [0, 1])
    assert len({int(10 * float(t)) for t in two.t}) == 2
    for number, found in enumerate((odd, evaluation, evaluate(model, trained, two))):
        write_report(found, tmp_path / str(number), about={})
        stored = json.loads((tmp_path / str(number) / "report.json").read_text())
        places = nulls_without_reason(stored["in_model"]) + nulls_without_reason(stored["layers_by_t"])
        assert places + nulls_without_reason(stored["layers"]) == []
        empty = stored["in_model"]["all"]["replaced"]["by_t"]
        assert sum(part["nelbo"]["value"] is None for part in empty) >= 2
        assert sum(part["n_masked"] for part in empty) == stored["n_masked"]


def test_t_bins_without_sequences_are_told_and_have_no_row(model, trained, store, tmp_path):
    two = evaluate(model, trained, NoisedSequences.from_store(store, [0, 1]))
    lines = by_t_tables(two)
    bins = {int(10 * t) for t in two.scores.t}
    shown = [line for line in lines if re.match(r"\| 0\.\d-", line)]
    assert [line[2:9] for line in shown] == [
        f"{t_bin / 10:.1f}-{t_bin / 10 + 0.1:.1f}" for t_bin in sorted(bins)
    ]
    assert all("(one text)" in line for line in shown)
    text = "\n".join(markdown(two, {}))
    empty = [f"{t_bin / 10:.1f}-{(t_bin + 1) / 10:.1f}" for t_bin in range(10) if t_bin not in bins]
    assert f"- t {', '.join(empty)}: all figures: no sequence has such a t" in text
    assert "standard errors: one text only" in text
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_a_prediction_that_is_not_finite_has_no_figures(evaluation):
    scores = evaluation.scores
    broken = SequenceSums(*(values.copy() for values in vars(scores.sums[REPLACED]).values()))
    for values in vars(broken).values():
        values[3] = math.nan
    broken_scores = replace(scores, sums={**scores.sums, REPLACED: broken})
    for figure in (broken_scores.nelbo, broken_scores.kl, broken_scores.top1_agreement):
        assert figure(REPLACED).undefined == "the model's prediction is not finite"
        assert math.isnan(figure(REPLACED).value)
        assert figure(ZERO).undefined is None
    found = replace(evaluation, scores=broken_scores)
    assert "- all MLPs: replaced: the model's prediction is not finite" in markdown(found, {})


def test_a_model_that_predicts_nothing_finite_is_scored_as_such(model, trained, store):
    clt = trained.requires_grad_(False)
    clt.b_dec[2, 0] = torch.inf
    scores = evaluate(model, clt, store, max_sequences=3, oracle_sequences=None).scores
    for condition in (REPLACED, Condition("replaced", 2)):
        for figure in (scores.nelbo, scores.delta_nelbo, scores.kl, scores.top1_agreement, scores.raw_kl):
            assert figure(condition).undefined == "the model's prediction is not finite"
    assert scores.top1_agreement(Condition("replaced", 1)).undefined is None
    assert scores.kl(MEAN).undefined is None


def test_only_sequences_with_the_positions_asked_for_count(evaluation):
    n = len(evaluation.scores.t)
    none = replace(evaluation.scores, n_masked=np.zeros(n))
    assert none.kl(REPLACED).undefined == "there are no such positions"
    assert none.nelbo(REPLACED).undefined is None


def test_plots_mark_what_is_undefined(odd, evaluation, model, trained, store):
    broken = SequenceSums(*(np.full_like(evaluation.scores.t, math.nan) for _ in range(4)))
    first = Condition("replaced", 0)
    sums = {**odd.scores.sums, first: broken}
    odd = replace(odd, scores=replace(odd.scores, sums=sums))

    def marks(figure, panel):
        figure.canvas.draw()
        return [text.get_text() for text in figure.axes[panel].texts]

    # The layer that does not vary twice, and three layers without unmasked positions.
    assert marks(plot_fvu(odd), 0) == ["undefined"] * 5
    assert marks(plot_fvu(evaluation), 0) == []
    assert marks(plot_nelbo(odd), 0) == marks(plot_nelbo(odd), 1) == ["undefined"]
    two = evaluate(model, trained, NoisedSequences.from_store(store, [0, 1]), oracle_sequences=None)
    for panel in (1, 2):
        assert marks(plot_fvu(two), panel).count("undefined") == 8
    for panel in (2, 3):
        assert marks(plot_nelbo(two), panel).count("undefined") == 8
    plot_density(odd).canvas.draw()
    alone = replace(evaluation, n_masked=evaluation.n_positions)
    assert marks(plot_density(alone), 0) == ["undefined"]


def test_error_terms_that_do_not_bring_the_model_back_are_told_loudly(evaluation):
    check = replace(evaluation.error_terms, oracle_differing=7, native_difference=0.5)
    failed = replace(evaluation, error_terms=check)
    lines = "\n".join(error_term_lines(failed))
    assert f"under the oracle: **7 of {check.n_logits:,} logits of 2 sequences differ" in lines
    assert "**beyond** the bound of 0.0001" in lines
    assert "under the oracle 7 logits differ; natively at most 5.0e-01 of their rms (BEYOND" in "\n".join(
        summary(failed)
    )
    asked = replace(check, oracle_differing=None, undefined="the model is odd")
    assert "not asked, as the model is odd" in "\n".join(
        error_term_lines(replace(evaluation, error_terms=asked))
    )


def test_the_report_says_why_the_mean_can_cost_more_than_zero(evaluation):
    assert MEAN_NOTE in markdown(evaluation, {})
    assert "the mean mixes masked and unmasked positions" in MEAN_NOTE
