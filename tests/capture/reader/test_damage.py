"""A flipped bit or a missing file is an error that names the file, never a wrong number."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capture import open_store
from capture.reader import ActivationStore
from mdlm_interp.errors import StoreError
from tests.capture.reader.opening import flip, shard
from tests.capture.stores import (
    MLP,
    Plan,
    make_store,
)

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
        (None, "run.zarr/manifest.json is missing; restore it from a copy"),
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
