"""A file that cannot be opened for no fault of its own is not called damaged."""

import errno
import os
import resource

import pytest

from capture import open_store
from capture.open_files import OpenFile
from mdlm_interp.errors import StoreError
from tests.capture.reader.opening import shard
from tests.capture.stores import MLP


def test_a_process_with_too_many_open_files_is_told_to_raise_the_limit(made):
    store = open_store(made.root)
    store.row_shape(MLP)  # its metadata is read
    free = os.dup(0)  # the lowest number that is not in use
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(StoreError) as caught:
            store.read([3], MLP)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(caught.value) == (
        f"{shard(made.root, 0)} cannot be opened (Too many open files); raise `ulimit -n`, or close other stores"
    )
    assert store.read([3], MLP)[MLP].shape == (1, 5)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENFILE, "close other stores or programs: the whole system has too many open"),
        (errno.EIO, "restore it from a copy or capture again"),
    ],
)
def test_the_remedy_is_of_the_error(made, monkeypatch, number, remedy):
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(StoreError) as caught:
        OpenFile("run.zarr/acts/c.0")
    assert str(caught.value) == f"run.zarr/acts/c.0 cannot be opened ({os.strerror(number)}); {remedy}"
