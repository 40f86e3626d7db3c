"""A store reads back what was written, in any order, and says so when it cannot."""

import inspect
import threading
from typing import Any

import numpy as np
import pytest
import torch

from capture import open_store
from capture.reader import ActivationStore
from mdlm_interp.errors import StoreError
from tests.capture.reader.opening import SHARD_ROWS, plain
from tests.capture.stores import (
    HEADS,
    HOOKS,
    LENGTH,
    MLP,
    SCALE,
    Elsewhere,
    Plan,
    make_store,
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_everything_reads_back_bit_for_bit(tmp_path, opened, dtype):
    truth = make_store(tmp_path / "run.zarr", Plan(dtype=dtype))
    store = opened(truth.root)
    rows = len(truth.t)
    assert (len(store), store.planned_rows, store.n_sequences, store.complete) == (rows, rows, 60, True)
    assert (store.hooks, store.dtype, store.length) == (tuple(HOOKS), dtype, LENGTH)
    for read in (store.read, store.gather):
        found = read(slice(None))
        assert list(found) == list(HOOKS)
        for hook, values in found.items():
            assert values.dtype == torch.float32
            assert store.row_shape(hook) == HOOKS[hook]
            assert np.array_equal(values.numpy(), truth.acts[hook])
    coords = store.coords(slice(None))
    for name, column in truth.columns.items():
        assert np.array_equal(coords[name].numpy(), column), name
    assert np.array_equal(coords["t"].numpy(), truth.t)
    for name, column in truth.sequences.items():
        assert np.array_equal(store.sequence_column(name).numpy(), column), name
        for part in (slice(2, 7), slice(-3, None), slice(5, 5), slice(7, 2), slice(0, 10**9)):
            assert np.array_equal(store.sequence_column(name, part).numpy(), column[part]), (name, part)
    for found_tokens, name in zip(store.tokens(), ("x0", "xt"), strict=True):
        assert found_tokens.dtype == torch.int64
        assert np.array_equal(found_tokens.numpy(), truth.sequences[name])
    assert np.array_equal(store.times().numpy(), truth.sequences["t"])


def test_plain_zarr_sees_the_same_numbers(made):
    store = open_store(made.root)
    for hook, values in store.read(slice(None)).items():
        assert np.array_equal(plain(made.root, f"acts/{hook}"), values.numpy())
    for name, column in store.coords(slice(None)).items():
        if name != "t":
            assert np.array_equal(plain(made.root, f"rows/{name}"), column.numpy())


def test_config_and_provenance_are_the_callers_own(made):
    store = open_store(made.root)
    assert (store.config["seed"], store.positions, store.provenance) == (
        7,
        "random",
        {"weights_sha256": "ab"},
    )
    store.config["seed"] = 8  # type: ignore[index]
    assert store.config["seed"] == 7
    assert store.path == made.root
    assert store.bytes_on_disk == sum(file.stat().st_size for file in made.root.rglob("*") if file.is_file())
    assert store.layout.shapes == HOOKS
    assert store.layout.shard_rows == SHARD_ROWS


def test_a_store_elsewhere_has_a_size_and_a_name_but_no_path(made):
    store = ActivationStore(Elsewhere(made.root))
    assert store.bytes_on_disk == open_store(made.root).bytes_on_disk
    assert store.name == "far://run.zarr"
    with pytest.raises(
        StoreError, match=r"far://run.zarr is no local directory; copy the store to one first"
    ):
        _ = store.path


ROWS: list[Any] = [
    [0],
    [885, 0, 512, 511, 0],
    [5, 6, 7],
    [7, 6, 5, 5],
    range(880, 2, -3),
    (255, 256, 511, 512),
    np.array([400, 1, 400], np.int32),
    np.arange(10, 200, dtype=np.uint16),
    torch.tensor([9, 8, 800]),
    np.random.default_rng(0).integers(0, 886, 700),
    [],
]


@pytest.mark.parametrize("fresh", [True, False], ids=["first touch", "touched before"])
@pytest.mark.parametrize("method", ["read", "gather"])
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"{type(rows).__name__}{len(rows)}")
def test_rows_come_in_the_order_asked_for_with_repeats(made, opened, rows, method, fresh):
    store = opened(made.root)
    if not fresh:
        store.read(slice(None))
    index = np.asarray(rows).astype(np.int64)
    for hook, values in getattr(store, method)(rows).items():
        assert values.dtype == torch.float32
        assert np.array_equal(values.numpy(), made.acts[hook][index])
    for name, values in store.coords(rows).items():
        expected = made.t if name == "t" else made.columns[name]
        assert np.array_equal(values.numpy(), expected[index])


