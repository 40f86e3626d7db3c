"""The model's figures against a plain float64 computation by hand, for every condition, stratum and t-bin."""

import json
import math

import numpy as np
import pytest
import torch

from mdlm_interp import HookedMDLM
from mdlm_interp.diffusion import LogLinearSchedule, nelbo_per_token
from mdlm_interp.errors import DataError, OutputExistsError
from transcoder import ReplacementModel, evaluate
from transcoder.checkpoint import load_clt
from transcoder.config import METRICS
from transcoder.eval_json import estimate
from transcoder.eval_passes import KINDS, Passes, all_conditions
from transcoder.eval_scores import LEAST_COST, MEAN, ORIGINAL, REPLACED, ZERO, Condition, Estimate, ratio
from transcoder.evaluation import NoisedSequences
from transcoder.held_out import held_out_sequences
from transcoder.report import markdown, write_report
from transcoder.training_log import read_log

CONDITIONS = all_conditions(3)


@pytest.fixture(scope="module")
def evaluation(model, trained_directory, store):
    return evaluate(model, load_clt(trained_directory), store, batch_size=3)


@pytest.fixture(scope="module")
def in_float64(model_directory, trained_directory):
    """Model and transcoder in float64."""
    model = HookedMDLM.from_pretrained(model_directory, dtype=torch.float64)
    return model, load_clt(trained_directory).double().requires_grad_(False)


@pytest.fixture(scope="module")
def data(store, trained_directory):
    """The held-out sequences, as the store has them."""
    return NoisedSequences.from_store(store, held_out_sequences(load_clt(trained_directory), store).tolist())


@pytest.fixture(scope="module")
def exact(in_float64, data):
    return evaluate(in_float64[0], in_float64[1], data, batch_size=3)


def logits_by_hand(model, clt, condition, x_t, sigma):
    """Hooks, top-k and products written out, on weights without normalisation."""
    weights, layers = clt.folded(), range(3)
    chosen = layers if condition.layer is None else [condition.layer]
    acts = {}

    def read(tensor, hook):
        layer = int(hook.name.split(".")[1])
        pre = tensor @ weights.W_enc[layer].T + weights.b_enc[layer]
        kept = pre.topk(clt.config.k, dim=-1)
        acts[layer] = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())

    def write(tensor, hook):
        layer = int(hook.name.split(".")[1])
        if condition.kind == "zero":
            return torch.zeros_like(tensor)
        if condition.kind == "mean":
            return clt.out_mean[layer].expand_as(tensor).clone()
        parts = [acts[source] @ weights.W_dec[source][:, layer - source] for source in range(layer + 1)]
        return weights.b_dec[layer] + sum(parts)

    hooks = {f"blocks.{layer}.mlp.hook_in": read for layer in layers}
    if condition.kind != "original":
        hooks |= {f"blocks.{layer}.hook_mlp_out": write for layer in chosen}
    with model.hooks(hooks):
        return model(x_t, sigma)


