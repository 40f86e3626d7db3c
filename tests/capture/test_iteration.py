"""Shuffled batches: every row once an epoch, the same whatever happened before, each chunk read once."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture.iteration import Position, RowBatch, ShuffledRows
from capture.places import Directory
from capture.reader import ActivationStore
from capture.schema import CHUNK_ROWS
from mdlm_interp.errors import ConfigError, DataError, StoreError
from tests.capture.stores import HOOKS, MLP, SCALE, Plan, Truth, make_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """About 3,000 rows: 12 chunks, the last one shorter."""
    return make_store(tmp_path_factory.mktemp("made") / "run.zarr", Plan(sequences=200))


@pytest.fixture
def store(made: Truth) -> ActivationStore:
    return ActivationStore(Directory(made.root))


def epoch_of(rows: ShuffledRows, epoch: int) -> list[RowBatch]:
    rows.position = Position(epoch, 0)
    return list(rows)


def numbers(batches: list[RowBatch]) -> NDArray[np.int64]:
    return np.concatenate([batch.rows.numpy() for batch in batches])


def same(one: RowBatch, other: RowBatch) -> bool:
    pairs = [(one.acts, other.acts), (one.coords, other.coords), ({"": one.rows}, {"": other.rows})]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(7), b[key].nan_to_num(7)) for key in a)
        for a, b in pairs
    )


def read_rows(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """Collects the rows of each reading of activations."""
    seen: list[NDArray[np.int64]] = []
    real: Callable[..., Any] = store.read

    def read(rows: NDArray[np.int64], hooks: object) -> object:
        if len(rows):
            seen.append(np.asarray(rows))
        return real(rows, hooks)

    monkeypatch.setattr(store, "read", read)
    return seen


@pytest.mark.parametrize("select", ["all", "masked", "unmasked"])
@pytest.mark.parametrize(
    ("batch_size", "window_chunks"), [(100, 3), (256, 1), (1000, 2), (7, 100), (5000, 2)]
)
def test_every_selected_row_comes_exactly_once_an_epoch(made, store, select, batch_size, window_chunks):
    rows = ShuffledRows(store, batch_size=batch_size, select=select, window_chunks=window_chunks)
    masked = made.columns["is_masked"]
    expected = {
        "all": np.arange(len(masked)),
        "masked": np.flatnonzero(masked),
        "unmasked": np.flatnonzero(~masked),
    }
    for epoch in range(2):
        batches = epoch_of(rows, epoch)
        assert np.array_equal(np.sort(numbers(batches)), expected[select])
        assert len(batches) == len(rows) == -(-len(expected[select]) // batch_size)
        assert {len(batch.rows) for batch in batches[:-1]} <= {batch_size}
    assert rows.n_rows == len(expected[select])


def test_a_batch_holds_the_activations_and_coordinates_of_its_rows(made, store):
    for batch in ShuffledRows(store, batch_size=300, window_chunks=2):
        index = batch.rows.numpy()
        assert list(batch.acts) == list(HOOKS)
        for hook, values in batch.acts.items():
            assert np.array_equal(values.numpy(), made.acts[hook][index])
        for name, values in batch.coords.items():
            expected = made.t if name == "t" else made.columns[name]
            assert np.array_equal(values.numpy(), expected[index])
    assert set(batch.coords) == {*made.columns, "t"}


def test_only_the_hooks_asked_for_are_read(store):
    assert list(ShuffledRows(store, batch_size=9, hooks=MLP).batch(0, 0).acts) == [MLP]
    assert list(ShuffledRows(store, batch_size=9, hooks=[SCALE, MLP]).batch(0, 0).acts) == [SCALE, MLP]
    assert ShuffledRows(store, batch_size=9, hooks=()).batch(0, 0).acts == {}


def test_rows_of_some_sequences_only(made, store):
    chosen = [3, 17, 40, 41, 199]
    rows = ShuffledRows(store, batch_size=50, sequences=chosen, select="masked", window_chunks=2)
    expected = np.flatnonzero(np.isin(made.columns["seq"], chosen) & made.columns["is_masked"])
    assert np.array_equal(np.sort(numbers(list(rows))), expected)


@pytest.mark.parametrize("seed", range(5))
def test_chunks_without_a_selected_row_take_no_part(made, store, monkeypatch, seed):
    seen = read_rows(store, monkeypatch)
    rows = ShuffledRows(store, batch_size=500, sequences=[0, 90, 199], window_chunks=1, seed=seed)
    expected = np.flatnonzero(np.isin(made.columns["seq"], [0, 90, 199]))
    assert np.array_equal(np.sort(numbers(list(rows))), expected)
    assert len(seen) == len(np.unique(expected // CHUNK_ROWS)) < 6


def test_epochs_and_seeds_differ_and_shuffle(store):
    rows = ShuffledRows(store, batch_size=3000, window_chunks=4)
    orders = [numbers(epoch_of(rows, epoch)) for epoch in range(3)]
    orders.append(numbers(list(ShuffledRows(store, batch_size=3000, window_chunks=4, seed=1))))
    for index, order in enumerate(orders):
        neighbours = (np.diff(order) == 1).mean()
        assert neighbours < 0.01
        assert all((order != other).mean() > 0.9 for other in orders[:index])
        # A window mixes its chunks: one of 1,024 rows has some of every chunk in its first half.
        chunks, counts = np.unique(order[:512] // CHUNK_ROWS, return_counts=True)
        assert len(chunks) == 4
        assert counts.min() > 64


@given(st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_any_batch_is_the_same_whatever_was_read_before(made, first, second, backwards):
    def fresh() -> ShuffledRows:
        return ShuffledRows(
            ActivationStore(Directory(made.root)), batch_size=170, window_chunks=2, hooks=SCALE
        )

    rows = fresh()
    steps = len(rows)
    for number in (first, second) if not backwards else (second, first):
        epoch, step = divmod(number, steps)
        assert same(rows.batch(epoch, step), fresh().batch(epoch, step))
        assert np.array_equal(rows.rows(epoch, step), fresh().batch(epoch, step).rows.numpy())


@pytest.mark.parametrize("stop", [0, 1, 5, 17])
def test_an_interrupted_epoch_goes_on_as_if_it_had_not_been(made, stop):
    def fresh() -> ShuffledRows:
        return ShuffledRows(
            ActivationStore(Directory(made.root)), batch_size=170, window_chunks=2, select="masked"
        )

    whole = fresh()
    expected = [*epoch_of(whole, 0), *epoch_of(whole, 1)]
    assert 9 < len(whole) == len(expected) // 2
    first = fresh()
    found: list[RowBatch] = []
    for batch in first if stop else ():
        found.append(batch)
        if len(found) == stop:
            break
    saved = tuple(first.position)
    assert saved == (0, stop) if stop < len(whole) else (1, 0)
    again = fresh()
    again.position = saved
    while again.position.epoch < 2:
        found += list(again)
    assert len(found) == len(expected)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_caller_does_to_a_batch_changes_no_other(made, store):
    rows = ShuffledRows(store, batch_size=100, window_chunks=4, hooks=MLP)
    for _ in range(2):
        batch = rows.batch(0, 1)
        assert np.array_equal(batch.acts[MLP].numpy(), made.acts[MLP][batch.rows.numpy()])
        batch.acts[MLP].zero_()
        batch.coords["t"].zero_()
        batch.rows.zero_()


@pytest.mark.parametrize("batch_size", [40, 256, 700])
def test_every_chunk_is_read_once_an_epoch(store, monkeypatch, batch_size):
    seen = read_rows(store, monkeypatch)
    rows = ShuffledRows(store, batch_size=batch_size, window_chunks=3)
    for epoch in range(2):
        seen.clear()
        epoch_of(rows, epoch)
        chunks = [chunk for read in seen for chunk in np.unique(read // CHUNK_ROWS).tolist()]
        assert sorted(chunks) == list(range(-(-len(store) // CHUNK_ROWS)))
        assert all(len(read) <= 3 * CHUNK_ROWS for read in seen), "a window at a time"


def test_a_window_is_asked_for_while_the_one_before_is_used(store, monkeypatch):
    asked: list[NDArray[np.int64]] = []
    monkeypatch.setattr(store, "prefetch", lambda rows, hooks: asked.append(rows))
    seen = read_rows(store, monkeypatch)
    rows = ShuffledRows(store, batch_size=100, window_chunks=3)
    epoch_of(rows, 0)
    epoch_of(rows, 1)
    assert len(seen) > 5
    assert all(np.array_equal(a, b) for a, b in zip(asked, seen[1:], strict=False))


@pytest.mark.parametrize("select", ["all", "unmasked"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_divide_the_rows_evenly_and_share_hardly_a_chunk(made, monkeypatch, world_size, select):
    parts, chunks = [], []
    for rank in range(world_size):
        store = ActivationStore(Directory(made.root))
        seen = read_rows(store, monkeypatch)
        options: dict[str, Any] = {"select": select, "rank": rank, "world_size": world_size}
        rows = ShuffledRows(store, batch_size=50, window_chunks=2, **options)
        batches = epoch_of(rows, 1)
        assert len(batches) == len(rows)
        parts.append(numbers(batches))
        chunks += [chunk for read in seen for chunk in np.unique(read // CHUNK_ROWS).tolist()]
    masked = made.columns["is_masked"]
    expected = np.arange(len(masked)) if select == "all" else np.flatnonzero(~masked)
    assert np.array_equal(np.sort(np.concatenate(parts)), expected)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(chunks) - len(set(chunks)) <= world_size - 1


def test_all_ranks_have_as_many_steps_and_full_ones_if_the_last_is_dropped(made, store):
    # 3 ranks of 1,000 and 1,001 rows or so: a batch size at which some ranks need one more step.
    batch_size = len(store) // 3
    assert len(store) % 3
    for drop_last in (False, True):
        ranks = [
            ShuffledRows(
                store, hooks=SCALE, batch_size=batch_size, drop_last=drop_last, rank=rank, world_size=3
            )
            for rank in range(3)
        ]
        assert {len(rows) for rows in ranks} == {1 if drop_last else 2}
        sizes = [[len(batch.rows) for batch in rows] for rows in ranks]
        if drop_last:
            assert sizes == [[batch_size]] * 3
        else:
            assert sorted(size[1] for size in sizes) in ([0, 0, 1], [0, 1, 1])


def test_many_ranks_may_share_one_chunk(tmp_path):
    truth = make_store(tmp_path / "run.zarr", Plan(sequences=4))
    store = ActivationStore(Directory(truth.root))
    assert 20 < len(store) < 256
    parts = [
        numbers(list(ShuffledRows(store, batch_size=3, hooks=SCALE, rank=rank, world_size=9)))
        for rank in range(9)
    ]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(store)))


def test_the_order_does_not_depend_on_shards(made, tmp_path: Path):
    other = make_store(tmp_path / "run.zarr", Plan(sequences=200, shard_rows=256))
    orders = [
        numbers(
            list(ShuffledRows(ActivationStore(Directory(root)), batch_size=99, window_chunks=3, hooks=SCALE))
        )
        for root in (made.root, other.root)
    ]
    assert np.array_equal(orders[0], orders[1])


def test_the_order_is_what_it_has_always_been(tmp_path):
    """A position saved by an earlier version must mean the same rows."""
    truth = make_store(tmp_path / "run.zarr", Plan(sequences=30, every_position=True))
    store = ActivationStore(Directory(truth.root))
    rows = ShuffledRows(store, hooks=SCALE, batch_size=6, seed=3, window_chunks=2)
    assert len(store) == 1200
    assert rows.rows(0, 0).tolist() == [569, 597, 512, 653, 769, 804]
    assert rows.rows(1, 150).tolist() == [786, 871, 1149, 1155, 972, 843]
    half = ShuffledRows(store, hooks=SCALE, batch_size=6, seed=3, window_chunks=2, rank=1, world_size=2)
    assert half.rows(2, 90).tolist() == [538, 574, 566, 656, 560, 691]


def test_an_incomplete_store_gives_its_committed_rows(tmp_path):
    truth = make_store(tmp_path / "run.zarr", Plan(complete=False, committed_shards=1))
    store = ActivationStore(Directory(truth.root))
    assert np.array_equal(np.sort(numbers(list(ShuffledRows(store, batch_size=100)))), np.arange(512))
    rows = ShuffledRows(store, batch_size=100, sequences=range(store.n_sequences))
    assert rows.n_rows == (truth.columns["seq"][:512] < store.n_sequences).sum() < 512


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
        ({"window_chunks": 0}, ConfigError, "window_chunks must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, ConfigError, r"rank must be in \[0, world_size 2\), got 2"),
        ({"hooks": "blocks.1.hook_mlp_ot"}, StoreError, "did you mean 'blocks.1.hook_mlp_out'"),
        ({"sequences": [0, 200]}, DataError, r"sequences must be in \[0, 200\), got 200"),
        ({"seed": -1}, ConfigError, r"seed must be in \[0, 2\*\*64\), got -1; leave it out for 0"),
        ({"seed": 2**64}, ConfigError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616; leave"),
        ({"seed": True}, ConfigError, "seed must be a whole number, got True; pass an int"),
        ({"sequences": [True, False]}, DataError, r"got bool \[2\] that begins with True; of a mask, pass"),
        ({"sequences": []}, DataError, "0 selected rows over 1 ranks make no batch; select more"),
        ({"sequences": [0], "world_size": 99}, DataError, "selected rows over 99 ranks make no batch"),
        ({"batch_size": 5000, "drop_last": True}, DataError, "make no full batch of 5000; select more"),
    ],
)
def test_arguments_that_cannot_be_are_refused(store, options, error, message):
    with pytest.raises(error, match=message):
        ShuffledRows(store, **{"batch_size": 10, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"select": "maskd"}, ConfigError, "select must be 'all', 'masked' or 'unmasked', got 'maskd'"),
        (
            {"sequences": np.array([True, False])},
            DataError,
            "sequences must be a list of whole numbers, got bool [2] that begins with True; of a mask, pass "
            "numpy.flatnonzero(mask)",
        ),
        (
            {"sequences": [1.5]},
            DataError,
            "sequences must be a list of whole numbers, got float64 [1] that begins",
        ),
        ({"sequences": 3}, DataError, "whole numbers, got 3; pass one flat list of integers"),
        ({"seed": 0.9}, ConfigError, "seed must be a whole number, got 0.9; pass an int"),
        ({"batch_size": 2.5}, ConfigError, "batch_size must be a whole number, got 2.5; pass an int"),
        ({"window_chunks": "3"}, ConfigError, "window_chunks must be a whole number, got '3'; pass an int"),
        ({"rank": 0.0}, ConfigError, "rank must be a whole number, got 0.0; pass an int"),
        ({"world_size": None}, ConfigError, "world_size must be a whole number, got None; pass an int"),
        ({"drop_last": "no"}, ConfigError, "drop_last must be True or False, got 'no'; pass one of them"),
        ({"drop_last": 0}, ConfigError, "drop_last must be True or False, got 0; pass one of them"),
    ],
)
def test_arguments_of_another_type_are_refused_also_where_types_are_not_checked(
    store, options, error, message
):
    init = inspect.unwrap(ShuffledRows.__init__)
    with pytest.raises(error, match=re.escape(message)) as caught:
        init(object.__new__(ShuffledRows), store, **{"batch_size": 10, **options})
    assert "\n" not in str(caught.value)


def test_numpy_numbers_mean_what_pythons_do(store):
    init, rows = inspect.unwrap(ShuffledRows.__init__), object.__new__(ShuffledRows)
    options: dict[str, Any] = {
        "batch_size": 10,
        "seed": 2**64 - 1,
        "window_chunks": 3,
        "rank": 1,
        "world_size": 2,
    }
    numbers_of_numpy = {name: np.uint64(value) for name, value in options.items()}
    chosen = np.array([5, 17, 90], np.uint8)
    init(rows, store, sequences=chosen, drop_last=np.bool_(True), **numbers_of_numpy)
    same_rows = ShuffledRows(store, sequences=[5, 17, 90], drop_last=True, **options)
    assert len(rows) == len(same_rows)
    assert np.array_equal(rows.rows(1, 0), same_rows.rows(1, 0))
    wanted = np.zeros(200, np.bool_)
    wanted[chosen] = True
    of_mask = ShuffledRows(store, sequences=np.flatnonzero(wanted), drop_last=True, **options)
    assert np.array_equal(of_mask.rows(1, 0), same_rows.rows(1, 0))


@pytest.mark.parametrize("position", [(0, 60), (-1, 0), (0, -1), (2**31, 0)])
def test_a_position_of_another_iteration_is_refused(store, position):
    rows = ShuffledRows(store, batch_size=50)
    assert len(rows) == 60

    def place() -> None:
        rows.position = position

    for use in (place, lambda: rows.batch(*position), lambda: rows.rows(*position)):
        with pytest.raises(
            ConfigError, match=r"an epoch has steps 0 to 59, got step .* saved with another store"
        ):
            use()
    assert rows.position == (0, 0)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (None, "a position must be (epoch, step), got None; pass what `position` was when it was saved"),
        (3, "a position must be (epoch, step), got 3; pass what"),
        ((0, 1, 2), "a position must be (epoch, step), got (0, 1, 2); pass what"),
        ((0, 1.5), "step must be a whole number, got 1.5; pass an int"),
        (("0", 1), "epoch must be a whole number, got '0'; pass an int"),
    ],
)
def test_what_is_no_position_is_refused_also_where_types_are_not_checked(store, position, message):
    rows = ShuffledRows(store, batch_size=50)
    place = inspect.unwrap(inspect.getattr_static(ShuffledRows, "position").fset)
    uses = [partial(place, rows, position)]
    if isinstance(position, tuple) and len(position) == 2:
        uses += [
            partial(inspect.unwrap(use), rows, *position) for use in (ShuffledRows.batch, ShuffledRows.rows)
        ]
    for use in uses:
        with pytest.raises(ConfigError, match=re.escape(message)):
            use()
    assert rows.position == (0, 0)


def test_a_position_may_come_back_as_a_list_or_an_array(store):
    place = inspect.unwrap(inspect.getattr_static(ShuffledRows, "position").fset)
    rows = ShuffledRows(store, batch_size=50)
    for saved in ([1, 7], np.array([1, 7])):
        place(rows, saved)
        assert rows.position == (1, 7)
        assert [type(part) for part in rows.position] == [int, int]