@pytest.mark.parametrize("method", ["read", "gather"])
@pytest.mark.parametrize("cost", [0, 10, 10**6])
def test_rows_read_singly_or_with_their_chunk_are_the_same(made, monkeypatch, method, cost):
    monkeypatch.setattr("capture.row_files.ROW_COST_BYTES", cost)
    monkeypatch.setattr("capture.reader.BLOCK_BYTES", 1000)
    rng = np.random.default_rng(cost)
    for count in (1, 30, 800):
        store = open_store(made.root)
        rows = rng.integers(0, 886, count)
        for order in (rows, np.sort(rows), np.unique(rows)):
            for hook, values in getattr(store, method)(order).items():
                assert np.array_equal(values.numpy(), made.acts[hook][order])


@pytest.mark.parametrize("long_run", [1, 8, 10**6])
def test_runs_of_rows_read_through_zarr_as_single_rows_do(made, monkeypatch, long_run):
    monkeypatch.setattr("capture.zarr_rows.LONG_RUN", long_run)
    rows = [*range(10, 40), *range(500, 520), 520, 520, *range(600, 880)]
    store = ActivationStore(Elsewhere(made.root))
    assert np.array_equal(store.read(rows, MLP)[MLP].numpy(), made.acts[MLP][rows])


@pytest.mark.parametrize(
    "rows", [slice(250, 520), slice(0, 0), slice(885, 886), slice(None, 256), slice(300, None), slice(9, 3)]
)
def test_slices_read_as_python_slices_do(made, opened, rows):
    store = opened(made.root)
    for hook, values in store.read(rows).items():
        assert np.array_equal(values.numpy(), made.acts[hook][rows])


def test_what_is_read_is_the_callers_own(made):
    store = open_store(made.root)
    store.read(slice(0, 4), MLP)[MLP].zero_()
    store.times().zero_()
    store.tokens()[0].zero_()
    assert np.array_equal(store.read(slice(0, 4), MLP)[MLP].numpy(), made.acts[MLP][:4])
    assert np.array_equal(store.times().numpy(), made.sequences["t"])
    assert np.array_equal(store.tokens()[0].numpy(), made.sequences["x0"])


def test_hooks_may_be_one_or_several_in_any_order(made):
    store = open_store(made.root)
    assert list(store.read([3], [SCALE, HEADS])) == [SCALE, HEADS]
    assert list(store.read(slice(0, 1), SCALE)) == [SCALE]
    assert store.read([3], []) == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 886], r"rows must lie in [0, 886), got 886"),
        ([3, -1], r"rows must lie in [0, 886), got -1"),
        (slice(500, 887), r"a slice from 500 to 887 must lie in [0, 886), got 887"),
        (slice(-4, None), r"a slice from -4 to 886 must lie in [0, 886), got -4"),
        (slice(0, 9, 2), "a slice of rows must have step 1, got 2; pass range(...) instead"),
        (
            torch.tensor([0.5]),
            "rows must be a list of whole numbers, got float32 [1] that begins with 0.5; pass one flat list of "
            "integers",
        ),
        (
            torch.tensor([[1]]),
            "rows must be a list of whole numbers, got int64 [1, 1] that begins with 1; pass",
        ),
        (
            torch.tensor([True]),
            "got bool [1] that begins with True; of a mask, pass mask.nonzero().flatten()",
        ),
        ([False], "got bool [1] that begins with False; of a mask, pass numpy.flatnonzero(mask)"),
        (
            torch.tensor([1.0]).bfloat16(),
            "whole numbers, got tensor([1.], dtype=torch.bfloat16); pass one flat",
        ),
    ],
)
def test_rows_that_are_not_there_are_refused_with_the_range(made, rows, message):
    store = open_store(made.root)
    for read in (store.read, store.gather, store.coords, store.prefetch):
        with pytest.raises(StoreError) as caught:
            read(rows)
        assert message in str(caught.value)


def test_the_remedies_for_a_mask_read_its_rows(made):
    store, wanted = open_store(made.root), made.columns["is_masked"]
    mask = torch.from_numpy(wanted)
    for rows in (mask.nonzero().flatten(), np.flatnonzero(wanted)):
        assert np.array_equal(store.read(rows, MLP)[MLP].numpy(), made.acts[MLP][wanted])


