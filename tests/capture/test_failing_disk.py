"""A disk that fails to read: one line with the file, from every part that reads it, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from capture import CaptureConfig, open_store, run_capture
from capture.run import dry_run
from capture.verify import verify_store
from mdlm_interp.__main__ import main
from mdlm_interp.errors import StoreError
from tests.capture.test_ranks import contents

MEMORY = Path("/proc/self/mem")
"""Reading its first byte is a true input/output error, as of a disk."""

pytestmark = pytest.mark.skipif(not MEMORY.exists(), reason="needs a file whose reads fail")


def break_file(path: Path) -> None:
    """Reads fail from now on; the content is kept beside it."""
    path.rename(path.with_name("kept"))
    path.symlink_to(MEMORY)


def mend_file(path: Path) -> None:
    """The opposite."""
    path.unlink()
    path.with_name("kept").rename(path)


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "rows/xt/zarr.json", "pending/0.safetensors"])
def test_a_capture_that_cannot_read_its_beginning_stops_and_keeps_it(begun: CaptureConfig, name: str) -> None:
    path = Path(begun.out) / name
    before = contents(Path(begun.out))
    break_file(path)
    calls: list[Callable[[CaptureConfig], object]] = [run_capture, lambda config: verify_store(config.out)]
    if name in ("zarr.json", "manifest.json"):
        calls.append(dry_run)
    for call in calls:
        with pytest.raises(StoreError, match=f"{path} cannot be read .Input/output error.; restore it"):
            call(begun)
    mend_file(path)
    assert contents(Path(begun.out)) == before
    assert run_capture(begun).complete


@pytest.mark.parametrize("part", ["shard", "metadata", "sequences"])
def test_verify_names_the_file_that_cannot_be_read(config: CaptureConfig, part: str, capsys) -> None:
    store = run_capture(config)
    root, hook = Path(config.out), store.hooks[0]
    path = (
        root
        / {
            "shard": f"acts/{hook}/c.0.0",
            "metadata": f"acts/{hook}/zarr.json",
            "sequences": "seqs/t/c.0",
        }[part]
    )
    break_file(path)
    assert main(["capture", "verify", config.out]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert f"{path} cannot be read (Input/output error); restore it from a copy or capture again" in said
    mend_file(path)
    assert verify_store(config.out).bitwise


def test_a_full_table_of_files_is_no_reason_to_capture_again(config: CaptureConfig, monkeypatch) -> None:
    """The remedy is another one where the error says nothing of the file."""
    run_capture(config)
    original = Path.read_bytes

    def full(path: Path) -> bytes:
        if path.name == "zarr.json":
            raise OSError(24, "Too many open files")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(StoreError, match=r"cannot be read \(Too many open files\); raise `ulimit -n`"):
        open_store(config.out)


def test_a_place_without_file_locks_is_refused_in_one_line(config: CaptureConfig, monkeypatch) -> None:
    def without(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without)
    with pytest.raises(
        StoreError,
        match=r"run\.zarr needs file locks, and its file system has none \(Function not implemented",
    ):
        run_capture(config)
    assert not Path(config.out).exists()


def test_a_file_that_goes_while_the_store_is_completed_is_not_recorded_as_empty(
    config: CaptureConfig, monkeypatch
) -> None:
    from capture import finish

    original = finish._is_shard

    def losing(path: str) -> bool:
        if path == "seqs/t/c.0":
            (Path(config.out) / path).unlink()
        return original(path)

    monkeypatch.setattr(finish, "_is_shard", losing)
    with pytest.raises(StoreError, match=r"seqs/t/c\.0 is missing"):
        run_capture(config)
    monkeypatch.undo()
    assert run_capture(config).complete
