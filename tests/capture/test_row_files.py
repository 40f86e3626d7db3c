"""Rows read out of shard files are the rows that were written; whatever is wrong with a file is an error."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture import schema
from capture.open_files import ADVICE_BYTES, FileCache, OpenFile
from capture.row_files import RowFiles, array_layout
from capture.schema import Layout
from capture.shards import ABSENT, ShardEncoder
from mdlm_interp.errors import StoreError
from tests.capture.stores import stored_values

HOOK = "blocks.0.attn.hook_z"
ROW = (2, 24)
SHARD_ROWS = 1024
ROWS = 2600
"""Two full shards and one of two full chunks and a part."""
STORED = 256 * 2 * 24 * 4 + 4
"""Bytes of a float32 chunk with its checksum."""


def write_array(root: Path, values: NDArray[Any], layout: Layout) -> Path:
    """An array's zarr.json by zarr-python, and its files by `ShardEncoder`."""
    schema.create_row_arrays(zarr.create_group(root), layout, len(values))
    directory = root / "acts" / HOOK
    for number in range(-(-len(values) // SHARD_ROWS)):
        encoder = ShardEncoder(layout.shard_shape(HOOK))
        part = values[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        pieces = [*encoder.encode(part), *encoder.finish()]
        (root / schema.file_of(f"acts/{HOOK}", 1 + len(ROW), number)).write_bytes(
            b"".join(bytes(piece) for piece in pieces)
        )
    return directory


def files_of(directory: Path, cache: FileCache | None = None) -> RowFiles:
    metadata = json.loads((directory / "zarr.json").read_text())
    return RowFiles(directory, array_layout(metadata), FileCache() if cache is None else cache)


@pytest.fixture(scope="module")
def values() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((ROWS, *ROW)).astype(np.float32)


@pytest.fixture(scope="module")
def intact(values: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the array; tests only read it."""
    layout = Layout(shapes={HOOK: ROW}, length=9, shard_rows=SHARD_ROWS)
    return write_array(tmp_path_factory.mktemp("intact"), values, layout)


@pytest.fixture
def directory(values: NDArray[np.float32], tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return write_array(tmp_path, values, Layout(shapes={HOOK: ROW}, length=9, shard_rows=SHARD_ROWS))


def taken(files: RowFiles, rows: Any, *, check: bool = True) -> NDArray[Any]:
    """Rows in the order given, as the reader asks for them."""
    numbers = np.asarray(rows, np.int64)
    out = np.empty((len(numbers), *files.row), files.dtype)
    positions = np.argsort(numbers, kind="stable")
    files.take(numbers[positions], out, positions, check=check)
    return out


def crc_counter(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the sizes of what is checksummed."""
    sizes: list[int] = []
    real: Callable[[Any], int] = google_crc32c.value

    def value(data: Any) -> int:
        sizes.append(len(data))
        return real(data)

    monkeypatch.setattr(google_crc32c, "value", value)
    return sizes


def test_every_type_reads_back_bit_for_bit(tmp_path, values):
    for dtype in ("float32", "float16", "bfloat16"):
        raw = stored_values(values, dtype)[0]
        layout = Layout(shapes={HOOK: ROW}, length=9, dtype=dtype, shard_rows=SHARD_ROWS)
        files = files_of(write_array(tmp_path / dtype, raw, layout))
        assert (files.rows, files.row, files.dtype) == (ROWS, ROW, raw.dtype)
        assert np.array_equal(files.read(0, ROWS), raw)
        assert np.array_equal(taken(files, [2599, 0, 1023, 1024]), raw[[2599, 0, 1023, 1024]])


@given(
    rows=st.lists(st.integers(0, ROWS - 1), max_size=60),
    runs=st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 400)), max_size=3),
    shuffled=st.booleans(),
    check=st.booleans(),
    seen=st.booleans(),
)
def test_any_rows_are_the_ones_written(intact, values, rows, runs, shuffled, check, seen):
    files = files_of(intact)
    if seen:
        files.read(0, ROWS)
    wanted = [*rows, *(row for start, size in runs for row in range(start, min(start + size, ROWS)))]
    if shuffled:
        wanted = np.random.default_rng(0).permutation(np.array(wanted, np.int64)).tolist()
    assert np.array_equal(taken(files, wanted, check=check), values[np.array(wanted, np.int64)])
    if not shuffled:
        ascending = np.sort(np.array(wanted, np.int64))
        out = np.empty((len(wanted), *ROW), np.float32)
        files.take(ascending, out, None, check=check)
        assert np.array_equal(out, values[ascending])


@given(st.integers(0, ROWS), st.integers(0, ROWS))
def test_any_slice_is_the_one_written(intact, values, start, stop):
    start, stop = min(start, stop), max(start, stop)
    assert np.array_equal(files_of(intact).read(start, stop), values[start:stop])


def test_a_chunk_is_checked_when_it_is_first_touched_and_never_again(intact, monkeypatch):
    sizes = crc_counter(monkeypatch)
    files = files_of(intact)
    taken(files, [300])
    assert sizes == [16 * 4, STORED - 4], "the index, then the whole chunk of one row"
    files.read(256, 512)
    taken(files, [257, 300, 511, 256])
    assert len(sizes) == 2
    files.read(250, 260)
    assert sizes[2:] == [STORED - 4]
    files.read(0, 1024)
    assert len(sizes) == 5
    files.read(0, 1024)
    assert len(sizes) == 5


def test_what_was_checked_is_remembered_while_its_file_is_closed(intact, monkeypatch):
    sizes = crc_counter(monkeypatch)
    cache = FileCache(limit=1)
    files = files_of(intact, cache)
    files.read(0, ROWS)
    checked = len(sizes)
    assert len(cache) == 1
    files.read(0, ROWS)
    assert len(sizes) == checked


def test_a_file_that_changed_while_it_was_closed_is_checked_again(directory, values):
    files = files_of(directory, FileCache(limit=1))
    files.read(0, ROWS)
    flip(directory / "c.0.0.0", 77)
    with pytest.raises(StoreError, match=r"c\.0\.0\.0 is damaged"):
        files.read(0, ROWS)
    flip(directory / "c.0.0.0", 77)
    assert np.array_equal(files.read(0, ROWS), values)


def test_few_rows_are_gathered_without_their_chunks_and_without_a_check(directory, values, monkeypatch):
    flip(directory / "c.0.0.0", 3)
    sizes = crc_counter(monkeypatch)
    files = files_of(directory)
    found = taken(files, [0, 700], check=False)
    assert sizes == [16 * 4], "the index alone"
    assert np.array_equal(found[1], values[700])
    assert not np.array_equal(found[0], values[0]), "what the docstring of gather warns of"
    with pytest.raises(StoreError, match="chunk 0 does not match its checksum"):
        taken(files, range(0, 256, 2), check=False)
    with pytest.raises(StoreError, match="chunk 0 does not match its checksum"):
        taken(files, [0])


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))  # however coarse the clock


