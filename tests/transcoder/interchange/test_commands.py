"""The commands, and the jumprelu that stands in for a topk."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from capture import open_store
from mdlm_interp.__main__ import main
from mdlm_interp.errors import DataError
from transcoder import CrossLayerTranscoder, TranscoderConfig, evaluate
from transcoder.checkpoint import load_clt
from transcoder.eval_scores import MEAN, ZERO
from transcoder.evaluation import NoisedSequences
from transcoder.interchange import export_clt, import_clt
from transcoder.interchange.thresholds import as_jumprelu, held_out_rows
from transcoder.run import train


def run(capsys, *argv):
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_trained_topk_goes_out_as_a_jumprelu_and_comes_back_to_be_evaluated(
    trained_directory, store, model_directory, tmp_path, capsys
):
    out, back = tmp_path / "out", tmp_path / "back"
    options = ["--to", "circuit-tracer", "--out", out, "--store", store.path, "--jumprelu"]
    code, text, error = run(capsys, "clt", "export", trained_directory, *options, "--model", model_directory)
    assert (code, error) == (0, "")
    assert "warning: topk with k = 8 became a jumprelu, another function" in text
    assert "reads blocks.{layer}.mlp.hook_in, writes blocks.{layer}.hook_mlp_out" in text
    assert "bound" in text
    assert "of the store's held-out text" in text
    assert "note: load_clt's default is bfloat16" in text
    record = json.loads((out / "interchange.json").read_text())
    assert record["certificate"]["rows_of"] == "of the store's held-out text"
    assert record["certificate"]["reconstruction"]["share"] <= 1.0
    code, text, _ = run(capsys, "clt", "import", out, "--out", back)
    assert code == 0
    assert "activation=jumprelu, from circuit-tracer" in text
    clt = load_clt(back, model_directory)
    x = held_out_rows(clt, open_store(store.path), 64)
    before = load_clt(trained_directory)
    expected = as_jumprelu(before, held_out_rows(before, open_store(store.path), 4096)).clt
    # A calibrated threshold lies between two neighbouring values of these very rows, which float32 may switch.
    distance = (expected.all_pre_acts(x) - expected.thresholds()[:, None]).abs().amin((0, 2))
    decided = x[:, distance > 1e-4]
    assert decided.shape[1] >= 32
    torch.testing.assert_close(clt(decided), expected(decided), rtol=0, atol=2e-5)


def test_the_stand_in_has_as_many_features_on_average_and_says_which(trained, store):
    rows = held_out_rows(trained, store, 4096)
    found = as_jumprelu(trained, rows)
    after, before = found.clt.encode(rows) > 0, trained.encode(rows) > 0
    # The threshold is kept as a float32 logarithm, so values that near to it may be on its other side; a few rows
    # have almost the same input, and so values that are almost equal.
    theta = found.clt.thresholds()[:, None]
    near = ((trained.all_pre_acts(rows) - theta).abs() <= 1e-6 * theta).sum((1, 2))
    assert ((after.sum((1, 2)) - 8 * rows.shape[1]).abs() <= near).all()
    assert (near <= 0.05 * 8 * rows.shape[1]).all()
    assert found.kept == pytest.approx(float((after & before).sum() / before.sum()))
    assert found.extra == pytest.approx(float((after & ~before).sum() / after.sum()))
    assert 0.5 < found.kept < 1.0
    with pytest.raises(DataError, match="this transcoder is jumprelu already"):
        as_jumprelu(found.clt, rows)


def test_an_uncalibrated_batchtopk_is_refused_without_rows_and_calibrated_with(trained, store, tmp_path):
    from transcoder.interchange import export_clt

    by_batch = CrossLayerTranscoder(replace(trained.config, activation="batchtopk"))
    by_batch.load_state_dict(trained.state_dict())
    by_batch.training_sequences, by_batch.provenance = trained.training_sequences, trained.provenance
    with pytest.raises(DataError, match="depend on the other rows of a batch"):
        export_clt(by_batch, tmp_path / "out", "crosslayer-coding")
    found = as_jumprelu(by_batch, held_out_rows(by_batch, store, 4096))
    assert found.kept >= 0.995  # all but values within float32's rounding of the threshold
    assert found.extra <= 0.005
    export_clt(found.clt, tmp_path / "out", "crosslayer-coding")


def test_held_out_rows_are_of_sequences_that_training_never_saw(trained, store):
    from transcoder.held_out import is_training_text

    held_out = (~is_training_text(trained, store.tokens()[0])).nonzero()[0]
    rows = held_out_rows(trained, store, 10**6)
    assert rows.shape == (3, 24 * len(held_out), 32)
    first = store.read(store.sequence_rows(int(held_out[0])), ["blocks.0.mlp.hook_in"])
    assert torch.equal(rows[0, :24], first["blocks.0.mlp.hook_in"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clt", "export", "{trained}", "--to", "circuit-tracer"], "missing --out (path)"),
        (
            ["clt", "export", "{trained}", "--to", "circuit-trace", "--out", "{tmp}/x"],
            "did you mean 'circuit-tracer'",
        ),
        (
            ["clt", "export", "{trained}", "--to", "saelens", "--out", "{tmp}/x"],
            "these features write to 3 layers",
        ),
        (
            ["clt", "export", "{trained}", "--to", "circuit-tracer", "--out", "{tmp}/x"],
            "no place for topk's k = 8",
        ),
        (
            ["clt", "export", "{trained}", "--to", "crosslayer-coding", "--out", "{tmp}/x"],
            "over the batch, another function",
        ),
        (["clt", "export", "{trained}", "--to", "saelens", "--out", "{tmp}"], "exists and is not empty"),
        (
            ["clt", "export", "{trained}", "--to", "saelens", "--out", "{tmp}/x", "--jumprelu"],
            "jumprelu needs held-out rows to calibrate thresholds on; add --store",
        ),
        (
            ["clt", "export", "{trained}", "--to", "saelens", "--out", "{tmp}/x", "--fold", "both"],
            "fold both needs the model whose adaLN is folded in; add --model",
        ),
        (["clt", "import", "{tmp}", "--out", "{tmp}/x"], "is it the right directory"),
        (["clt", "import", "{trained}", "--out", "{tmp}/x"], "is a transcoder of this package already"),
        (
            ["clt", "import", "{tmp}", "--out", "{tmp}/x", "--input-hook", "mlp"],
            "input_hook must be a hook point with {layer}",
        ),
        (["clt", "import", "{tmp}", "--out", "{tmp}"], "exists and is not empty"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, trained_directory, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    places = {"tmp": str(tmp_path), "trained": str(trained_directory)}
    words = [word.format(**places) if word.startswith("{") else word for word in argv]
    code, _, error = run(capsys, *words)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_files_of_two_exports_are_not_taken_for_one(draw, tmp_path, capsys):
    config = TranscoderConfig(n_layers=3, d_model=4, n_features=5, activation="jumprelu")
    for number in (1, 2):
        export_clt(draw(config, number), tmp_path / str(number), "circuit-tracer")
    shutil.copy(tmp_path / "2" / "W_dec_2.safetensors", tmp_path / "1")
    code, _, error = run(capsys, "clt", "import", tmp_path / "1", "--out", tmp_path / "back")
    assert code == 2
    assert "W_dec_2.safetensors is not the file that interchange.json was written with; restore the" in error
    assert not (tmp_path / "back").exists()
    (tmp_path / "1" / "interchange.json").unlink()
    assert run(capsys, "clt", "import", tmp_path / "1", "--out", tmp_path / "back")[0] == 0


def test_an_imported_transcoder_is_evaluated_with_the_stores_mean_and_variance(
    run_config, model, store, tmp_path
):
    """Bounded: the weights were rounded once, and the mean and the unit of errors are the store's."""
    settings = replace(run_config.train, sparsity="tanh")
    trained = train(replace(run_config, activation="jumprelu", k=None, train=settings))
    export_clt(trained, tmp_path / "out", "circuit-tracer")
    imported = import_clt(tmp_path / "out").clt
    before, after = (evaluate(model, clt, store, oracle_sequences=None) for clt in (trained, imported))
    zero, mean = (before.delta_nelbo(kind).value for kind in (ZERO, MEAN))
    assert abs(zero - mean) > 1e-3  # they can be told apart
    assert after.delta_nelbo(MEAN).value == pytest.approx(mean, abs=1e-6)
    for ours, theirs in zip(before.layers["all"], after.layers["all"], strict=True):
        assert theirs.nmse == pytest.approx(ours.nmse, rel=1e-3)
    given = NoisedSequences.from_store(store, [0, 1])
    with pytest.raises(DataError, match="was imported and keeps no mean of the MLP outputs; hand evaluate"):
        evaluate(model, imported, given, oracle_sequences=None)
