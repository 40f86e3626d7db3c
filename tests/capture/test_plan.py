"""Which tokens are recorded, at which times: functions of seed and block number, whatever the batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from capture import run_capture
from capture.manifest import ResumePoint
from capture.plan import batches, expected_share
from mdlm_interp import load_tokenizer


@pytest.fixture
def planned_rows(config):
    """Columns of all rows that a variation of the config plans, and the batches' first rows."""
    tokenizer = load_tokenizer(config.model)

    def plan(resume=None, **changes):
        found = list(batches(replace(config, tokenizer=config.model, **changes), tokenizer, resume))
        columns = [batch.row_columns(tokenizer.mask_id) for batch in found]
        return {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}, found

    return plan


def test_masked_and_unmasked_rows_are_the_two_parts_of_all(planned_rows):
    everything, _ = planned_rows()
    for positions in ("masked", "unmasked"):
        part, _ = planned_rows(positions=positions)
        kept = everything["is_masked"] == (positions == "masked")
        for name in ("pos", "x0", "xt", "is_masked", "doc"):
            assert np.array_equal(part[name], everything[name][kept]), (positions, name)


def test_every_third_position(planned_rows):
    rows, _ = planned_rows(positions="every", every=3)
    assert np.array_equal(rows["pos"], np.tile(np.arange(0, 24, 3), 21))


def test_random_positions_are_as_many_as_asked_ascending_and_vary_by_sequence(planned_rows):
    rows, _ = planned_rows(positions="random", per_sequence=5)
    pos = rows["pos"].reshape(21, 5)
    assert (np.diff(pos, axis=1) > 0).all()
    assert len({tuple(row) for row in pos.tolist()}) > 15
    # 21 * 5 draws over 24 positions: each is drawn 4.4 times on average.
    assert len(np.unique(pos)) > 18


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "masked"},
        {"positions": "random", "per_sequence": 3},
        {"times": "uniform"},
        {"times": "fixed", "time": (0.25, 0.75)},
        {"pack": "documents"},
    ],
)
def test_the_batch_size_changes_nothing_that_is_recorded(planned_rows, changes):
    expected, _ = planned_rows(**changes, batch_size=16)
    for size in (1, 5):
        rows, _ = planned_rows(**changes, batch_size=size)
        for name, values in expected.items():
            assert np.array_equal(rows[name], values), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"positions": "masked"}, {"times": "fixed", "time": (0.0, 0.4, 1.0)}, {"pack": "documents"}],
)
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_any_batch_can_be_made_from_its_resume_point(planned_rows, changes, positions, monkeypatch):
    monkeypatch.setattr("mdlm_interp.documents.blocks.GROUP_DOCUMENTS", 7)
    changes = {**changes, "positions": positions, "batch_size": 4, "max_sequences": None}
    _, expected = planned_rows(**changes)
    assert len({batch.resume.documents for batch in expected}) > 2
    for skipped, batch in enumerate(expected):
        _, again = planned_rows(resume=batch.resume, **changes)
        assert len(again) == len(expected) - skipped
        for left, right in zip(again, expected[skipped:], strict=True):
            assert (left.start, left.stop) == (right.start, right.stop)
            for name, values in right.sequence_columns().items():
                assert np.array_equal(left.sequence_columns()[name], values, equal_nan=name in ("t", "sigma"))
            for name, values in right.row_columns(300).items():
                assert np.array_equal(left.row_columns(300)[name], values), name


def test_the_masks_of_a_block_at_several_times_are_nested(planned_rows):
    _, found = planned_rows(times="fixed", time=(0.2, 0.5, 0.9), max_sequences=None)
    sequences = [sequence for batch in found for sequence in batch.sequences]
    assert len(sequences) % 3 == 0
    for low, middle, high in zip(*[iter(sequences)] * 3, strict=True):
        assert low.block_number == middle.block_number == high.block_number
        masks = [sequence.xt != sequence.block.ids for sequence in (low, middle, high)]
        assert not (masks[0] & ~masks[1]).any()
        assert not (masks[1] & ~masks[2]).any()
    shares = [np.mean([s.xt != s.block.ids for s in sequences[which::3]]) for which in range(3)]
    assert shares == pytest.approx([0.2, 0.5, 0.9], abs=0.1)


def test_unmasked_is_clean_text_at_time_zero(planned_rows):
    rows, found = planned_rows(times="unmasked")
    assert not rows["is_masked"].any()
    assert np.array_equal(rows["x0"], rows["xt"])
    assert {float(t) for batch in found for t in batch.times()} == {0.0}


def test_sequences_without_a_recorded_token_are_left_out_and_not_numbered(planned_rows):
    rows, found = planned_rows(times="fixed", time=(0.0, 0.02), positions="masked", max_sequences=None)
    numbers = [sequence.number for batch in found for sequence in batch.sequences]
    blocks = [sequence.block_number for batch in found for sequence in batch.sequences]
    assert numbers == list(range(len(numbers)))
    assert len(set(blocks)) < max(blocks)
    assert rows["is_masked"].all()


def test_the_row_budget_ends_with_the_last_sequence_that_fits(planned_rows):
    rows, _ = planned_rows(max_rows=100)
    assert len(rows["pos"]) == 96
    rows, _ = planned_rows(max_rows=96)
    assert len(rows["pos"]) == 96


def test_each_document_is_a_sequence_of_its_own_length(config):
    store = run_capture(replace(config, pack="documents", max_sequences=None, length=30))
    lengths = store.sequence_column("length").tolist()
    x0, _ = store.tokens()
    assert store.n_sequences == 40
    assert min(lengths) < max(lengths) == 30
    assert [int((row >= 0).sum()) for row in x0] == lengths
    for number in range(40):
        docs = store.sequence_column("doc")[number][1 : lengths[number] - 1]
        assert set(docs.tolist()) == {number}
        assert len(range(*store.sequence_rows(number).indices(len(store)))) == lengths[number]


def test_a_document_by_itself_gives_the_activations_of_that_text_alone(config):
    from mdlm_interp import HookedMDLM

    store = run_capture(replace(config, pack="documents", max_sequences=3, times="unmasked"))
    model = HookedMDLM.from_pretrained(config.model)
    for number in range(3):
        x0 = store.tokens()[0][number]
        with torch.inference_mode():
            _, cache = model.run_with_cache(x0[x0 >= 0][None], store.hooks)
        for name, values in store.read(store.sequence_rows(number)).items():
            assert torch.equal(values, cache[name][0]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "masked"},
        {"positions": "unmasked", "times": "fixed", "time": (0.1, 0.3)},
        {"positions": "every", "every": 5},
        {"positions": "random", "per_sequence": 7},
    ],
)
def test_the_expected_share_of_rows_is_the_one_that_comes(planned_rows, config, changes):
    rows, found = planned_rows(max_sequences=None, **changes)
    tokens = sum(len(sequence.xt) for batch in found for sequence in batch.sequences)
    assert expected_share(replace(config, **changes), config.length) == pytest.approx(
        len(rows["pos"]) / tokens, abs=0.05
    )


def test_resuming_at_the_beginning_is_beginning(planned_rows):
    expected, _ = planned_rows()
    again, _ = planned_rows(resume=ResumePoint())
    assert all(np.array_equal(again[name], values) for name, values in expected.items())
