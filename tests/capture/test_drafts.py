"""A draft holds the bytes that were appended, whether the file system has direct writes or not."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.drafts import BUFFER_BYTES, DIRECT, FileDraft
from mdlm_interp.errors import WriteError

SIZES = (0, 1, 4095, 4096, 4097, 200_004, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES + 17)


def appended(root, sizes):
    """The file after pieces of these sizes, and what should be in it."""
    draft, expected = FileDraft(root, "acts/x/c.0"), b""
    for number, size in enumerate(sizes):
        piece = np.random.default_rng(number).integers(0, 256, size, np.uint8)
        draft.write([piece, b"", piece.tobytes()[:3]])
        piece[:] = 0  # the caller may use its memory again
        expected += np.random.default_rng(number).integers(0, 256, size, np.uint8).tobytes()
        expected += expected[len(expected) - size :][:3] if size else b""
    draft.finish()
    return draft.partial.read_bytes(), expected


@given(st.lists(st.sampled_from(SIZES), max_size=6))
@settings(deadline=None, max_examples=25)
def test_a_draft_holds_what_was_appended(tmp_path_factory, sizes):
    found, expected = appended(tmp_path_factory.mktemp("draft"), sizes)
    assert found == expected


@pytest.mark.skipif(not DIRECT, reason="this system has no direct writes")
def test_without_direct_writes_the_bytes_are_the_same(tmp_path, monkeypatch):
    refused, original = [], os.open

    def refusing(path, flags, *rest):
        if flags & DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    found, expected = appended(tmp_path, SIZES)
    assert found == expected
    assert len(refused) == 1  # it is not tried again


@pytest.mark.skipif(not DIRECT, reason="this system has no direct writes")
def test_whole_blocks_are_written_directly(tmp_path, monkeypatch):
    opened, original = [], os.open

    def watched(path, flags, *rest):
        opened.append(bool(flags & DIRECT))
        return original(path, flags, *rest)

    monkeypatch.setattr(os, "open", watched)
    draft = FileDraft(tmp_path, "acts/x/c.0")
    opened.clear()
    draft.write([bytes(2 * BUFFER_BYTES + 5000)])
    draft.finish()
    assert opened == [True, True, True, False]


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_writes_that_are_cut_short_go_on(tmp_path, monkeypatch, share):
    original = os.pwrite

    def short(descriptor, content, offset):
        return original(descriptor, content[: max(1, int(len(content) * share))], offset)

    monkeypatch.setattr(os, "pwrite", short)
    found, expected = appended(tmp_path, (BUFFER_BYTES + 5, 10_000))
    assert found == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_told(tmp_path, monkeypatch, number):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", failing)
    draft = FileDraft(tmp_path, "acts/x/c.0")
    with pytest.raises(WriteError, match="cannot be written"):
        draft.write([bytes(BUFFER_BYTES)])
    with pytest.raises(WriteError, match="cannot be written"):
        draft.finish()
