"""A part of a store is exported as a store of its own: whole sequences, chosen hooks, another type."""

import numpy as np
import pytest
import torch

from capture import CaptureConfig, run_capture, schema
from capture.convert import export_store
from capture.convert.selection import rechunked, select
from capture.sampler_source import SamplerSource
from mdlm_interp.errors import ConfigError, HookError, StoreError
from tests.capture.convert.checks import opened
from tests.capture.stores import HEADS, MLP, SCALE, Plan


def whole(store, start, stop):
    """First and last sequence that lie whole in these rows, and their rows, counted one by one."""
    rows = [store.sequence_rows(seq) for seq in range(store.n_sequences)]
    inside = [seq for seq, span in enumerate(rows) if start <= span.start and span.stop <= stop]
    return inside[0], inside[-1] + 1, rows[inside[0]].start, rows[inside[-1]].stop


@pytest.mark.parametrize("span", [(0, 700), (333, 850), (100, None), (None, 400)])
def test_the_whole_sequences_in_a_range_are_a_store_of_their_own(store, tmp_path, to, span):
    made = export_store(store, tmp_path / "out", to=to, rows=slice(*span))
    first, last, start, stop = whole(store, span[0] or 0, span[1] or len(store))
    found = opened(tmp_path / "out")
    assert (made.rows, made.sequences) == (len(found), found.n_sequences) == (stop - start, last - first)
    assert found.complete
    assert found.planned_rows == len(found)
    for hook, expected in store.read(slice(start, stop)).items():
        assert torch.equal(found.read(slice(None), hook)[hook], expected)
    theirs, ours = store.coords(slice(start, stop)), found.coords(slice(None))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name] - first if name == "seq" else theirs[name])
    assert torch.equal(found.sequence_column("row"), store.sequence_column("row")[first:last] - start)
    assert torch.equal(found.tokens()[1], store.tokens()[1][first:last])
    for seq in (0, last - first - 1):
        rows = store.sequence_rows(first + seq)
        assert found.sequence_rows(seq) == slice(rows.start - start, rows.stop - start)
    assert found.source["rows"] == [start, stop]
    assert found.source["sequences"] == [first, last]


def test_statistics_of_a_part_are_those_of_its_rows(store, tmp_path, to):
    export_store(store, tmp_path / "out", to=to, rows=slice(200, 850))
    found = opened(tmp_path / "out")
    coords = found.coords(slice(None))
    bins = (coords["t"] * 10).long().clamp(max=9)
    for hook, acts in found.read(slice(None)).items():
        statistics = found.statistics(hook)
        for masked in (0, 1):
            for t_bin in range(10):
                rows = acts[(coords["is_masked"] == masked) & (bins == t_bin)].double()
                assert int(statistics.count[masked, t_bin]) == len(rows)
                if len(rows):
                    # Bounded: sums of at most a few hundred float64 values, in another order.
                    torch.testing.assert_close(
                        statistics.mean[masked, t_bin], rows.mean(0), rtol=1e-12, atol=1e-12
                    )
                    mean_square = statistics.mean_square[masked, t_bin]
                    torch.testing.assert_close(mean_square, rows.square().mean(), rtol=1e-12, atol=0)


def test_max_rows_takes_as_many_whole_sequences_as_fit(store, tmp_path, to):
    export_store(store, tmp_path / "out", to=to, max_rows=500)
    assert (0, opened(tmp_path / "out").n_sequences) == whole(store, 0, 500)[:2]
    export_store(store, tmp_path / "later", to=to, rows=slice(300, None), max_rows=500)
    assert opened(tmp_path / "later").source["sequences"] == list(whole(store, 300, 800)[:2])
    export_store(store, tmp_path / "all", to=to, max_rows=10**9)
    assert opened(tmp_path / "all").fingerprint() == store.fingerprint()


def test_of_an_incomplete_store_a_range_ends_before_the_sequence_that_is_not_whole(another, tmp_path, to):
    store = another(Plan(shard_rows=256, complete=False, committed_shards=2))
    export_store(store, tmp_path / "out", to=to, incomplete=True, rows=slice(100, None))
    found = opened(tmp_path / "out")
    assert found.source["rows"][1] == store.sequence_rows(store.n_sequences - 1).stop < len(store)
    assert not found.coords(slice(None))["t"].isnan().any()
    assert not found.complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": slice(0, 10**6)}, r"rows must be START:STOP with 0 <= START < STOP <= \d+, got 0:1000000"),
        ({"rows": slice(-5, 10)}, r"got -5:10"),
        ({"rows": slice(10, 10)}, r"got 10:10"),
        ({"rows": slice(0, 10, 2)}, r"rows must be consecutive, got every 2th"),
        ({"rows": slice(3, 5)}, r"rows 3:5 of \S+ hold no whole sequence, .* has up to 40 rows"),
        ({"max_rows": 1}, r"rows 0:1 of \S+ hold no whole sequence"),
    ],
)
def test_rows_that_there_are_not_are_refused(store, tmp_path, to, options, message):
    with pytest.raises(StoreError, match=message):
        export_store(store, tmp_path / "out", to=to, **options)
    assert not (tmp_path / "out").exists()


