"""What counts as held out: by the text of sequences, in any store, and only in a store of the same origin."""

import shutil

import numpy as np
import pytest
import torch

from capture import open_store
from mdlm_interp import HookedMDLM
from mdlm_interp.__main__ import main
from mdlm_interp.errors import CheckpointError, DataError, StoreError
from transcoder import evaluate
from transcoder.checkpoint import load_clt, save_clt
from transcoder.data import split_sequences
from transcoder.evaluation import NoisedSequences
from transcoder.held_out import check_cut, cut_of, held_out_sequences, sequence_hashes
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
    assert held_out.tolist() == split_sequences(store.tokens()[0], 0.2, 6).held_out.tolist()
    evaluation = evaluate(model, trained, store)
    assert evaluation.n_sequences == len(held_out) == 8
    assert evaluation.n_positions == 8 * 24
    assert evaluation.n_excluded == 32


def test_training_text_captured_again_with_other_noise_is_not_held_out(model, trained, store, capture):
    again = capture(seed=4)
    assert again.fingerprint() != store.fingerprint()
    assert held_out_sequences(trained, again).tolist() == held_out_sequences(trained, store).tolist()
    evaluation = evaluate(model, trained, again)
    assert (evaluation.n_sequences, evaluation.n_excluded) == (8, 32)
    message = (
        "held out: 8 sequences used; 32 of the store excluded, as the transcoder was trained on their text"
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


@pytest.mark.parametrize("changes", [{"length": 16}, {"wrap": False}])
def test_training_text_cut_into_other_sequences_is_refused(model, trained, capture, text, changes):
    message = r"the text file with sha256 [0-9a-f]{12} is in this store and in the training store, cut into"
    with pytest.raises(DataError, match=message):
        evaluate(model, trained, capture(**changes))


def test_a_file_counts_as_cut_alike_only_behind_the_same_files(model, trained, capture, text, other_text):
    assert evaluate(model, trained, capture(files=(text, other_text), max_sequences=60)).n_excluded == 32
    with pytest.raises(DataError, match="is in this store and in the training store, cut into"):
        evaluate(model, trained, capture(files=(other_text, text), max_sequences=60))


@pytest.mark.parametrize(
    ("before", "now", "alike"),
    [
        ("ab", "ab", True),
        ("a", "ab", True),
        ("ab", "a", True),
        ("ab", "ac", True),
        ("ab", "cd", True),
        ("ab", "ba", False),
        ("ab", "b", False),
        ("a", "ba", False),
        ("a", "aa", False),
    ],
)
def test_files_are_cut_alike_up_to_the_first_that_differs(reopened, monkeypatch, before, now, alike):
    def sources(files):
        return [{"sha256": file} for file in files]

    trained_on = {"cut": cut_of(with_provenance(reopened, monkeypatch, sources=sources(before)))}
    store = with_provenance(reopened, monkeypatch, sources=sources(now))
    if alike:
        check_cut(trained_on, store)
    else:
        with pytest.raises(DataError, match=r"in this store and in the training store, cut into sequences"):
            check_cut(trained_on, store)


def test_what_it_was_trained_on_is_saved_with_it(trained, store, tmp_path):
    expected = sequence_hashes(store.tokens()[0])[split_sequences(store.tokens()[0], 0.2, 6).train]
    assert np.array_equal(trained.training_sequences, np.unique(expected))
    save_clt(trained, tmp_path)
    loaded = load_clt(tmp_path).training_sequences
    assert loaded is not None
    assert np.array_equal(loaded, trained.training_sequences)


def test_a_transcoder_without_that_record_is_not_called_held_out(model, trained, store, tmp_path):
    trained.training_sequences = None
    save_clt(trained, tmp_path)
    loaded = load_clt(tmp_path)
    with pytest.raises(CheckpointError, match="does not record which sequences it was trained on"):
        evaluate(model, loaded, store)
    given = evaluate(model, loaded, NoisedSequences.from_store(store, [0, 1]))
    assert given.n_excluded is None
    assert held_out(given) == "2 sequences as given; whether training saw them was not looked at"


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
