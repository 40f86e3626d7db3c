"""The text of a store is the one whose hash it records: what changes meanwhile, or comes twice, is refused."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from capture import CaptureConfig, open_store, run_capture
from capture.writer import Rows, StoreWriter
from mdlm_interp.checkpoints import sha256_of
from mdlm_interp.errors import ConfigError, DataError
from tests.capture.conftest import story


def contents(store: str) -> dict[str, bytes]:
    """Every file of a store by its path."""
    root = Path(store)
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture
def long(config: CaptureConfig, small_shards: None, tmp_path: Path) -> CaptureConfig:
    """All of three files of the test's own, in batches of 4 and shards of 64 rows."""
    third = tmp_path / "third.txt"
    third.write_text("\n\n".join(story(100 + number) for number in range(20)))
    copies = [shutil.copy(file, tmp_path / file.name) for file in config.files]
    return replace(config, files=(*map(Path, copies), third), max_sequences=None, batch_size=4)


def append(file: Path) -> None:
    with file.open("a") as stream:
        stream.write(" and more")


def put_other(file: Path) -> None:
    """Another file of the same size and times under the name."""
    before = file.stat()
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes().replace(b"old", b"new"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


def overwrite(file: Path) -> None:
    """Other bytes in place, size and times as they were."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(file.read_bytes().replace(b"old", b"new"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def change_at(
    monkeypatch: pytest.MonkeyPatch, row: int, change: Callable[[Path], None], file: Path
) -> list[bytes]:
    """Change a file when the first batch from that row on is handed over; what it held before."""
    original, before = StoreWriter.append, list[bytes]()

    def changing(self: StoreWriter, rows: Rows) -> None:
        if rows.start >= row and not before:
            before.append(file.read_bytes())
            change(file)
        original(self, rows)

    monkeypatch.setattr(StoreWriter, "append", changing)
    return before


@pytest.mark.parametrize(("row", "which"), [(0, 0), (192, 2), (1000, 0)])
@pytest.mark.parametrize("change", [append, put_other, overwrite, Path.unlink])
def test_a_file_that_changes_meanwhile_is_not_recorded_under_a_hash_that_it_lacks(
    long, monkeypatch, change, row, which
):
    """Exact: what is committed stays, and with the file restored the same call goes on to the same bytes."""
    whole = run_capture(replace(long, out=long.out + ".whole"))
    assert len(whole) > 1100
    file = long.files[which]
    expected = sha256_of(file)
    with monkeypatch.context() as patched:
        before = change_at(patched, row, change, file)
        with pytest.raises(DataError) as caught:
            run_capture(long)
    assert before
    what = "is gone" if change is Path.unlink else f"changed from sha256 {expected[:16]}... to "
    assert str(caught.value).startswith(f"{file} {what}")
    assert str(caught.value).endswith(
        f" while {long.out} was made of it, so no more is committed; restore it and run this again, or choose "
        f"another --out"
    )
    store = open_store(long.out)
    assert not store.complete
    # A shard is committed with the batch that fills it, and that one comes after the change at the latest.
    assert len(store) <= row // 64 * 64 + 64
    assert row == 0 or len(store) > 0
    file.write_bytes(before[0])
    assert run_capture(long).complete
    assert contents(long.out) == contents(whole.name)


def test_a_file_that_is_written_again_with_the_same_content_is_no_obstacle(long, monkeypatch):
    before = change_at(monkeypatch, 192, touch, long.files[0])
    assert run_capture(long).complete
    assert before


@pytest.mark.parametrize("how", ["the same path", "another path", "a link", "a glob besides"])
def test_a_file_that_is_named_twice_is_refused_before_writing(long, tmp_path, how):
    file = long.files[0]
    other: Path = {
        "the same path": file,
        "another path": tmp_path / ".." / tmp_path.name / file.name,
        "a link": tmp_path / "link.txt",
        "a glob besides": tmp_path / "fi*.txt",
    }[how]
    if how == "a link":
        other.symlink_to(file)
    with pytest.raises(ConfigError) as caught:
        run_capture(replace(long, files=(file, long.files[1], other)))
    again = file if how == "a glob besides" else other
    also = f", also as {file}" if again != file else ""
    assert str(caught.value) == f"files name {again} twice{also}; name each file once"
    assert not Path(long.out).exists()


def test_two_files_of_the_same_content_are_refused_before_writing(long, tmp_path):
    copy = Path(shutil.copy(long.files[0], tmp_path / "copy.txt"))
    with pytest.raises(DataError) as caught:
        run_capture(replace(long, files=(*long.files, copy)))
    assert str(caught.value) == (
        f"{long.files[0]} and {copy} have the same content (sha256 {sha256_of(copy)[:16]}...), and each text is "
        f"captured once; leave one out"
    )
    assert not Path(long.out).exists()