@torch.no_grad()
@pytest.mark.parametrize("condition", [ORIGINAL, *CONDITIONS], ids=str)
def test_every_figure_is_that_computed_by_hand(in_float64, data, exact, condition):
    model, clt = in_float64
    mask_id, sigma = model.config.mask_id, LogLinearSchedule().sigma(data.t)
    scores, is_masked = exact.scores, data.x_t == mask_id
    logits, original = (
        logits_by_hand(model, clt, name, data.x_t, sigma.float().double()) for name in (condition, ORIGINAL)
    )
    bound, before = (
        nelbo_per_token(values, data.x_0, data.x_t, data.t, mask_id) for values in (logits, original)
    )
    log_q, log_p = (values[..., :mask_id].log_softmax(-1) for values in (logits, original))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    agree = (log_q.argmax(-1) == log_p.argmax(-1)).double()
    for t_bin in (None, *range(10)):
        chosen = torch.from_numpy(scores.chosen(t_bin))
        if t_bin is not None:
            assert torch.equal(chosen, (data.t >= t_bin / 10) & (data.t < (t_bin + 1) / 10))
        where = is_masked & chosen[:, None]
        if not chosen.any():
            assert scores.nelbo(condition, t_bin).undefined == "there are no such positions"
            continue
        assert scores.nelbo(condition, t_bin).value == pytest.approx(
            float(bound[chosen].mean()), rel=1e-9, abs=1e-12
        )
        change = scores.delta_nelbo(condition, t_bin)
        per_sequence = (bound - before)[chosen].mean(1)
        assert change.value == pytest.approx(float(per_sequence.mean()), rel=1e-9, abs=1e-12)
        if len(per_sequence) > 1:
            expected = float(per_sequence.std() / len(per_sequence) ** 0.5)
            assert change.se == pytest.approx(expected, rel=1e-9, abs=1e-12)
        else:
            assert math.isnan(change.se)
        unmasked = ~is_masked & chosen[:, None]
        assert scores.raw_kl(condition, t_bin).value == pytest.approx(
            float(kl[unmasked].mean()), rel=1e-9, abs=1e-12
        )
        if where.any():
            assert scores.kl(condition, t_bin).value == pytest.approx(
                float(kl[where].mean()), rel=1e-9, abs=1e-12
            )
            found = scores.top1_agreement(condition, t_bin).value
            assert found == pytest.approx(float(agree[where].mean()), rel=1e-9, abs=1e-12)
    if condition.kind == "replaced":
        for against in ("zero", "mean"):
            ablated = logits_by_hand(
                model, clt, Condition(against, condition.layer), data.x_t, sigma.float().double()
            )
            worst = nelbo_per_token(ablated, data.x_0, data.x_t, data.t, mask_id).mean()
            found = scores.recovered(condition.layer, against).value
            # Random weights: ablation may as well help, and then there is no share.
            if float(worst - before.mean()) > LEAST_COST:
                expected = float((worst - bound.mean()) / (worst - before.mean()))
                assert found == pytest.approx(expected, rel=1e-8)
            else:
                assert math.isnan(found)


def test_the_layers_figures_are_those_of_the_models_own_activations(in_float64, data, exact):
    model, clt = in_float64
    replacement = ReplacementModel(model, clt)
    with torch.no_grad():
        x, y = (rows.flatten(1, 2) for rows in replacement.activations(data.x_t, data.sigma()))
        y_hat = clt(x)
    is_masked = (data.x_t == model.config.mask_id).flatten()
    for stratum, chosen in (("all", is_masked | True), ("masked", is_masked), ("unmasked", ~is_masked)):
        for layer, found in enumerate(exact.layers[stratum]):
            error, target = (y_hat - y)[layer, chosen], y[layer, chosen]
            expected = float(error.square().sum() / (target - target.mean(0)).square().sum())
            assert found.fvu == pytest.approx(expected, rel=1e-9)
            assert found.n_rows == int(chosen.sum())


def test_t_bins_sum_to_the_total(exact):
    scores = exact.scores
    bins = [number for number in range(10) if scores.chosen(number).any()]
    assert len(bins) > 3
    for condition in (ORIGINAL, *CONDITIONS):
        for figure, size in (
            (scores.delta_nelbo, scores.n_positions),
            (scores.kl, scores.n_masked),
            (scores.top1_agreement, scores.n_masked),
            (scores.raw_kl, scores.n_positions - scores.n_masked),
        ):
            parts = [(figure(condition, number).value, size[scores.chosen(number)].sum()) for number in bins]
            summed = sum(value * count for value, count in parts if count)
            assert summed == pytest.approx(figure(condition).value * size.sum(), rel=1e-9, abs=1e-12)


def test_a_ratios_standard_error_is_the_formula_and_shrinks_as_pairs_agree():
    total, size = np.array([3.0, 1.0, 8.0]), np.array([2.0, 1.0, 5.0])
    value = 12 / 8
    squares = sum((t - value * s) ** 2 for t, s in zip(total, size, strict=True))
    assert ratio(total, size) == Estimate(value, math.sqrt(3 / 2 * squares) / 8)
    assert ratio(3 * size, size).se == 0.0
    assert ratio(total[:1], size[:1]).undefined == "one text has no standard error"


