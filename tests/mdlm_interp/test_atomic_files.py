"""Atomic writes: whole or not at all, whatever fails, and one line when the disk refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdlm_interp.atomic_files import PREFIX, replacing, replacing_directory, write_errors
from mdlm_interp.errors import OutputExistsError, WriteError

ROOT = Path(__file__).parents[2]
REFUSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
LIMIT = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
from safetensors.torch import save_file
from mdlm_interp import load_tokenizer
from mdlm_interp.atomic_files import replacing, replacing_directory
from mdlm_interp.errors import WriteError
tokenizer, target = load_tokenizer("bundled"), Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""
"""A process whose files may hold 20,000 bytes: a full disk without root."""


def limited(code: str, target: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", LIMIT + code, str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def half(path: Path, error: BaseException | type[BaseException]) -> None:
    path.write_text("half")
    raise error


# One file


def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "log.json"
    target.write_text("old")
    with replacing(target) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path
        assert partial.suffix == ".json"
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["log.json"]


def test_missing_parents_of_a_file_are_made(tmp_path):
    with replacing(tmp_path / "a" / "b" / "file") as partial:
        partial.write_text("x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "full")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises((KeyboardInterrupt, ValueError, WriteError)), replacing(target) as partial:
        half(partial, error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_does_not_get_into_the_next_file(tmp_path):
    (tmp_path / f"{PREFIX}file").write_text("left over")
    with replacing(tmp_path / "file") as partial, partial.open("a") as stream:
        stream.write("new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        calls.append("directory" if os.path.isdir(f"/dev/fd/{descriptor}") else "file")
        sync(descriptor)

    def renaming(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr("os.fsync", syncing)
    monkeypatch.setattr("os.replace", renaming)
    with replacing(tmp_path / "file") as partial:
        partial.write_text("x")
    assert calls == ["file", "rename", "directory"]
    calls.clear()
    with replacing_directory(tmp_path / "model") as partial:
        (partial / "weights").write_text("x")
    assert calls == ["file", "directory", "rename", "directory"]


def test_a_library_that_makes_its_files_private_does_not_make_ours_so(tmp_path):
    with replacing(tmp_path / "file") as partial:
        partial.write_text("x")
        partial.chmod(0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


# A directory


def test_a_directory_has_its_name_only_when_it_is_whole(tmp_path):
    with replacing_directory(tmp_path / "runs" / "model") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert names(tmp_path / "runs") == [f"{PREFIX}model"]
    assert names(tmp_path / "runs") == ["model"]
    assert (tmp_path / "runs" / "model" / "sub" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "full")])
def test_a_directory_that_fails_leaves_nothing(tmp_path, error):
    with (
        pytest.raises((KeyboardInterrupt, ValueError, WriteError)),
        replacing_directory(tmp_path / "model") as partial,
    ):
        half(partial / "file", error)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_does_not_get_into_the_next_directory(tmp_path):
    (tmp_path / f"{PREFIX}model").mkdir()
    (tmp_path / f"{PREFIX}model" / "old").touch()
    with replacing_directory(tmp_path / "model") as partial:
        (partial / "new").touch()
    assert names(tmp_path / "model") == ["new"]


def test_an_empty_directory_is_taken_and_anything_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with replacing_directory(tmp_path / "empty") as partial:
        (partial / "file").touch()
    with (
        pytest.raises(OutputExistsError, match=r"empty exists and is not empty; choose another path"),
        replacing_directory(tmp_path / "empty"),
    ):
        raise AssertionError("refused before anything is written")
    with (
        pytest.raises(OutputExistsError, match="file exists and is a file or a link"),
        replacing_directory(tmp_path / "empty" / "file"),
    ):
        raise AssertionError("refused before anything is written")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputExistsError, match="here exists and is the working"), replacing_directory("."):
        raise AssertionError("refused before anything is written")


def test_what_a_killed_process_left_is_removed_whichever_kind_it_is(tmp_path):
    left = tmp_path / f"{PREFIX}out"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "old").touch()
    with replacing(tmp_path / "out") as partial:
        partial.write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "new"
    (tmp_path / "out").unlink()
    left.write_text("old")
    with replacing_directory(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("make", [replacing, replacing_directory])
@pytest.mark.parametrize("kind", ["file", "directory", "nothing"])
def test_a_link_in_the_way_is_removed_and_what_it_leads_to_is_kept(tmp_path, make, kind):
    kept = tmp_path / "kept"
    if kind == "directory":
        kept.mkdir()
        (kept / "file").write_text("mine")
    elif kind == "file":
        kept.write_text("mine")
    (tmp_path / f"{PREFIX}out").symlink_to(kept)
    with make(tmp_path / "out") as partial:
        assert not partial.is_symlink()
    assert names(tmp_path) == ["kept", "out"][kind == "nothing" :]
    if kind == "directory":
        assert (kept / "file").read_text() == "mine"
    elif kind == "file":
        assert kept.read_text() == "mine"


@pytest.mark.parametrize("make", [replacing, replacing_directory])
def test_what_was_left_and_cannot_be_removed_is_told_in_one_line(tmp_path, make, monkeypatch):
    (tmp_path / f"{PREFIX}out").mkdir()

    def refusing(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "entry")

    monkeypatch.setattr("shutil.rmtree", refusing)
    with (
        pytest.raises(WriteError, match=f"^{tmp_path}/out cannot be written: Permission denied; choose a"),
        make(tmp_path / "out"),
    ):
        raise AssertionError("refused before anything is written")


# A disk that refuses


@pytest.mark.parametrize("number", REFUSING)
def test_a_disk_that_refuses_is_told_in_one_line_with_path_reason_and_remedy(tmp_path, number):
    with pytest.raises(WriteError) as caught, replacing(tmp_path / "file") as partial:
        raise OSError(number, os.strerror(number), str(partial))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file'} cannot be written: {os.strerror(number)}; ")
    assert message.partition("; ")[2]
    assert "\n" not in message


def test_a_parent_that_is_a_file_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    message = r"below cannot be written: (File exists|Not a directory); choose another path"
    with pytest.raises(WriteError, match=message), replacing(tmp_path / "file" / "below"):
        raise AssertionError("refused before anything is written")
    below = tmp_path / "file" / "sub" / "below"
    with pytest.raises(WriteError, match=message), replacing_directory(below):
        raise AssertionError("refused before anything is written")


def test_a_file_in_an_unfinished_directory_goes_by_its_later_path(tmp_path):
    with (
        pytest.raises(WriteError, match=f"^{tmp_path}/model/weights cannot be written: No space"),
        replacing_directory(tmp_path / "model") as partial,
        replacing(partial / "weights"),
    ):
        raise OSError(errno.ENOSPC, "full")


def test_an_error_about_another_file_or_that_no_disk_makes_passes(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        (tmp_path / "input.txt").read_text()
    with pytest.raises(PermissionError), write_errors(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/input.txt")
    with pytest.raises(BrokenPipeError), write_errors(tmp_path / "file"):
        raise BrokenPipeError(errno.EPIPE, "pipe")
    with pytest.raises(RuntimeError, match="os error 2"), write_errors(tmp_path / "file"):
        raise RuntimeError("No such file or directory (os error 2)")


def test_a_real_limit_stops_python_safetensors_and_tokenizers_with_the_same_line(tmp_path):
    old = tmp_path / "old"
    old.write_text("old")
    code = """
for write in (
    lambda partial: partial.write_bytes(b"x" * 30_000),
    lambda partial: save_file({"x": torch.zeros(10_000)}, partial),
    lambda partial: tokenizer._backend.save(str(partial)),
):
    try:
        with replacing(target) as partial:
            write(partial)
    except WriteError as error:
        print(error)
"""
    lines = limited(code, old).splitlines()
    assert len(lines) == 3
    assert set(lines) == {
        f"{old} cannot be written: File too large; the file system or `ulimit -f` caps the size of a file; "
        "choose another directory"
    }
    assert old.read_text() == "old"
    assert names(tmp_path) == ["old"]


def test_a_real_limit_leaves_no_part_of_a_directory(tmp_path):
    code = """
try:
    with replacing_directory(target) as partial:
        (partial / "config.json").write_text("{}")
        save_file({"x": torch.zeros(10_000)}, partial / "model.safetensors")
except WriteError as error:
    print(error)
"""
    assert "model cannot be written: File too large" in limited(code, tmp_path / "model")
    assert names(tmp_path) == []
