"""A store in an object store reads like a local one, and damage is found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from obstore.store import from_url

from capture import ActivationStore, open_store, run_capture
from capture.checked_files import verify_files
from capture.remote import ObjectStore
from capture.verify import verify_store
from mdlm_interp.errors import StoreError
from tests.capture.remote.service import Answer


def test_a_remote_store_reads_like_a_local_one(local, remote):
    assert (len(remote), remote.hooks, remote.config) == (504, local.hooks, local.config)
    for wanted in (slice(None), slice(250, 260), [503, 0, 0, 255, 256, 17]):
        for read in ("read", "gather", "coords"):
            expected, found = getattr(local, read)(wanted), getattr(remote, read)(wanted)
            assert expected.keys() == found.keys()
            for name, values in expected.items():
                assert torch.equal(values, found[name]), (read, name)
    assert all(torch.equal(a, b) for a, b in zip(local.tokens(), remote.tokens(), strict=True))
    for hook in local.hooks:
        expected, found = local.statistics(hook), remote.statistics(hook)
        for name in ("count", "mean", "mean_square"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
            )
    assert remote.fingerprint() == local.fingerprint()
    assert remote.bytes_on_disk == local.bytes_on_disk


def test_a_remote_store_is_verified(remote):
    found = verify_store(remote.name, endpoint=remote.place.endpoint, batches=6)
    assert found.bitwise
    assert (found.files, found.rows) == (len(remote.place.files()) - 1, 504)


def test_any_zarr_reader_opens_it(local, remote):
    hook = local.hooks[0]
    options: Any = {"endpoint": remote.place.endpoint, "client_options": {"allow_http": True}}
    store = zarr.storage.ObjectStore(from_url(remote.name, **options), read_only=True)
    array = zarr.open_array(store, path=f"acts/{hook}", mode="r")
    assert np.array_equal(np.asarray(array[10:20]), local.read(slice(10, 20), hook)[hook].numpy())


def test_a_few_rows_are_few_bytes_of_a_shard(wanted, through):
    store = run_capture(replace(wanted, max_sequences=None, max_rows=1100, shard_rows=2048))
    hook = store.hooks[1]
    size = len(store.place.read(f"acts/{hook}/c.0.0") or b"")
    chunk = 256 * 32 * 4 + 4
    assert size > 4 * chunk
    before = through.sent("c.0.0")
    store.read(slice(300, 310), hook)
    # A chunk, and the index: 16 bytes for each of 8 chunks and a checksum.
    assert through.sent("c.0.0") - before == chunk + 8 * 16 + 4


@contextmanager
def changed(place: ObjectStore, path: str, content: bytes | None) -> Iterator[None]:
    before = place.read(path) or b""
    if content is None:
        place.remove(path)
    else:
        place.replace(path, content)
    try:
        yield
    finally:
        place.replace(path, before)


READS: dict[str, Callable[[ActivationStore], object]] = {
    "read": lambda store: store.read([300]),
    "verify": verify_files,
}


@pytest.mark.parametrize("read", READS)
def test_one_flipped_bit_is_found(remote, read):
    path = f"acts/{remote.hooks[1]}/c.1.0"
    content = bytearray(remote.place.read(path) or b"")
    content[1000] ^= 1
    with (
        changed(remote.place, path, bytes(content)),
        pytest.raises(StoreError, match=rf"^{remote.name}/{path} is damaged \(.*; restore it from a copy"),
    ):
        READS[read](open_store(remote.name, endpoint=remote.place.endpoint))


@pytest.mark.parametrize("read", READS)
def test_a_missing_object_is_named(remote, read):
    path = f"acts/{remote.hooks[1]}/c.1.0"
    with (
        changed(remote.place, path, None),
        pytest.raises(StoreError, match=rf"^{remote.name}/{path} is missing; restore it from a copy"),
    ):
        READS[read](open_store(remote.name, endpoint=remote.place.endpoint))


@pytest.mark.parametrize("read", [*READS, "fingerprint", "size"])
def test_a_service_that_refuses_while_reading_is_told_in_one_line(remote, through, read):
    store = open_store(remote.name, endpoint=through.endpoint)
    store.read([0])
    through.fault = lambda method, path: Answer(400, "<Error><Code>ExpiredToken</Code></Error>")
    more = {"fingerprint": ActivationStore.fingerprint, "size": lambda store: store.bytes_on_disk}
    with pytest.raises(
        StoreError, match=rf"^{remote.name} cannot be read: the credentials have expired; set AWS"
    ):
        {**READS, **more}[read](store)
