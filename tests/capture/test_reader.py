"""A store reads back what was written, in any order, and says so when it cannot."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from capture import open_store
from capture.manifest import to_bytes
from capture.reader import ActivationStore
from mdlm_interp.errors import StoreError
from tests.capture.stores import (
    HEADS,
    HOOKS,
    LENGTH,
    MLP,
    SCALE,
    Elsewhere,
    Plan,
    Truth,
    make_store,
    with_hashes,
    write_manifests,
)

Opener = Callable[[Path], ActivationStore]
SHARD_ROWS = 512


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A complete store of two shards, the second shorter; tests only read it."""
    return make_store(tmp_path_factory.mktemp("made") / "run.zarr")


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The same when 512 of its rows were committed."""
    return make_store(
        tmp_path_factory.mktemp("partial") / "run.zarr", Plan(complete=False, committed_shards=1)
    )


@pytest.fixture
def copy(made: Truth, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(made.root, tmp_path / "run.zarr"))


@pytest.fixture(params=["local", "elsewhere"])
def opened(request: pytest.FixtureRequest) -> Opener:
    """Opens a store as a local directory, and as any other place, through zarr."""
    return open_store if request.param == "local" else lambda root: ActivationStore(Elsewhere(root))


def plain(root: Path, name: str) -> NDArray[Any]:
    """An array as zarr-python alone reads it."""
    return np.asarray(zarr.open_array(root, path=name, mode="r")[...])


def shard(root: Path, number: int, hook: str = MLP) -> Path:
    return root / "acts" / hook / ".".join(["c", str(number), *["0"] * len(HOOKS[hook])])


def flip(file: Path, byte: int) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


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
        (torch.tensor([0.5]), "rows must be a list of whole numbers, got float32 [1]"),
        (torch.tensor([[1]]), "rows must be a list of whole numbers, got int64 [1, 1]"),
        (torch.tensor([True]), "got bool [1]; of a mask, pass mask.nonzero()"),
    ],
)
def test_rows_that_are_not_there_are_refused_with_the_range(made, rows, message):
    store = open_store(made.root)
    for read in (store.read, store.gather, store.coords, store.prefetch):
        with pytest.raises(StoreError) as caught:
            read(rows)
        assert message in str(caught.value)


def test_an_unknown_name_is_refused_with_the_nearest(made):
    store = open_store(made.root)
    message = "holds no hook 'blocks.1.hook_mlp_ot'; did you mean 'blocks.1.hook_mlp_out'?"
    for read in (lambda name: store.read([0], name), store.statistics, store.row_shape):
        with pytest.raises(StoreError) as caught:
            read("blocks.1.hook_mlp_ot")
        assert message in str(caught.value)
    with pytest.raises(StoreError, match=r"has no column 'sigm'; did you mean 'sigma'\?"):
        store.sequence_column("sigm")


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


@pytest.mark.parametrize("shards", [1, 3])
def test_statistics_of_an_incomplete_store_are_those_of_its_committed_rows(tmp_path, opened, shards):
    plan = Plan(complete=False, shard_rows=256, committed_shards=shards)
    truth = make_store(tmp_path / "run.zarr", plan)
    acts = truth.acts[MLP][: 256 * shards].astype(np.float64)
    count, mean, mean_square = opened(truth.root).statistics(MLP).pooled()
    assert count == 256 * shards
    np.testing.assert_allclose(mean.numpy(), acts.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mean_square, (acts**2).mean(), rtol=1e-12)


def test_only_committed_rows_are_read(partial, opened):
    store = opened(partial.root)
    complete = int((np.append(partial.sequences["row"][1:], len(partial.t)) <= SHARD_ROWS).sum())
    assert (len(store), store.n_sequences, store.complete) == (SHARD_ROWS, complete, False)
    assert partial.columns["seq"][SHARD_ROWS - 1] == complete, "a sequence should lie across the end"
    assert np.array_equal(store.read(slice(None), MLP)[MLP].numpy(), partial.acts[MLP][:SHARD_ROWS])
    assert np.array_equal(store.times().numpy(), partial.sequences["t"][:complete])
    for found, name in zip(store.tokens(), ("x0", "xt"), strict=True):
        assert np.array_equal(found.numpy(), partial.sequences[name][:complete])
    with pytest.raises(StoreError, match=r"got 512; the store is incomplete, 512 of 886 rows are committed"):
        store.read([SHARD_ROWS])
    ends = partial.sequences["row"][complete - 1 : complete + 1]
    assert store.sequence_rows(complete - 1) == slice(int(ends[0]), int(ends[1]))
    with pytest.raises(StoreError, match=rf"sequences are in \[0, {complete}\)"):
        store.sequence_rows(complete)


def test_the_time_of_a_sequence_that_is_not_committed_whole_is_not_known(partial, opened):
    store = opened(partial.root)
    t = store.coords(slice(None))["t"].numpy()
    known = partial.columns["seq"][:SHARD_ROWS] < store.n_sequences
    assert 0 < known.sum() < SHARD_ROWS
    assert np.array_equal(t[known], partial.t[:SHARD_ROWS][known])
    assert np.isnan(t[~known]).all()


@pytest.mark.parametrize("committed", [0, 1])
def test_a_store_opens_whatever_is_committed(tmp_path, opened, committed):
    truth = make_store(tmp_path / "run.zarr", Plan(complete=False, committed_shards=committed))
    store = opened(truth.root)
    assert len(store) == committed * SHARD_ROWS
    assert store.read(slice(None), MLP)[MLP].shape == (len(store), 5)
    assert store.tokens()[0].shape == (store.n_sequences, LENGTH)
    assert store.coords([])["t"].shape == (0,)
    assert store.statistics(MLP).count.sum() == len(store)
    assert len(store.fingerprint()) == 64


def test_ranks_that_are_writing_are_read_up_to_the_first_gap(tmp_path, opened):
    truth = make_store(tmp_path / "run.zarr", Plan(shard_rows=256, complete=False))
    shards = truth.manifest.shards
    assert len(shards) == 4
    (truth.root / "manifest.json").unlink()
    write_manifests(truth.root, truth.manifest, world_size=3)
    assert len(opened(truth.root)) == 886
    write_manifests(
        truth.root, replace(truth.manifest, shards=(shards[0], shards[1], shards[3])), world_size=3
    )
    store = opened(truth.root)
    assert len(store) == 512
    assert np.array_equal(store.read(slice(None), MLP)[MLP].numpy(), truth.acts[MLP][:512])
    assert store.n_sequences == shards[1].sequences[1] == len(store.times())
    (truth.root / "manifest.rank-2-of-3.json").unlink()
    assert len(opened(truth.root)) == 512


def test_the_fingerprint_is_a_plain_hash_of_what_zarr_reads(made, opened):
    digest = hashlib.sha256()
    names = [f"acts/{hook}" for hook in HOOKS]
    names += [f"rows/{name}" for name in ("seq", "pos", "x0", "xt", "is_masked", "doc")]
    sequences = ("row", "length", "t", "sigma", "seed", "block", "source", "offset", "x0", "xt", "doc")
    for name in [*names, *(f"seqs/{name}" for name in sequences)]:
        values = plain(made.root, name)
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode() + values.tobytes())
    assert opened(made.root).fingerprint() == digest.hexdigest()


def test_the_fingerprint_does_not_depend_on_shards_or_blocks(made, tmp_path, monkeypatch):
    expected = open_store(made.root).fingerprint()
    other = make_store(tmp_path / "run.zarr", Plan(shard_rows=256))
    assert open_store(other.root).fingerprint() == expected
    monkeypatch.setattr("capture.reader.BLOCK_BYTES", 1)
    assert open_store(other.root).fingerprint() == expected
    assert make_store(tmp_path / "more.zarr", Plan(sequences=61)).root.is_dir()
    assert open_store(tmp_path / "more.zarr").fingerprint() != expected


def test_the_fingerprint_of_committed_rows_covers_them_and_their_sequences(partial):
    digest = hashlib.sha256()
    store = open_store(partial.root)
    values = {f"acts/{hook}": acts[:SHARD_ROWS] for hook, acts in partial.stored.items()}
    values |= {f"rows/{name}": column[:SHARD_ROWS] for name, column in partial.columns.items()}
    values |= {f"seqs/{name}": column[: store.n_sequences] for name, column in partial.sequences.items()}
    for name, array in values.items():
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode() + array.tobytes())
    assert store.fingerprint() == digest.hexdigest()


READS: dict[str, Callable[[ActivationStore], object]] = {
    "slice": lambda store: store.read(slice(500, 886)),
    "scattered rows": lambda store: store.read([880, 3, 520]),
    "fingerprint": lambda store: store.fingerprint(),
}
DAMAGE = {
    "first value": 0,
    "checksum": 256 * 20,
    "value of a row that is not read": 256 * 20 + 4 + 30 * 20,
    "padding after the last row": 2 * 256 * 20 + 4 - 1,
    "index": -40,
    "checksum of the index": -1,
}
"""Which byte of the second shard of MLP: two chunks of 256 rows of 20 bytes, a checksum each, an index."""


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("byte", DAMAGE.values(), ids=DAMAGE)
def test_one_flipped_bit_is_an_error_that_names_the_file(made, copy, opened, byte, read):
    flip(shard(copy, 1), byte)
    store = opened(copy)
    for _ in range(2):  # what was found damaged must not count as checked
        with pytest.raises(StoreError) as caught:
            read(store)
        assert f"acts/{MLP}/c.1.0 is damaged" in str(caught.value)
        assert "restore it from a copy or capture again" in str(caught.value)
    assert np.array_equal(store.read(slice(0, 512), MLP)[MLP].numpy(), made.acts[MLP][:512])


def test_one_row_is_read_with_its_whole_chunk_checked_and_gathered_without(tmp_path):
    truth = make_store(tmp_path / "run.zarr", Plan(shapes={MLP: (96,)}))
    flip(truth.root / "acts" / MLP / "c.0.0", 200 * 96 * 4)
    store = open_store(truth.root)
    assert np.array_equal(store.gather([3, 9], MLP)[MLP].numpy(), truth.acts[MLP][[3, 9]])
    for rows in ([3], slice(3, 4)):
        with pytest.raises(StoreError, match=r"c\.0\.0 is damaged \(chunk 0 does not match its checksum\)"):
            store.read(rows, MLP)


@pytest.mark.parametrize("name", ["rows/xt", "seqs/t"])
def test_a_flipped_bit_in_the_coordinates_is_noticed(copy, opened, name):
    flip(copy / name / "c.0", 3)
    with pytest.raises(StoreError, match=f"{name}/c.0 is damaged"):
        opened(copy).coords([1])


def test_a_flipped_bit_in_pending_sequences_is_noticed(partial, tmp_path, opened):
    root = Path(shutil.copytree(partial.root, tmp_path / "run.zarr"))
    flip(root / "pending" / "0.safetensors", -1)
    for read in (ActivationStore.times, ActivationStore.tokens, lambda store: store.statistics(MLP)):
        with pytest.raises(StoreError, match=r"pending/0.safetensors is damaged"):
            read(opened(root))
    (root / "pending" / "0.safetensors").unlink()
    with pytest.raises(StoreError, match=r"is missing; if the capture went on since .* open it again"):
        opened(root).times()


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_shard_is_noticed_though_zarr_would_read_fill(copy, opened, number):
    shard(copy, number).unlink()
    for rows in (slice(500, 520), [1, 600]):
        with pytest.raises(
            StoreError, match=rf"c\.{number}\.0 is missing; restore it from a copy or capture"
        ):
            opened(copy).read(rows, MLP)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.zarr has no manifest.json: it is no activation store"),
        ("{", "manifest.json is damaged (Expecting property name"),
        ("[]", "manifest.json is damaged (no JSON object)"),
        ('{"schema_version": 2}', "manifest.json is damaged (KeyError: "),
        ('{"schema_version": 1}', "has schema_version 1, this package reads 2; capture again"),
        ('{"schema_version": 3}', "has schema_version 3, this package reads 2; update mdlm-interp"),
        ('{"schema_version": "1"}', "has schema_version '1', expected a whole number from 1; is it damaged?"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(copy, opened, content, message):
    path = copy / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(StoreError) as caught:
        opened(copy)
    assert message in str(caught.value)


def test_any_flipped_bit_in_the_manifest_is_noticed(copy):
    path = copy / "manifest.json"
    content = path.read_bytes()
    for byte in np.random.default_rng(0).integers(0, len(content), 40).tolist():
        flip(path, byte)
        with pytest.raises(StoreError, match=r"manifest\.json"):
            open_store(copy)
        path.write_bytes(content)
    assert len(open_store(copy)) == 886


@pytest.mark.parametrize(
    "name", ["zarr.json", f"acts/{MLP}/zarr.json", "rows/xt/zarr.json", "seqs/t/zarr.json"]
)
@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_damaged_metadata_is_refused_with_its_file(copy, opened, name, content):
    path = copy / name
    path.unlink() if content is None else path.write_text(content)

    def read() -> None:
        store = opened(copy)
        store.read([0])
        store.coords([0])

    with pytest.raises(StoreError) as caught:
        read()
    assert f"{name} is {'missing' if content is None else 'damaged'}" in str(caught.value)


@pytest.mark.parametrize("name", ["zarr.json", f"acts/{MLP}/zarr.json"])
def test_metadata_that_still_parses_is_compared_with_its_hash(copy, opened, name):
    path = copy / name
    path.write_text(path.read_text().replace(" ", "  ", 1))
    with pytest.raises(StoreError, match=r"is damaged \(its SHA-256 is not the one in manifest.json\)"):
        opened(copy).read([0], MLP)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"shape": [9], "codecs": []}'])
def test_metadata_of_an_incomplete_store_that_does_not_parse_is_refused(partial, tmp_path, opened, content):
    root = Path(shutil.copytree(partial.root, tmp_path / "run.zarr"))
    (root / "acts" / MLP / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match=rf"acts/{MLP}/zarr.json is damaged \(.*\); restore it from a copy"):
        opened(root).read([0], MLP)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"crc32c"', '"zstd"'),
        ('"little"', '"big"'),
        ('"separator": "."', '"separator": "/"'),
        ('"index_location": "end"', '"index_location": "start"'),
    ],
)
def test_arrays_in_another_format_are_refused_not_misread(partial, tmp_path, old, new):
    root = Path(shutil.copytree(partial.root, tmp_path / "run.zarr"))
    path = root / "acts" / MLP / "zarr.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(StoreError, match=r"zarr.json is damaged \(ValueError: "):
        open_store(root).read([0], MLP)


@pytest.mark.parametrize("edit", [{"shape": [885, 5]}, {"shape": [887, 5]}])
def test_arrays_of_another_size_than_the_manifest_are_refused(made, copy, edit):
    path = copy / "acts" / MLP / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    (copy / "manifest.json").unlink()
    write_manifests(copy, with_hashes(copy, made.manifest))
    with pytest.raises(StoreError, match=r"rows in shards of 512, manifest.json has 886 in shards of 512"):
        open_store(copy).read([0], MLP)


def edit_attributes(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change attributes of an incomplete store, whose metadata has no hash."""
    metadata = json.loads((root / "zarr.json").read_text())
    change(metadata["attributes"])
    (root / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: at.clear(), "is a Zarr group, but not one of 'mdlm-interp activations'"),
        (lambda at: at.pop("hooks"), "zarr.json lacks the attribute 'hooks'; restore it from a copy"),
        (lambda at: at.update(dtype="int8"), "zarr.json has an unknown dtype 'int8'"),
        (
            lambda at: at.update(schema_version=3),
            "zarr.json has schema_version 3, this package reads 2; update",
        ),
    ],
)
def test_attributes_that_cannot_be_read_are_refused(partial, tmp_path, opened, change, message):
    root = Path(shutil.copytree(partial.root, tmp_path / "run.zarr"))
    edit_attributes(root, change)
    with pytest.raises(StoreError) as caught:
        opened(root)
    assert message in str(caught.value)


def test_a_path_that_is_no_store_is_refused_and_never_to_be_removed(copy, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    messages = {
        "runs.zarr": r"runs.zarr does not exist; did you mean 'run.zarr'?",
        "run.zarr/manifest.json": "manifest.json is a file, not a store",
        "thesis": "thesis has no manifest.json: it is no activation store",
        ".": f"has no manifest.json: it is no activation store; did you mean {str(copy)!r}?",
    }
    for name, message in messages.items():
        with pytest.raises(StoreError) as caught:
            open_store(tmp_path / name)
        assert message in str(caught.value)
        assert "remove" not in str(caught.value)
        assert "capture again" not in str(caught.value)


def test_a_manifest_that_replaces_those_of_ranks_meanwhile_is_found(made, copy):
    class Moving(Elsewhere):
        """Its manifest appears between a look at the names and the reading."""

        looks = 0

        def names(self, directory: str = "") -> list[str]:
            self.looks += 1
            return ["manifest.rank-0-of-2.json"] if self.looks == 1 else ["manifest.json", "zarr.json"]

    (copy / "manifest.json").write_bytes(to_bytes(made.manifest))
    assert len(ActivationStore(Moving(copy))) == 886


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