def test_a_file_cut_short_anywhere_is_an_error_not_a_crash(directory):
    file = directory / "c.0.0.0"
    content = file.read_bytes()
    lengths = {0, 1, 67, 68, STORED, len(content) - 1, len(content) - 68, len(content) - 4}
    for length in sorted({*lengths, *np.random.default_rng(0).integers(0, len(content), 20).tolist()}):
        file.write_bytes(content[:length])
        for check in (True, False):
            with pytest.raises(
                StoreError, match=r"c\.0\.0\.0 is damaged .*restore it from a copy or capture again"
            ):
                taken(files_of(directory), [1, 900], check=check)


def test_a_file_cut_short_while_it_is_open_is_an_error_not_a_crash(directory):
    files = files_of(directory)
    files.read(0, ROWS)
    os.truncate(directory / "c.0.0.0", STORED + 5)
    for read in (
        lambda: files.read(512, 520),
        lambda: taken(files, [600, 1023]),
        lambda: files.read(0, ROWS),
    ):
        with pytest.raises(
            StoreError, match=r"c\.0\.0\.0 is damaged \(it is too short: was it truncated\?\)"
        ):
            read()


def rewrite_index(file: Path, change: Callable[[NDArray[np.uint64]], object]) -> None:
    """Change the index and make its checksum right."""
    content = file.read_bytes()
    table = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).copy()
    change(table)
    checksum = google_crc32c.value(table.tobytes()).to_bytes(4, "little")
    file.write_bytes(content[:-68] + table.tobytes() + checksum)


