"""Batches: a pure function of (seed, step), every training row once an epoch, held-out rows never."""

import numpy as np
import pytest
import torch

from mdlm_interp.errors import DataError, StoreError
from transcoder.data import CHUNK_ROWS, BatchLoader, RowOrder, infer_shape, read_rows, split_sequences

HOOKS = (["blocks.0.mlp.hook_in"], ["blocks.0.hook_mlp_out"])


def loader(store, *, seed=0, batch_size=50, window_chunks=2, held_out=0.2):
    split = split_sequences(store.tokens()[0], held_out, 0)
    order = RowOrder(split.train, store.length, seed=seed, window_chunks=window_chunks)
    return BatchLoader(store, order, batch_size, *HOOKS), split


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


@pytest.mark.parametrize("window_chunks", [1, 2, 100])
def test_an_epoch_has_every_training_row_once_and_no_held_out_row(store, window_chunks):
    batches, split = loader(store, window_chunks=window_chunks)
    rows = np.concatenate([batches.rows(step) for step in range(2 * 32 * 24 // 50 + 1)])
    training = np.flatnonzero(np.isin(np.arange(len(store)) // store.length, split.train))
    for epoch in range(2):
        assert np.array_equal(np.sort(rows[epoch * 768 : (epoch + 1) * 768]), training)
    assert not np.array_equal(rows[:768], rows[768:1536])


def test_an_epoch_is_shuffled_across_sequences(store):
    batches, _ = loader(store, window_chunks=100)
    assert len(set(batches.rows(0) // store.length)) > 20


def test_a_batch_is_a_pure_function_of_seed_and_step(store):
    walked, _ = loader(store)
    visited = [walked.batch(step) for step in range(40)]
    for step in (39, 17, 0, 16):
        fresh, _ = loader(store)
        batch = fresh.batch(step)
        assert np.array_equal(batch.rows, visited[step].rows)
        assert np.array_equal(batch.rows, fresh.rows(step))
        assert torch.equal(batch.x, visited[step].x)
        assert torch.equal(batch.y, visited[step].y)
    other, _ = loader(store, seed=1)
    assert not np.array_equal(other.rows(0), visited[0].rows)


def test_a_batch_holds_the_stores_activations_of_its_rows(store):
    batches, _ = loader(store, window_chunks=1)
    for step in (0, 15):
        batch = batches.batch(step)
        assert batch.x.shape == (1, 50, 32)
        assert torch.equal(batch.x[0], store.read(batch.rows)[HOOKS[0][0]])
        assert torch.equal(batch.y[0], store.read(batch.rows)[HOOKS[1][0]])


def test_a_store_that_fits_one_window_is_read_once(store, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return read_rows(*args)

    monkeypatch.setattr("transcoder.data.read_rows", counted)
    batches, _ = loader(store, window_chunks=100)
    for step in range(40):
        batches.batch(step)
    assert len(calls) == 1


def test_a_windows_rows_are_read_in_order(store):
    batches, _ = loader(store)
    rows, order = batches.order.window_rows(3, 1)
    assert np.array_equal(rows, np.sort(rows))
    assert np.array_equal(np.sort(order), np.arange(len(rows)))
    assert len(rows) <= 2 * CHUNK_ROWS


def test_every_epoch_puts_other_chunks_together(store):
    order = loader(store, window_chunks=1)[0].order
    firsts = {tuple(order.window_rows(epoch, 0)[0]) for epoch in range(8)}
    assert len(firsts) == 3  # of three chunks, each comes first at times


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