def test_the_standard_error_is_the_spread_over_other_samples_of_sequences():
    rng = np.random.default_rng(0)
    size = rng.integers(5, 50, (4000, 40)).astype(float)
    total = size * (0.3 + 0.1 * rng.standard_normal(size.shape))
    found = [ratio(*sample) for sample in zip(total, size, strict=True)]
    spread = np.std([estimate.value for estimate in found])
    # 4,000 samples give their spread to about a hundredth; the formula is of first order in 1 / 40.
    assert np.mean([estimate.se for estimate in found]) == pytest.approx(spread, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("output_hook", ["blocks.{layer}.hook_mlp_out", "blocks.{layer}.mlp.hook_out"])
def test_a_pass_that_begins_in_the_middle_has_the_bits_of_a_whole_one(
    model, trained, ids, sigma, output_hook, monkeypatch
):
    outputs = [output_hook.format(layer=layer) for layer in range(3)]
    monkeypatch.setattr(type(trained.config), "output_hooks", outputs)
    replacement = ReplacementModel(model, trained.requires_grad_(False), check=False)
    seen = []
    passes = Passes(replacement, ids, sigma, lambda layer, acts, y, y_hat: seen.append(layer))
    assert seen == [0, 1, 2]
    assert torch.equal(passes.original, model(ids, sigma))
    began = []
    with model.hooks({"hook_embed": lambda tensor, hook: began.append(1)}, read_only=True):
        for condition in CONDITIONS:
            layers = None if condition.layer is None else [condition.layer]
            context = (
                replacement.spliced(layers)
                if condition.kind == "replaced"
                else replacement.ablated("zero" if condition.kind == "zero" else "mean", layers)
            )
            with context:
                expected = model(ids, sigma)
            assert torch.equal(passes.logits(condition), expected), condition
    alone = sum(condition.layer is not None for condition in CONDITIONS)
    whole = 0 if output_hook.endswith("hook_mlp_out") else alone
    assert len(began) == len(CONDITIONS) + (len(CONDITIONS) - alone) + whole


def test_replacing_moves_the_model_less_than_ablating(evaluation):
    scores = evaluation.scores
    assert scores.kl(ORIGINAL) == Estimate(0.0, 0.0)
    assert scores.top1_agreement(ORIGINAL) == Estimate(1.0, 0.0)
    assert 0.0 < scores.kl(REPLACED).value < 0.2 * scores.kl(ZERO).value
    assert set(scores.sums) == {ORIGINAL, *CONDITIONS}
    assert len(CONDITIONS) == 12


def test_the_batch_size_changes_results_by_rounding_only(model, trained, store, evaluation):
    other = evaluate(model, trained, store, batch_size=8)
    for condition, sums in evaluation.scores.sums.items():
        again = other.scores.sums[condition]
        # Float32 rounding of logits of size 10, over 24 positions and up to 1 / t.
        np.testing.assert_allclose(again.nelbo, sums.nelbo, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(again.kl, sums.kl, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(again.raw_kl, sums.raw_kl, rtol=1e-4, atol=1e-4)
    for stratum, layers in evaluation.layers.items():
        for layer, found in enumerate(layers):
            assert other.layers[stratum][layer].fvu == pytest.approx(found.fvu, rel=1e-5)
            assert other.layers[stratum][layer].n_rows == found.n_rows


def test_shorter_sequences_are_evaluated_at_their_own_length(in_float64, data):
    model, clt = in_float64
    x_0, x_t = data.x_0.clone(), data.x_t.clone()
    x_0[1::2, 15:] = x_t[1::2, 15:] = -1
    n_short = len(x_0) // 2
    mixed = evaluate(model, clt, NoisedSequences(x_0, x_t, data.t), batch_size=3)
    assert mixed.n_positions == (len(x_0) - n_short) * 24 + n_short * 15
    short = NoisedSequences(data.x_0[1::2, :15], data.x_t[1::2, :15], data.t[1::2])
    long = NoisedSequences(data.x_0[::2], data.x_t[::2], data.t[::2])
    for part, numbers in ((evaluate(model, clt, short), 1), (evaluate(model, clt, long), 0)):
        for condition, sums in part.scores.sums.items():
            found = mixed.scores.sums[condition]
            np.testing.assert_allclose(found.nelbo[numbers::2], sums.nelbo, rtol=1e-10)
            np.testing.assert_allclose(found.raw_kl[numbers::2], sums.raw_kl, rtol=1e-8, atol=1e-12)


def test_a_limit_spreads_over_the_sequences(model, trained, store):
    assert evaluate(model, trained, store, max_sequences=2).n_sequences == 2


def test_clean_tokens_are_noised_by_the_seed_alone(model, trained, store):
    x_0 = store.tokens()[0][:6]
    noised = NoisedSequences.from_tokens(x_0, model.config.mask_id, seed=2)
    a, b, c = (
        evaluate(model, trained, given, seed=seed, oracle_sequences=None).scores.sums[REPLACED].nelbo
        for given, seed in ((x_0, 2), (noised, 0), (x_0, 3))
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_sequences_without_a_mask_are_an_error(model, trained, store):
    x_0 = store.tokens()[0][:2]
    with pytest.raises(DataError, match="no position of the evaluated sequences is masked"):
        evaluate(model, trained, NoisedSequences(x_0, x_0, torch.tensor([0.1, 0.2], dtype=torch.float64)))


def test_error_terms_are_added_back_on_as_many_sequences_as_asked_for(model, trained, store, evaluation):
    check = evaluation.error_terms
    assert (check.n_sequences, check.oracle_differing, check.holds) == (2, 0, True)
    one = evaluate(model, trained, store, max_sequences=1).error_terms
    assert one is not None
    assert one.n_sequences == 1
    without = evaluate(model, trained, store, max_sequences=1, oracle_sequences=None)
    assert without.error_terms is None
    assert "Error terms were not added back: that was not asked for." in markdown(without, {})


def test_the_report_has_every_figure_and_plots_that_open(evaluation, trained_directory, tmp_path):
    about = {"model": "tiny"}
    log = read_log(trained_directory / METRICS)
    files = write_report(evaluation, tmp_path / "report", about=about, training_log=log)
    names = ["report.md", "report.json", "fvu.png", "nelbo.png", "density.png", "training.png"]
    assert [file.name for file in files] == names
    stored = json.loads(files[1].read_text())
    scores = evaluation.scores
    assert stored["about"] == about
    for kind in KINDS:
        everywhere = stored["in_model"]["all"][kind]
        assert everywhere["nelbo"]["value"] == scores.nelbo(Condition(kind)).value
        assert everywhere["nelbo"]["se"] == scores.nelbo(Condition(kind)).se
        for layer, alone in enumerate(stored["in_model"]["alone"][kind]):
            assert alone["kl"]["value"] == scores.kl(Condition(kind, layer)).value
            assert len(alone["by_t"]) == 10
            raw = scores.raw_kl(Condition(kind, layer), 4)
            assert alone["by_t"][4]["raw_kl"].get("value") == (
                raw.value if math.isfinite(raw.value) else None
            )
    for against, recovered in stored["in_model"]["all"]["replaced"]["recovered"].items():
        assert recovered == estimate(scores.recovered(None, against))
    assert stored["layers"]["masked"][2]["fvu"] == evaluation.layers["masked"][2].fvu
    for stratum, by_t in stored["layers_by_t"].items():
        for t_bin, layers in enumerate(by_t):
            assert [layer["n_rows"] for layer in layers] == [
                found.n_rows for found in evaluation.layers_by_t[stratum][t_bin]
            ]
    assert stored["error_terms"]["oracle_differing"] == 0
    assert stored["error_terms"]["native_bound"] == 1e-4
    text = files[0].read_text()
    assert f"{scores.nelbo(REPLACED).value:.3f} ± {scores.nelbo(REPLACED).se:.3f}" in text
    assert f"{scores.delta_nelbo(MEAN).value:+.3f}" in text
    assert f"{evaluation.layers['all'][1].fvu:.3f}" in text
    n_logits = f"{evaluation.error_terms.n_logits:,}"
    assert f"under the oracle: all {n_logits} logits of 2 sequences are the model's own, bit for bit" in text
    assert max(map(len, text.splitlines())) < 400
    assert all(f"![{name}]({name})" in text for name in names[2:])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[2:])
    with pytest.raises(OutputExistsError, match=r"report.json exists; choose another out directory"):
        write_report(evaluation, tmp_path / "report", about=about)
    mine = tmp_path / "mine" / "report.md"
    mine.parent.mkdir()
    mine.write_text("my own notes")
    with pytest.raises(OutputExistsError, match=r"report.md exists; choose another out directory"):
        write_report(evaluation, mine.parent, about=about)
    assert [file.read_text() for file in mine.parent.iterdir()] == ["my own notes"]