def test_chunks_in_another_order_are_found_by_the_index(directory, values):
    file = directory / "c.0.0.0"
    content = file.read_bytes()
    chunks = [content[i * STORED : (i + 1) * STORED] for i in (2, 0, 3, 1)]
    file.write_bytes(b"".join(chunks) + content[-68:])

    def reorder(table: NDArray[np.uint64]) -> None:
        table[:, 0] = np.array([1, 3, 0, 2], np.uint64) * np.uint64(STORED)

    rewrite_index(file, reorder)
    assert np.array_equal(files_of(directory).read(0, ROWS), values)
    assert np.array_equal(taken(files_of(directory), [900, 3], check=False), values[[900, 3]])


@pytest.mark.parametrize("endian", ["little", "big"])
def test_codecs_that_are_not_ours_are_no_layout(intact, endian):
    metadata = json.loads((intact / "zarr.json").read_text())
    metadata["codecs"][0]["configuration"]["codecs"][0]["configuration"]["endian"] = endian
    if endian == "little":
        assert array_layout(metadata).indexed
        metadata["codecs"][0]["configuration"]["codecs"].append({"name": "gzip"})
    with pytest.raises(ValueError, match="other codecs or chunk keys"):
        array_layout(metadata)


@pytest.mark.parametrize("check", [True, False])
def test_a_chunk_that_was_never_written_is_an_error_not_a_number(directory, check):
    rewrite_index(directory / "c.0.0.0", lambda table: table[1].fill(ABSENT))
    files = files_of(directory)
    files.read(0, 256)
    for rows in ([300], list(range(256, 512))):
        with pytest.raises(StoreError, match=r"c\.0\.0\.0 is damaged \(chunk 1 is missing\)"):
            taken(files, rows, check=check)
        with pytest.raises(StoreError, match=r"chunk 1 is missing"):
            files.prefetch(np.array(rows), check=check)


@pytest.mark.parametrize(
    ("column", "value"), [(0, 4 * STORED - STORED + 1), (0, 2**63), (1, STORED - 1), (1, 0), (0, ABSENT)]
)
def test_an_index_of_another_array_is_refused(directory, column, value):
    rewrite_index(directory / "c.0.0.0", lambda table: table[3].__setitem__(column, value))
    with pytest.raises(StoreError, match=r"its index does not fit the file"):
        files_of(directory).read(0, 1)


def test_a_missing_file_is_named(directory):
    (directory / "c.1.0.0").unlink()
    files = files_of(directory)
    for read in (lambda: files.read(1000, 1100), lambda: taken(files, [1500], check=False)):
        with pytest.raises(
            StoreError, match=r"c\.1\.0\.0 is missing; restore it from a copy or capture again"
        ):
            read()


def test_a_failing_disk_is_an_error_that_names_the_file(intact, monkeypatch):
    files = files_of(intact)
    files.read(0, 10)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StoreError, match=r"c\.0\.0\.0 cannot be read \(Input/output error\)"):
        files.read(0, 10)
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StoreError, match=r"c\.0\.0\.0 cannot be opened \(Input/output error\)"):
        files_of(intact).read(0, 10)


