"""What counts as held out: by the text of sequences, in any store, and only in a store of the same origin."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from capture import open_store
from mdlm_interp import HookedMDLM
from mdlm_interp.__main__ import main
from mdlm_interp.errors import CheckpointError, DataError, StoreError
from transcoder import CrossLayerTranscoder, TranscoderConfig, evaluate, run
from transcoder.calibration import calibrated
from transcoder.checkpoint import load_clt, save_clt
from transcoder.config import LiveConfig
from transcoder.data import split_sequences
from transcoder.evaluation import NoisedSequences
from transcoder.held_out import (
    held_out_sequences,
    is_training_text,
    sequence_hashes,
    split_text,
    training_hashes,
    window_hashes,
)
from transcoder.identity import check_store
from transcoder.report import held_out, summary
from transcoder.run import train

WORDS_OF_OTHERS = "a quick brown dog jumps over one lazy cat while we wait for some rain"


@pytest.fixture
def other_text(tmp_path):
    """A file with nothing of the training text in it."""
    words = WORDS_OF_OTHERS.split()
    texts = [" ".join(words[(n * 5 + i * i) % len(words)] for i in range(14)) for n in range(40)]
    file = tmp_path / "other.txt"
    file.write_text("\n\n".join(texts), encoding="utf-8")
    return file


def trained_on(hashes, record):
    """A transcoder that says so."""
    clt = CrossLayerTranscoder(TranscoderConfig(n_layers=1, d_model=2, n_features=3, k=1))
    clt.training_sequences, clt.provenance = hashes, {"text_windows": record}
    return clt


def with_provenance(store, monkeypatch, **changes):
    """The store with other entries of its provenance; None takes one away."""
    entries = {**store.provenance, **changes}
    kept = {name: value for name, value in entries.items() if value is not None}
    monkeypatch.setattr(type(store), "provenance", property(lambda self: kept))
    return store


def test_a_hash_is_a_function_of_the_clean_tokens_alone():
    x_0 = torch.randint(0, 50, (200, 9), generator=torch.Generator().manual_seed(0))
    hashes = sequence_hashes(x_0)
    assert np.array_equal(sequence_hashes(x_0.flip(0)), hashes[::-1])
    assert len(np.unique(hashes)) == len(torch.unique(x_0, dim=0)) == 200
    # Exact: what is recorded today is compared in years to come.
    assert sequence_hashes(torch.tensor([[1, 2, 3]])).tolist() == [-5405627362230748553]


def test_of_its_own_store_the_held_out_side_of_the_split_is_evaluated(model, trained, store):
    held_out = held_out_sequences(trained, store)
    assert set(held_out.tolist()) <= set(split_sequences(store.tokens()[0], 0.2, 6).held_out.tolist())
    evaluation = evaluate(model, trained, store)
    assert evaluation.n_sequences == len(held_out) == 5
    assert evaluation.n_positions == 5 * 24
    assert evaluation.n_excluded == 35


def test_training_text_captured_again_with_other_noise_is_not_held_out(model, trained, store, capture):
    again = capture(seed=4)
    assert again.fingerprint() != store.fingerprint()
    assert held_out_sequences(trained, again).tolist() == held_out_sequences(trained, store).tolist()
    evaluation = evaluate(model, trained, again)
    assert (evaluation.n_sequences, evaluation.n_excluded) == (5, 35)
    message = (
        "held out: 5 sequences of 5 texts used; 35 of the store excluded, as the transcoder was trained on "
        "their text"
    )
    assert held_out(evaluation) == message
    assert message in summary(evaluation)


def test_of_other_text_everything_is_held_out(model, trained, capture, other_text):
    evaluation = evaluate(model, trained, capture(files=(other_text,), max_sequences=10))
    assert (evaluation.n_sequences, evaluation.n_excluded) == (10, 0)


def test_a_store_with_nothing_but_training_text_is_refused(model, trained, store, reopened, monkeypatch):
    seen = split_sequences(store.tokens()[0], 0.2, 6).train[:5]
    monkeypatch.setattr(reopened, "tokens", lambda: tuple(tokens[seen] for tokens in store.tokens()))
    with pytest.raises(
        DataError, match="all 5 sequences of the store are text that the transcoder was trained"
    ):
        evaluate(model, trained, reopened)


@pytest.mark.parametrize(("length", "offset"), [(64, 0), (128, 5), (100, 0), (300, 40), (126, 63)])
def test_training_text_cut_at_other_places_is_excluded_and_no_other(length, offset):
    stream = torch.randint(0, 300, (20_000,), generator=torch.Generator().manual_seed(0))
    cut = stream[: 126 * 150].reshape(150, 126)
    split = split_sequences(cut, 0.3, 1)
    is_seen = torch.zeros(len(stream), dtype=torch.bool)
    for number in split.train.tolist():
        is_seen[126 * number : 126 * (number + 1)] = True
    hashes, record = training_hashes(cut[split.train])
    clt = trained_on(hashes, record)
    again = stream[offset : offset + (len(stream) - offset) // length * length].reshape(-1, length)
    share = is_seen[offset : offset + again.numel()].reshape(-1, length).double().mean(1)
    found = torch.from_numpy(is_training_text(clt, again))
    assert found[share > 0.5].all()
    assert not found[share < 0.1].any()
    assert (share > 0.5).sum() > 10
    assert (share < 0.1).sum() >= 3


def test_held_out_sequences_that_repeat_much_of_the_training_text_are_excluded_too(trained, store):
    x_0, split = store.tokens()[0], split_sequences(store.tokens()[0], 0.2, 6)
    windows = window_hashes(x_0)
    shares = [np.isin(windows[number], windows[split.train]).mean() for number in split.held_out]
    expected = [int(number) for number, share in zip(split.held_out, shares, strict=True) if share < 0.25]
    assert held_out_sequences(trained, store).tolist() == expected
    assert 0 < len(expected) < len(split.held_out)


@pytest.mark.parametrize("live", [False, True])
def test_a_run_calibrates_and_measures_itself_on_what_an_evaluation_takes(
    live, run_config, store, model_directory, text, monkeypatch
):
    """Exact: the sequences whose rows it is calibrated on, and its plots are of, are those of `clt eval`."""
    calibrated_on, drawn = [], []

    def looked_at(clt, batches):
        calibrated_on.append(torch.cat(list(batches), 1))
        return calibrated(clt, batches)

    monkeypatch.setattr(run, "calibrated", looked_at)
    monkeypatch.setattr(run, "draw_run", lambda clt, held_out, *_: drawn.extend(held_out))
    config = replace(
        run_config, activation="batchtopk", k=4, train=replace(run_config.train, plots=True, steps=2)
    )
    if live:
        rows = LiveConfig(files=(text,), length=24, max_sequences=40, window_sequences=6, batch_sequences=4)
        config = replace(config, store=None, live=rows, model=str(model_directory))
    clt = train(config)
    expected = held_out_sequences(clt, store).tolist()
    # The neighbour that fails: the split alone, of which some repeat the training side.
    assert set(expected) < set(split_sequences(store.tokens()[0], 0.2, 6).held_out.tolist())
    assert sorted({int(seq) for batch in drawn for seq in batch.where["seq"]}) == expected
    assert torch.equal(calibrated_on[0], torch.cat([batch.x for batch in drawn], 1))


def test_a_split_keeps_of_its_held_out_side_what_repeats_no_training_text():
    stream = torch.randint(0, 300, (40, 64), generator=torch.Generator().manual_seed(0))
    plain = split_text(stream, 0.25, 1)
    assert (len(plain.held_out), plain.n_repeated) == (10, 0)
    copied = stream.clone()
    repeats, differs = plain.held_out[:4].tolist(), plain.held_out[4:].tolist()
    copied[repeats, :32] = stream[plain.train[:4], 32:]
    split = split_text(copied, 0.25, 1)
    assert split.held_out.tolist() == differs
    assert split.n_repeated == 4
    assert np.array_equal(split.train, plain.train)
    clt = trained_on(split.hashes, split.windows)
    assert (~is_training_text(clt, copied)).nonzero()[0].tolist() == differs


def test_a_store_whose_held_out_side_only_repeats_its_training_side_is_refused_before_training(
    run_config, reopened, monkeypatch
):
    x_0 = reopened.tokens()[0]
    repeated = torch.cat([x_0[:1, :12].expand(len(x_0), 12), x_0[:, 12:]], 1)
    monkeypatch.setattr(reopened, "tokens", lambda: (repeated, repeated))
    message = (
        r"all \d+ sequences on the held-out side of the split repeat text of the training side \(0.25 or more of "
        r"their windows of 8 tokens\), nothing is held out; use more varied text"
    )
    with pytest.raises(DataError, match=message):
        train(run_config, store=reopened)
    assert not (run_config.out / "metrics.jsonl").exists()


def test_training_text_out_of_another_file_is_excluded(model, trained, store, capture, text, tmp_path):
    shifted = tmp_path / "shifted.txt"
    shifted.write_text(text.read_text(encoding="utf-8").partition("\n\n")[2], encoding="utf-8")
    again = capture(files=(shifted,), max_sequences=30)
    held_out = held_out_sequences(trained, again)
    assert 0 < len(held_out) < 15
    assert evaluate(model, trained, again).n_excluded == 30 - len(held_out)


def test_of_a_large_text_a_share_of_the_windows_is_kept_and_still_finds_it(monkeypatch):
    x_0 = torch.randint(0, 50, (40, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("transcoder.held_out.MOST_WINDOWS", 300)
    hashes, record = training_hashes(x_0[:30])
    assert record == {"tokens": 8, "one_in": 8}
    assert 150 < len(hashes) - 30 < 300
    clt = trained_on(hashes, record)
    shifted = torch.roll(x_0, 5, 1)
    assert is_training_text(clt, shifted).tolist() == [True] * 30 + [False] * 10


def test_what_lies_behind_a_shorter_sequence_is_no_text():
    x_0 = torch.full((2, 30), -1)
    x_0[0, :10] = torch.arange(10)
    x_0[1, :12] = torch.arange(20, 32)
    assert (window_hashes(x_0) != 0).sum(1).tolist() == [3, 5]
    assert window_hashes(x_0[:, :7]).shape == (2, 0)


def test_what_it_was_trained_on_is_saved_with_it(trained, store, tmp_path):
    x_0 = store.tokens()[0][split_sequences(store.tokens()[0], 0.2, 6).train]
    assert np.isin(sequence_hashes(x_0), trained.training_sequences).all()
    assert np.array_equal(trained.training_sequences, training_hashes(x_0)[0])
    save_clt(trained, tmp_path)
    loaded = load_clt(tmp_path).training_sequences
    assert loaded is not None
    assert np.array_equal(loaded, trained.training_sequences)


def test_a_transcoder_without_that_record_is_not_called_held_out(model, trained, store, tmp_path):
    trained.training_sequences = None
    save_clt(trained, tmp_path)
    loaded = load_clt(tmp_path)
    with pytest.raises(CheckpointError, match="does not record which text it was trained on"):
        evaluate(model, loaded, store)
    given = evaluate(model, loaded, NoisedSequences.from_store(store, [0, 1]))
    assert given.n_excluded is None
    assert held_out(given) == "2 sequences of 2 texts as given; whether training saw them was not looked at"


# Where the store comes from


@pytest.mark.parametrize(("entry", "what"), [("weights_sha256", "model"), ("tokenizer_sha256", "tokenizer")])
def test_a_store_of_another_origin_is_refused_with_both_hashes(
    model, trained, reopened, monkeypatch, entry, what
):
    ours = reopened.provenance[entry][:12]
    foreign = with_provenance(reopened, monkeypatch, **{entry: "f" * 64})
    message = (
        rf"captured with another {what} \(sha256 ffffffffffff\) than .* trained on \(sha256 {ours}\); capture"
    )
    with pytest.raises(StoreError, match=message):
        evaluate(model, trained, foreign)


@pytest.mark.parametrize(("entry", "what"), [("weights_sha256", "model"), ("tokenizer_sha256", "tokenizer")])
def test_a_store_that_does_not_say_where_it_comes_from_is_refused(
    model, trained, run_config, reopened, monkeypatch, entry, what
):
    nameless = with_provenance(reopened, monkeypatch, **{entry: None})
    message = (
        f"does not say which {what} it was captured with: its provenance has no {entry}; capture it again"
    )
    with pytest.raises(StoreError, match=message):
        evaluate(model, trained, nameless)
    with pytest.raises(StoreError, match=message):
        train(run_config, store=nameless)


def test_a_transcoder_that_does_not_say_where_it_comes_from_is_refused(model, trained, store):
    trained.provenance = {}
    with pytest.raises(CheckpointError, match="does not say which model its activations came from"):
        check_store(trained, store)


def test_the_command_refuses_a_store_of_another_model(
    model_directory, trained_directory, capture, tmp_path, capsys
):
    other = HookedMDLM.from_pretrained(model_directory)
    with torch.no_grad():
        dict(other.named_parameters())["backbone.blocks.0.mlp.2.weight"].mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(model_directory / "tokenizer.json", tmp_path / "other")
    foreign = capture(model=str(tmp_path / "other"))
    command = ["clt", "eval", trained_directory, foreign.path, "--model", model_directory]
    assert main([*map(str, command), "--out", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"captured with another model (sha256 {foreign.provenance['weights_sha256'][:12]})" in error
    assert not (tmp_path / "report").exists()


# An interrupted capture


def test_an_incomplete_store_is_trained_on_with_a_warning_and_told_in_the_report(
    run_config, interrupted, model_directory, monkeypatch, caplog, tmp_path, capsys
):
    clt = train(run_config, store=interrupted)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    held = "720 of 960 planned rows (INCOMPLETE, its capture did not run to the end)"
    assert warnings == [f"the store has only {held}; training goes on with these"]
    assert clt.provenance["store"]["coverage"] == {
        "committed_rows": 720, "planned_rows": 960, "complete": False
    }  # fmt: skip
    monkeypatch.setattr("capture.open_store", lambda path: interrupted)
    command = ["clt", "eval", run_config.out, run_config.store, "--model", model_directory]
    assert main([*map(str, command), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"- training store: {held}" in text
    assert f"- evaluated store: {held}" in text


def test_a_complete_store_gives_no_warning(run_config, caplog):
    train(run_config, store=open_store(run_config.store))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
