"""The fingerprint of a store is a plain hash of what any Zarr reader sees."""

import hashlib

from capture import open_store
from tests.capture.reader.opening import SHARD_ROWS, plain
from tests.capture.stores import (
    HOOKS,
    Plan,
    make_store,
)


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