def test_reads_that_return_early_are_continued(intact, values, monkeypatch):
    real = os.preadv

    def short(descriptor: int, buffers: Any, offset: int) -> int:
        return real(descriptor, [memoryview(buffers[0]).cast("B")[:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    files = files_of(intact)
    assert np.array_equal(files.read(0, ROWS), values)
    assert np.array_equal(taken(files, [2000, 5, 6, 2599]), values[[2000, 5, 6, 2599]])


def advice(monkeypatch: pytest.MonkeyPatch, *, in_memory: bool = False) -> list[tuple[int, int]]:
    """Collects the (offset, size) of each request; to whom asks, all of a file is in memory, or nothing."""
    monkeypatch.setattr(OpenFile, "in_memory", lambda file, offset: in_memory)
    asked: list[tuple[int, int]] = []

    def posix_fadvise(descriptor: int, offset: int, size: int, what: int) -> None:
        assert what == os.POSIX_FADV_WILLNEED
        asked.append((offset, size))

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    return asked


def test_scattered_rows_are_asked_for_at_once_and_neighbours_together(intact, monkeypatch):
    asked = advice(monkeypatch)
    row = 2 * 24 * 4
    files_of(intact).prefetch(np.array([3, 5, 700]), check=False)
    assert asked == [(3 * row, 3 * row), (2 * STORED + (700 - 512) * row, row)]
    asked.clear()
    files_of(intact).prefetch(np.array([3, 100]), check=False)
    assert asked == [(3 * row, row), (100 * row, row)]
    asked.clear()
    files_of(intact).prefetch(np.array([3]), check=True)
    assert asked == [(0, STORED)], "the whole chunk, which will be checked"


@pytest.mark.parametrize("check", [True, False])
def test_what_is_in_memory_is_not_asked_for(intact, monkeypatch, check):
    asked = advice(monkeypatch, in_memory=True)
    files_of(intact).prefetch(np.array([3, 5, 700, 2000]), check=check)
    assert asked == []


def test_whether_the_disk_is_needed_is_found_without_waiting_for_it(intact, monkeypatch):
    file = OpenFile(str(intact / "c.0.0.0"))
    real, flags = os.preadv, []

    def preadv(descriptor: int, buffers: Any, offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return real(descriptor, buffers, offset)

    def busy(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("capture.open_files.NO_WAIT", 8)
    monkeypatch.setattr(os, "preadv", preadv)
    assert file.in_memory(0)
    assert not file.in_memory(10**9)
    assert flags == [8, 8]
    monkeypatch.setattr(os, "preadv", busy)
    assert not file.in_memory(0)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr("capture.open_files.NO_WAIT", 0)
    assert not file.in_memory(0)
    assert len(flags) == 2


def test_long_requests_are_made_in_parts_that_the_kernel_grants(tmp_path, monkeypatch):
    layout = Layout(shapes={HOOK: (2, 600)}, length=9, shard_rows=256)
    schema.create_row_arrays(zarr.create_group(tmp_path), layout, 256)
    encoder = ShardEncoder(layout.shard_shape(HOOK))
    pieces = encoder.encode(np.zeros((256, 2, 600), np.float32)) + encoder.finish()
    directory = tmp_path / "acts" / HOOK
    (directory / "c.0.0.0").write_bytes(b"".join(bytes(piece) for piece in pieces))
    asked = advice(monkeypatch)
    files_of(directory).prefetch(np.arange(256))
    assert max(size for _, size in asked) == ADVICE_BYTES
    ends = [offset + size for offset, size in asked]
    assert [offset for offset, _ in asked] == [0, *ends[:-1]]
    assert ends[-1] == 256 * 1200 * 4 + 4


def test_without_advice_rows_are_the_same(intact, values, monkeypatch):
    advice(monkeypatch)
    monkeypatch.delattr(os, "posix_fadvise")
    files = files_of(intact)
    files.prefetch(np.array([4, 2000]))
    assert np.array_equal(taken(files, [2000, 4]), values[[2000, 4]])


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors, which only Linux lists")
def test_no_more_files_are_open_than_allowed_and_none_after(intact, values):
    before = open_descriptors()
    files = files_of(intact, FileCache(limit=2))
    for row in (0, 1024, 2048, 0, 1024, 2048):
        assert np.array_equal(files.read(row, row + 1), values[row : row + 1])
    assert open_descriptors() == before + 2
    del files
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("allowed", "expected"), [(1024, 256), (20, 16), (10**6, 4096), (resource.RLIM_INFINITY, 4096)]
)
def test_a_store_keeps_open_a_quarter_of_what_a_process_may(intact, monkeypatch, allowed, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    assert FileCache().limit == expected


def test_the_file_used_last_stays_open(intact):
    cache = FileCache(limit=2)
    files = files_of(intact, cache)
    for row in (0, 1024, 0, 2048):
        files.read(row, row + 1)
    assert cache.get(str(intact / "c.0.0.0")) is not None
    assert cache.get(str(intact / "c.1.0.0")) is None