def test_what_is_of_another_type_is_refused_in_one_line_also_where_types_are_not_checked(made):
    store = open_store(made.root)

    def refusal(function: Any, *args: Any, **options: Any) -> str:
        with pytest.raises(StoreError) as caught:
            inspect.unwrap(function)(*args, **options)
        return str(caught.value)

    rows = "rows must be a list of whole numbers, got {}; pass one flat list of integers"
    for given, text in (
        (5, "5"),
        (None, "None"),
        ({1, 2}, "{1, 2}"),
        ([[1], [2, 3]], "[[1], [2, 3]]"),
        ("ab" * 99, "'" + ("ab" * 99)[:76] + "..."),
        (np.array(5), "array(5)"),
        (torch.ones(2, 1).bfloat16(), "tensor([[1.], [1.]], dtype=torch.bfloat16)"),
    ):
        for read in (ActivationStore.coords, ActivationStore.prefetch):
            assert refusal(read, store, given) == rows.format(text)
        # Both `read` and `gather` are nothing but this.
        assert refusal(ActivationStore._activations, store, given, MLP, check=True) == rows.format(text)
    for seq, pos, text in (
        (0.0, 1.0, "seq must be a whole number, got 0.0; pass an int"),
        (0, 1.0, "pos must be a whole number, got 1.0; pass an int"),
        (True, 1, "seq must be a whole number, got True; pass an int"),
    ):
        assert refusal(ActivationStore.row_of, store, seq, pos) == text
    assert refusal(ActivationStore.sequence_rows, store, "3").startswith(
        "seq must be a whole number, got '3'"
    )
    assert refusal(ActivationStore.sequence_column, store, "t", 3) == (
        "sequences must be a slice, got 3; pass slice(start, stop), or index the whole column"
    )
    assert refusal(ActivationStore.coords, store, np.array([False, True])) == (
        "rows must be a list of whole numbers, got bool [2] that begins with False; of a mask, pass "
        "numpy.flatnonzero(mask)"
    )
    for path in (None, 3, b"run.zarr"):
        message = f"a store is opened by its path or URL, got {path!r}; pass a str or a Path"
        assert refusal(open_store, path) == message


def test_an_unknown_name_is_refused_with_the_nearest(made):
    store = open_store(made.root)
    message = "holds no hook 'blocks.1.hook_mlp_ot'; did you mean 'blocks.1.hook_mlp_out'?"
    for read in (lambda name: store.read([0], name), store.statistics, store.row_shape):
        with pytest.raises(StoreError) as caught:
            read("blocks.1.hook_mlp_ot")
        assert message in str(caught.value)
    with pytest.raises(StoreError, match=r"has no column 'sigm'; did you mean 'sigma'\?"):
        store.sequence_column("sigm")
    with pytest.raises(StoreError, match="a slice of sequences must have step 1, got 2"):
        store.sequence_column("sigma", slice(0, 4, 2))


def test_rows_of_a_sequence_and_the_row_of_a_token(made, opened):
    store = opened(made.root)
    for seq in range(60):
        rows = store.sequence_rows(seq)
        assert np.array_equal(np.flatnonzero(made.columns["seq"] == seq), np.arange(rows.start, rows.stop))
    for row in range(0, len(store), 17):
        assert store.row_of(int(made.columns["seq"][row]), int(made.columns["pos"][row])) == row
    recorded = set(zip(made.columns["seq"].tolist(), made.columns["pos"].tolist(), strict=True))
    seq, gap = next((seq, pos) for seq in range(60) for pos in range(20) if (seq, pos) not in recorded)
    with pytest.raises(StoreError, match=rf"no row of position {gap} in sequence {seq}; .* 'random'"):
        store.row_of(seq, gap)
    for seq in (-1, 60):
        with pytest.raises(StoreError, match=rf"sequences are in \[0, 60\), got {seq}"):
            store.sequence_rows(seq)


def test_statistics_equal_numpy_in_float64(made, opened):
    store = opened(made.root)
    for hook in HOOKS:
        found = store.statistics(hook)
        acts = made.acts[hook].astype(np.float64)
        for masked in (0, 1):
            for t_bin in range(10):
                rows = (made.columns["is_masked"] == masked) & (np.floor(made.t * 10) == t_bin)
                assert found.count[masked, t_bin] == rows.sum()
                if rows.any():
                    mean = acts[rows].mean(axis=0)
                    np.testing.assert_allclose(found.mean[masked, t_bin].numpy(), mean, rtol=0, atol=1e-12)
                    mean_square = float(found.mean_square[masked, t_bin])
                    np.testing.assert_allclose(mean_square, (acts[rows] ** 2).mean(), rtol=1e-12)
                else:
                    assert found.mean[masked, t_bin].isnan().all()


def test_threads_may_share_a_store(made, monkeypatch):
    monkeypatch.setattr("capture.open_files.MOST_FILES", 1)  # so that each read closes another's file
    store = open_store(made.root)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            rows = rng.integers(0, 886, 9)
            for hook, values in store.read(rows).items():
                if not np.array_equal(values.numpy(), made.acts[hook][rows]):
                    wrong.append(hook)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
