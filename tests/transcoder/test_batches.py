"""Batches: a pure function of (seed, step), every training row at most once an epoch, held-out rows never."""

import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from capture.convert.export import export_store
from mdlm_interp.errors import DataError, StoreError
from transcoder.batches import StoreBatches, held_out_batches
from transcoder.checkpoint import load_clt
from transcoder.config import TrainConfig
from transcoder.data import infer_shape, split_sequences
from transcoder.run import train
from transcoder.windows import OwnRows

HOOKS = (["blocks.0.mlp.hook_in"], ["blocks.0.hook_mlp_out"])


def batches(store, **changes):
    split = split_sequences(store.tokens()[0], 0.2, 0)
    config = TrainConfig(**{"batch_size": 50, "window_chunks": 2, **changes})
    return StoreBatches(store, split.train, config, *HOOKS), split


def test_a_split_puts_each_sequence_on_one_side(store):
    x_0 = store.tokens()[0]
    split = split_sequences(x_0, 0.2, 0)
    assert sorted([*split.train, *split.held_out]) == list(range(40))
    assert len(split.held_out) == 8
    assert split.held_out.tolist() != split_sequences(x_0, 0.2, 1).held_out.tolist()
    assert split.held_out.tolist() == split_sequences(x_0, 0.2, 0).held_out.tolist()


def test_sequences_of_equal_text_stay_on_one_side():
    x_0 = torch.arange(30).reshape(10, 3).repeat(3, 1)
    for seed in range(5):
        split = split_sequences(x_0, 0.3, seed)
        assert {number % 10 for number in split.held_out}.isdisjoint(number % 10 for number in split.train)
        assert len(split.held_out) == 9


def test_a_store_with_one_text_cannot_be_split():
    with pytest.raises(DataError, match="at least 2 different sequences, the store has 1; capture more text"):
        split_sequences(torch.zeros(4, 3, dtype=torch.int64), 0.5, 0)


