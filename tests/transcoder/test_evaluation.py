"""Metrics against formulas over all rows at once, and the bound against the model run by hand."""

import json
import math

import pytest
import torch

from mdlm_interp.diffusion import LogLinearSchedule, nelbo_per_token, subs_log_probs
from mdlm_interp.errors import DataError, OutputExistsError
from transcoder import evaluate
from transcoder.config import METRICS
from transcoder.evaluation import NoisedSequences
from transcoder.held_out import held_out_sequences
from transcoder.metrics import ReconstructionMetrics
from transcoder.report import write_report
from transcoder.training_log import read_log


@pytest.fixture(scope="module")
def evaluation(model, trained_directory, store):
    from transcoder.checkpoint import load_clt

    return evaluate(model, load_clt(trained_directory), store, batch_size=3)


@pytest.mark.parametrize("stratum", ["all", "unmasked", "masked"])
def test_metrics_are_those_of_all_rows_together_whatever_the_batches(clt, rows, stratum):
    clt.requires_grad_(False)
    is_masked = torch.arange(64) % 3 == 0
    metrics = ReconstructionMetrics(clt)
    for part in (slice(0, 10), slice(10, 11), slice(11, 64)):
        metrics.update(rows[0][:, part], rows[1][:, part], is_masked[part])
    chosen = {"all": is_masked | True, "unmasked": ~is_masked, "masked": is_masked}[stratum]
    acts = clt.encode(rows[0])[:, chosen]
    for layer, found in enumerate(metrics.layers(stratum)):
        y, y_hat = (tensor[layer, chosen].double() for tensor in (rows[1], clt(rows[0])))
        error = y_hat - y
        variance = (y - y.mean(0)).square().sum()
        assert found.n_rows == int(chosen.sum())
        assert found.fvu == pytest.approx(float(error.square().sum() / variance), rel=1e-6)
        centred = (error - error.mean(0)).square().sum()
        assert found.explained_variance == pytest.approx(float(1 - centred / variance), rel=1e-6)
        cosine = torch.nn.functional.cosine_similarity(y_hat, y, dim=-1).mean()
        assert found.cosine == pytest.approx(float(cosine), rel=1e-6)
        assert found.l0 == pytest.approx(float((acts[layer] > 0).sum(-1).double().mean()))
        assert found.dead == int((acts[layer] == 0).all(0).sum())
    density = torch.from_numpy(metrics.density(stratum))
    assert torch.allclose(density, (acts > 0).double().mean(1))


def test_a_stratum_without_rows_is_nan(clt, rows):
    metrics = ReconstructionMetrics(clt)
    metrics.update(rows[0], rows[1], torch.zeros(64, dtype=torch.bool))
    assert math.isnan(metrics.layers("masked")[0].fvu)
    assert metrics.layers("masked")[0].n_rows == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("condition", "value"), [("original", None), ("zero ablation", 0.0), ("mean ablation", "mean")]
)
def test_the_bound_is_that_of_the_model_with_hooks_written_by_hand(
    model, trained, store, evaluation, condition, value
):
    chosen = torch.from_numpy(held_out_sequences(trained, store))
    x_0, x_t = (tokens[chosen] for tokens in store.tokens())
    t = store.times()[chosen]
    sigma = LogLinearSchedule().sigma(t).float()
    original = model(x_t, sigma)

    def ablate(tensor, hook):
        layer = int(hook.name.split(".")[1])
        return (
            trained.out_mean[layer].expand_as(tensor).clone() if value == "mean" else torch.zeros_like(tensor)
        )

    with model.hooks({} if value is None else {"blocks.*.hook_mlp_out": ablate}):
        logits = model(x_t, sigma)
    score = evaluation.conditions[condition]
    mask_id = model.config.mask_id
    expected = nelbo_per_token(logits.double(), x_0, x_t, t, mask_id).mean()
    assert score.nelbo == pytest.approx(float(expected), rel=1e-5)
    is_masked = x_t == mask_id
    p, q = (subs_log_probs(scores.double(), x_t, mask_id)[is_masked][:, :-1] for scores in (original, logits))
    assert score.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4, abs=1e-9)
    assert score.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_replacing_moves_the_model_less_than_ablating(evaluation):
    scores = evaluation.conditions
    assert 0.0 == scores["original"].kl < scores["replaced"].kl < 0.2 * scores["zero ablation"].kl
    assert scores["original"].top1_agreement == 1.0
    assert len(evaluation.replaced_alone) == len(evaluation.zero_alone) == 3


def test_the_batch_size_changes_results_by_rounding_only(model, trained, store, evaluation):
    other = evaluate(model, trained, store, batch_size=8)
    for name, score in evaluation.conditions.items():
        assert other.conditions[name].nelbo == pytest.approx(score.nelbo, rel=1e-5)


def test_a_limit_spreads_over_the_sequences(model, trained, store):
    assert evaluate(model, trained, store, max_sequences=2).n_sequences == 2


def test_clean_tokens_are_noised_by_the_seed_alone(model, trained, store):
    x_0 = store.tokens()[0][:6]
    noised = NoisedSequences.from_tokens(x_0, model.config.mask_id, seed=2)
    a, b = evaluate(model, trained, x_0, seed=2), evaluate(model, trained, noised)
    assert a.conditions == b.conditions
    assert a.conditions != evaluate(model, trained, x_0, seed=3).conditions


def test_sequences_without_a_mask_are_an_error(model, trained, store):
    x_0 = store.tokens()[0][:2]
    with pytest.raises(DataError, match="no position of the evaluated sequences is masked"):
        evaluate(model, trained, NoisedSequences(x_0, x_0, torch.tensor([0.1, 0.2], dtype=torch.float64)))


def test_the_report_has_every_figure_and_plots_that_open(evaluation, trained_directory, tmp_path):
    about = {"model": "tiny"}
    log = read_log(trained_directory / METRICS)
    files = write_report(evaluation, tmp_path / "report", about=about, training_log=log)
    names = ["report.md", "report.json", "fvu.png", "nelbo.png", "density.png", "training.png"]
    assert [file.name for file in files] == names
    stored = json.loads(files[1].read_text())
    assert stored["conditions"]["replaced"]["nelbo"] == evaluation.conditions["replaced"].nelbo
    assert stored["layers"]["masked"][2]["fvu"] == evaluation.layers["masked"][2].fvu
    assert stored["about"] == about
    text = files[0].read_text()
    assert f"{evaluation.conditions['replaced'].nelbo:.3f}" in text
    assert f"{evaluation.layers['all'][1].fvu:.3f}" in text
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
