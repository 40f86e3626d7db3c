"""The manifest of a long capture: what is known of a shard is worked out once, and kept as long as the shard."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import Field, fields, replace
from typing import Any

from capture.manifest import Manifest, ResumePoint, Shard, from_bytes, to_bytes
from capture.places import Directory
from capture.reader import ActivationStore
from capture.store_files import StoreFiles
from tests.capture.stores import Plan, make_store


class Counted(tuple[Shard, ...]):
    """Shards that count how often somebody goes through them."""

    passes = 0

    def __iter__(self) -> Iterator[Shard]:
        self.passes += 1
        return super().__iter__()


def shards(count: int) -> Counted:
    """Full shards of 256 rows, two sequences in each."""
    return Counted(
        Shard(
            rows=(256 * number, 256 * (number + 1)),
            sequences=(2 * number, 2 * (number + 1)),
            sha256=f"{number:064x}",
            pending=number,
            not_finite=0,
            resume=ResumePoint(sequence=2 * number, row=256 * number),
        )
        for number in range(count)
    )


def manifest_of(listed: tuple[Shard, ...]) -> Manifest:
    return Manifest(length=128, shard_rows=256, planned_rows=10**6, shards=listed)


def test_a_walk_over_the_committed_shards_counts_the_rows_once(tmp_path):
    """Exact: the passes over all shards are as many for 400 shards as for 4."""
    walks = []
    for count in (4, 400):
        listed = shards(count)
        files = StoreFiles(Directory(tmp_path), manifest_of(listed))
        assert [shard.rows for shard in files.committed()] == [shard.rows for shard in listed]
        walks.append(listed.passes)
    assert walks[0] == walks[1]


def test_asking_for_sequence_after_sequence_does_not_count_them_again(tmp_path):
    truth = make_store(tmp_path / "run.zarr", Plan(complete=False, shard_rows=256))
    listed, place = Counted(truth.manifest.shards), Directory(truth.root)
    store = ActivationStore(place, StoreFiles(place, replace(truth.manifest, shards=listed)))
    store.sequence_rows(0)
    before = listed.passes
    rows = [store.sequence_rows(seq).start for seq in range(store.n_sequences)]
    assert rows == truth.sequences["row"].tolist()
    assert listed.passes == before


def test_a_commit_serialises_only_the_shard_that_it_adds(monkeypatch):
    serialised: list[Any] = []

    def counted(item: Any) -> tuple[Field[Any], ...]:
        serialised.append(item)
        return fields(item)

    monkeypatch.setattr("capture.manifest.fields", counted)
    *first, last = shards(30)
    before = manifest_of(tuple(first))
    to_bytes(before)
    del serialised[:]
    content = to_bytes(replace(before, shards=(*before.shards, last)))
    assert serialised == [last, last.resume]
    assert from_bytes(content, "manifest.json").shards == (*first, last)


def test_nothing_is_kept_of_a_manifest_that_nobody_has():
    # No other test has these.
    manifest = manifest_of(tuple(replace(shard, pending=123 + shard.pending) for shard in shards(3)))
    content = to_bytes(manifest)
    left = [weakref.ref(shard) for shard in manifest.shards]
    del manifest
    again = from_bytes(content, "manifest.json")
    left += [weakref.ref(shard) for shard in again.shards]
    del again
    gc.collect()
    assert [reference() for reference in left] == [None] * 6


def test_a_shard_that_was_serialised_equals_one_that_was_not():
    serialised, other = shards(2)[1], shards(2)[1]
    to_bytes(manifest_of((serialised,)))
    assert serialised == other
    assert hash(serialised) == hash(other)
    changed = replace(serialised, pending=7)
    assert b'"pending": 7,' in to_bytes(manifest_of((changed,)))


def test_the_file_is_to_the_byte_what_it_always_was():
    zeros, resume = "0" * 63, '"resume": {"documents": 0, "blocks": 0, "candidate": 0, "sequence"'
    expected = f"""{{
  "schema_version": 2,
  "complete": false,
  "committed_rows": 512,
  "n_sequences": 4,
  "planned_rows": 1000000,
  "length": 128,
  "shard_rows": 256,
  "files": {{}},
  "shards": [
    {{"rows": [0, 256], "sequences": [0, 2], "sha256": "{zeros}0", "pending": 0, "not_finite": 0, {resume}: 0, \
"row": 0}}}},
    {{"rows": [256, 512], "sequences": [2, 4], "sha256": "{zeros}1", "pending": 1, "not_finite": 0, {resume}: 2, \
"row": 256}}}}
  ],
  "sha256": "0968c9b051f2a9cc865fb7ef6e03a03bd7c5ab74f3453711fa9fa6c4ac7ed0a5"
}}
"""
    assert to_bytes(manifest_of(shards(2))).decode() == expected