def test_max_rows_below_one_is_refused(store, tmp_path, to):
    with pytest.raises(ConfigError, match=r"^max_rows must be at least 1, got 0$"):
        export_store(store, tmp_path / "out", to=to, max_rows=0)


def test_hooks_are_chosen_by_name_or_glob_and_keep_their_order(store, tmp_path, to):
    export_store(store, tmp_path / "out", to=to, hooks=[SCALE, "blocks.0.*"])
    found = opened(tmp_path / "out")
    assert found.hooks == (HEADS, SCALE)
    assert torch.equal(found.read([7, 3])[HEADS], store.read([7, 3])[HEADS])
    with pytest.raises(StoreError, match=rf"holds no hook '{MLP}'"):
        found.read([0], MLP)


def test_a_hook_that_is_not_there_is_an_error_with_the_nearest(store, tmp_path, to):
    with pytest.raises(
        HookError, match=rf"^no hook point matches 'blocks.1.hook_mlp'; did you mean '{MLP}'\?$"
    ):
        export_store(store, tmp_path / "out", to=to, hooks=["blocks.1.hook_mlp"])


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")],
)
def test_another_type_is_rounded_to_nearest_as_torch_rounds(another, tmp_path, to, source, target):
    store = another(Plan(dtype=source))
    export_store(store, tmp_path / "out", to=to, dtype=target)
    found = opened(tmp_path / "out")
    assert (found.dtype, found.source["dtype"]) == (target, source)
    for hook, acts in store.read(slice(None)).items():
        assert torch.equal(found.read(slice(None), hook)[hook], acts.to(getattr(torch, target)).float())
        # What the model gave, not what was rounded.
        assert torch.equal(found.statistics(hook).count, store.statistics(hook).count)
        assert found.statistics(hook).mean.nan_to_num().equal(store.statistics(hook).mean.nan_to_num())


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", -70000.0, "70000 and float16 ends at 65504; export with --dtype bfloat16 or float32"),
        ("bfloat16", -3.4e38, r"3.4e\+38 and bfloat16 ends at 3.38953e\+38; export with --dtype float32"),
    ],
)
def test_a_value_too_large_for_the_type_is_refused(another, tmp_path, to, monkeypatch, dtype, value, message):
    store = another(Plan())
    monkeypatch.setattr(store.files.array(f"acts/{MLP}"), "take", lambda rows, out, at: out.fill(value))
    with pytest.raises(StoreError, match=f"{MLP} reaches {message}$"):
        export_store(store, tmp_path / "out", to=to, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_portions_are_cut_to_size_whatever_they_were():
    rng = np.random.default_rng(0)
    values = np.arange(100)
    for size in (1, 7, 50, 99, 100, 101):
        blocks = np.split(values, np.sort(rng.integers(0, 101, 5)))
        parts = list(rechunked(blocks, size))
        assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
        assert np.array_equal(np.concatenate(parts), values)
        assert 0 < len(parts[-1]) <= size
    assert list(rechunked([], 3)) == []


@pytest.mark.parametrize("source", ["text", "sampler"])
def test_the_size_is_that_of_the_arrays(model_directory, texts, tmp_path, to, source):
    """Exact: a sampler's store has columns that one of text has not."""
    given = (
        {"files": texts, "max_sequences": 9} if source == "text" else {"sampler": SamplerSource(n=3, steps=4)}
    )
    out = tmp_path / "run.zarr"
    store = run_capture(CaptureConfig(model=str(model_directory), out=str(out), length=12, **given))
    export_store(store, tmp_path / "out", to=to, hooks=["blocks.*"])
    found = opened(tmp_path / "out")
    names = [*(f"acts/{hook}" for hook in found.hooks), *(f"rows/{name}" for name in found.row_columns)]
    sizes = [found.files.array(name).read(0, len(found)).nbytes for name in names]
    sizes += [found.sequence_column(name).numpy().nbytes for name in schema.SEQUENCE_COLUMNS]
    assert select(store, hooks=["blocks.*"]).size == sum(sizes)