def test_an_epoch_has_training_rows_at_most_once_and_no_held_out_row(store):
    made, split = batches(store)
    epochs = [[made.rows(step) for step in range(epoch * 15, (epoch + 1) * 15)] for epoch in range(2)]
    rows = [np.concatenate(steps) for steps in epochs]
    for of_epoch in rows:
        assert len(np.unique(of_epoch)) == 750  # of 768: what does not fill a batch is left out
        assert np.isin(of_epoch // 24, split.train).all()
    assert set(rows[0]) != set(rows[1])
    assert made.cursor(16) == {"epoch": 1, "step_of_epoch": 1, "steps_per_epoch": 15}


def test_a_batch_is_a_pure_function_of_seed_and_step(store):
    walked, _ = batches(store)
    visited = [walked.batch(step) for step in range(40)]
    for step in (39, 17, 0, 16):
        fresh, _ = batches(store)
        batch = fresh.batch(step)
        assert np.array_equal(batch.rows, visited[step].rows)
        assert np.array_equal(batch.rows, fresh.rows(step))
        assert torch.equal(batch.x, visited[step].x)
        assert torch.equal(batch.y, visited[step].y)
    other, _ = batches(store, seed=1)
    assert not np.array_equal(other.rows(0), visited[0].rows)


def test_a_batch_holds_the_stores_activations_and_coordinates_of_its_rows(store):
    made, _ = batches(store)
    for step in (0, 15):
        batch = made.batch(step)
        coords = store.coords(batch.rows)
        assert torch.equal(batch.x[0], store.read(batch.rows)[HOOKS[0][0]])
        assert torch.equal(batch.y[0], store.read(batch.rows)[HOOKS[1][0]])
        assert torch.equal(batch.is_masked, coords["is_masked"])
        assert torch.equal(batch.t, coords["t"])
        assert batch.where["seq"].tolist() == (batch.rows // 24).tolist()
        assert batch.where["pos"].tolist() == (batch.rows % 24).tolist()


@pytest.mark.parametrize(
    ("select", "expected"), [("masked", {True}), ("unmasked", {False}), ("all", {True, False})]
)
def test_only_the_selected_rows_are_used(store, select, expected):
    made, split = batches(store, select=select, batch_size=20)
    assert set(torch.cat([made.batch(step).is_masked for step in range(10)]).tolist()) == expected
    config = TrainConfig(select=select)
    held_out = held_out_batches(store, split.held_out, config, *HOOKS)
    assert set(torch.cat([batch.is_masked for batch in held_out]).tolist()) == expected
    assert {int(row) // 24 for batch in held_out for row in batch.rows} <= set(split.held_out.tolist())


def test_t_bins_give_every_batch_as_many_rows_of_each_part_of_time(store):
    made, _ = batches(store, t_bins=5)
    plain, _ = batches(store)
    for step in range(30):
        batch = made.batch(step)
        assert np.bincount((batch.t.numpy() * 5).astype(int), minlength=5).tolist() == [10] * 5
        assert np.array_equal(batch.rows, made.rows(step))
    # The neighbour that fails: without them batches are as the store is.
    assert np.bincount((plain.batch(0).t.numpy() * 5).astype(int), minlength=5).tolist() != [10] * 5


def test_a_part_of_time_without_sequences_is_named(store):
    with pytest.raises(
        DataError, match=r"no training sequence has t in \[0.\d+, 0.\d+\), one of t_bins 50; lower"
    ):
        batches(store, t_bins=50)


def test_too_few_rows_for_a_batch_are_an_error(store):
    with pytest.raises(DataError, match="768 selected rows over 1 ranks make no full batch of 1000"):
        batches(store, batch_size=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "masked"},
        {"positions": "every", "every": 3},
        {"pack": "documents"},
        {"dtype": "bfloat16"},
        {"times": "fixed", "time": (0.2, 0.7)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_stores_of_any_rows_can_be_trained_on(capture, run_config, changes):
    store = capture(**changes)
    config = replace(run_config, store=store.path, train=replace(run_config.train, steps=3, batch_size=20))
    train(config)
    proof = load_clt(config.out).provenance["verification"]
    assert proof["rows"] > 0


@pytest.mark.parametrize(("to", "name"), [("hdf5", "run.h5"), ("safetensors", "run")])
def test_an_export_of_a_store_trains_the_same_bits(store, run_config, tmp_path, to, name):
    """Exact: the same rows in the same order from another container."""
    export_store(store, tmp_path / name, to=to)
    settings = replace(run_config.train, steps=5)
    expected = train(replace(run_config, train=settings))
    found = train(replace(run_config, store=tmp_path / name, out=tmp_path / "again", train=settings))
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert found.provenance["store"]["fingerprint"] == expected.provenance["store"]["fingerprint"]


def test_the_shape_is_read_off_the_store(store):
    assert infer_shape(store, "blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_mlp_out") == (3, 32)


def test_a_missing_hook_is_named_with_what_to_capture(store):
    with pytest.raises(
        StoreError, match=r"no 'blocks.0.mlp.hook_inn'; did you mean 'blocks.0.mlp.hook_in'\?"
    ):
        infer_shape(store, "blocks.{layer}.mlp.hook_inn", "blocks.{layer}.hook_mlp_out")
    with pytest.raises(
        StoreError, match=r"capture 'blocks.{layer}.mlp.hook_in' and 'blocks.{layer}.hook_out'"
    ):
        infer_shape(store, "blocks.{layer}.mlp.hook_in", "blocks.{layer}.hook_out")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (("blocks.*.mlp.hook_in", "blocks.0.hook_mlp_out"), r"no 'blocks\.1\.hook_mlp_out'"),
        (("blocks.*.hook_mlp_out", "blocks.0.mlp.hook_in"), r"no 'blocks\.1\.mlp\.hook_in'"),
        (
            ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"),
            "MLPs of all 3 blocks of the model, and the store has the hook points of 1; capture",
        ),
    ],
)
def test_a_store_of_some_blocks_is_refused_before_training(capture, run_config, hooks, message):
    with pytest.raises(StoreError, match=message):
        train(replace(run_config, store=capture(hooks=hooks).path))


@pytest.mark.parametrize(
    "changes", [{}, {"t_bins": 2, "window_chunks": 4}, {"select": "masked", "batch_size": 20}]
)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_parts_of_a_batch_are_what_the_whole_has_there(store, changes, world_size):
    """Exact, over the ends of windows and epochs: for one process as for the next."""
    whole, _ = batches(store, **changes)
    size = changes.get("batch_size", 50)
    share = size // world_size
    of_rank = [batches(store, **changes)[0] for _ in range(world_size)]
    for step in [*range(20), 3]:
        expected = whole.batch(step)
        assert np.array_equal(expected.rows, whole.rows(step))
        for rank, made in enumerate(of_rank):
            own = range(rank * share, (rank + 1) * share)
            found = made.batch(step, own)
            cut = slice(own.start, own.stop)
            assert np.array_equal(found.rows, expected.rows[cut])
            assert torch.equal(found.x, expected.x[:, cut])
            assert torch.equal(found.y, expected.y[:, cut])
            for name in ("is_masked", "t"):
                assert torch.equal(getattr(found, name), getattr(expected, name)[cut])
            assert all(torch.equal(found.where[name], expected.where[name][cut]) for name in found.where)


def windows_read(monkeypatch):
    """The rows of each window that is read from here on, by epoch and number, and what waits before each is read."""
    read, found, gate = OwnRows._read_own, {}, threading.Event()

    def reading(self, key):
        gate.wait(60)
        window = read(self, key)
        assert key[:2] not in found, "read twice"
        found[key[:2]] = window.own.rows.numpy()
        return window

    gate.set()
    monkeypatch.setattr(OwnRows, "_read_own", reading)
    return found, gate


def joined_threads():
    """Wait for what reads ahead."""
    for thread in threading.enumerate():
        if thread.name == "window read ahead":
            thread.join(60)


def test_a_process_reads_its_own_rows_alone_and_once(store, monkeypatch):
    made, _ = batches(store)
    found, _ = windows_read(monkeypatch)
    used = np.concatenate([made.batch(step, range(10, 35)).rows for step in range(15)])
    joined_threads()
    of_epoch = [rows for (epoch, _), rows in found.items() if epoch == 0]
    wanted = np.concatenate(of_epoch)
    assert len(np.unique(wanted)) == len(wanted)
    assert np.isin(used, wanted).all()
    assert len(used) <= len(wanted) < len(used) + 25  # what fills no batch at the end of an epoch
    # Of the next epoch no more than the window that its first batch wants.
    assert set(found) - {(0, number) for number in range(len(of_epoch))} <= {(1, 0)}


def test_the_next_window_is_read_while_the_batches_of_one_are_used_and_no_further(store, monkeypatch):
    made, _ = batches(store)
    found, gate = windows_read(monkeypatch)
    made.batch(0)
    joined_threads()
    assert list(found) == [(0, 0), (0, 1)]
    gate.clear()
    # A batch of two windows keeps both; only when the first is given up is the next one begun.
    spanning = next(step for step in range(1, 15) if len(made._parts[0]._pieces(0, step)) == 2)
    for step in range(1, spanning + 1):
        made.batch(step)
    assert not [thread for thread in threading.enumerate() if thread.name == "window read ahead"]
    made.batch(spanning + 1)
    assert [thread for thread in threading.enumerate() if thread.name == "window read ahead"]
    assert list(found) == [(0, 0), (0, 1)]
    gate.set()
    joined_threads()
    assert list(found) == [(0, 0), (0, 1), (1, 0)]


def test_going_to_another_place_takes_no_window_that_was_read_for_elsewhere(store):
    made, _ = batches(store)
    for step in (0, 12, 3, 31, 0, 14, 15):
        fresh, _ = batches(store)
        found, expected = made.batch(step), fresh.batch(step)
        assert torch.equal(found.x, expected.x)
        assert np.array_equal(found.rows, expected.rows)


def test_what_goes_wrong_while_reading_ahead_is_raised_where_the_window_is_wanted(reopened, monkeypatch):
    made, _ = batches(reopened)
    read = reopened.read

    def failing(rows, hooks=None):
        if threading.current_thread() is not threading.main_thread():
            raise StoreError("a disk failed")
        return read(rows, hooks)

    monkeypatch.setattr(reopened, "read", failing)
    first = next(step for step in range(15) if len(made._parts[0]._pieces(0, step)) == 2)
    for step in range(first):
        made.batch(step)
    with pytest.raises(StoreError, match="a disk failed"):
        made.batch(first)
    # Asked again, it is read again.
    made.batch(first)


def test_a_forked_process_reads_what_the_threads_it_has_not_were_reading(store, monkeypatch):
    made, _ = batches(store)
    expected = batches(store)[0].batch(15).x
    joined_threads()
    _, gate = windows_read(monkeypatch)
    made.batch(0)
    joined_threads()
    gate.clear()
    made.batch(next(step for step in range(15) if made._parts[0]._pieces(0, step)[0][0] == 1))
    child = os.fork()
    if not child:
        signal.alarm(60)  # of one that waits for ever
        gate.set()
        os._exit(0 if torch.equal(made.batch(15).x, expected) else 1)
    gate.set()
    assert os.waitpid(child, 0)[1] == 0
