"""What an argument means: paths, globs, directories, lists; the order of files, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp.documents import expand_files
from mdlm_interp.documents.files import natural_key
from mdlm_interp.errors import DataError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The directory that tests are in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments) -> list[str]:
    """What arguments expand to, seen to stay the same when expanded again."""
    files = expand_files(arguments)
    assert expand_files(files) == files
    return [str(file) for file in files]


def refusal_of(*arguments) -> str:
    with pytest.raises(DataError) as caught:
        expand_files(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_are_themselves_in_the_order_given_also_twice(here, write):
    write("b.txt")
    write("a.unknown")
    assert names("b.txt", here / "a.unknown", Path("b.txt")) == ["b.txt", str(here / "a.unknown"), "b.txt"]
    assert names() == []


def test_a_glob_is_its_files_in_natural_order(here, write):
    for number in (10, 2, 1, 100):
        write(f"shards/shard-{number}.jsonl")
    write("shards/deep/shard-3.jsonl")
    assert names("shards/*.jsonl") == [f"shards/shard-{n}.jsonl" for n in (1, 2, 10, 100)]
    assert names("shards/shard-?.jsonl") == ["shards/shard-1.jsonl", "shards/shard-2.jsonl"]
    assert names("**/*-3.jsonl") == ["shards/deep/shard-3.jsonl"]
    assert names(here / "sh*" / "*-1.jsonl") == [str(here / "shards/shard-1.jsonl")]


@given(st.lists(st.text("ab019-_.", min_size=1, max_size=8), unique=True, max_size=10))
def test_natural_order_is_total_and_by_value(found):
    """Exact: any order of the same names sorts to the same."""
    backwards = found[::-1]
    assert sorted(backwards, key=natural_key) == sorted(found, key=natural_key)
    numbers = sorted((f"s{n}.txt" for n in range(0, 130, 7)), key=natural_key)
    assert numbers == [f"s{n}.txt" for n in range(0, 130, 7)]


def test_a_file_whose_name_looks_like_a_glob_or_a_list_is_that_file(here, write):
    for name in ("a[1].txt", "a1.txt", "@b.txt", "star*.txt", "stars.txt"):
        write(name)
    assert names("a[1].txt", "@b.txt", "star*.txt") == ["a[1].txt", "@b.txt", "star*.txt"]


def test_a_glob_that_matches_nothing_names_the_nearest(here, write):
    write("shards/shard-1.jsonl")
    assert refusal_of("shards/shrad-*.jsonl") == (
        "shards/shrad-*.jsonl matches no file; did you mean 'shard-1.jsonl'?"
    )
    assert refusal_of("shrads/*.jsonl") == "shrads/*.jsonl matches no file"
    assert refusal_of("shar*s/x.jsonl") == "shar*s/x.jsonl matches no file; did you mean 'shards'?"
    assert refusal_of("*.zzz") == "*.zzz matches no file; known: 'shards'"


def test_a_directory_is_its_known_files_in_natural_order(here, write):
    for name in ("s10.jsonl", "s9.JSONL", "README.md", ".s1.jsonl", "deep/s2.jsonl", "notes"):
        write(f"shards/{name}")
    assert names("shards") == ["shards/s9.JSONL", "shards/s10.jsonl"]
    assert names("shards/") == ["shards/s9.JSONL", "shards/s10.jsonl"]
    assert names("sh*") == ["shards/s9.JSONL", "shards/s10.jsonl"]


def test_a_repository_of_the_hub_is_the_shards_in_its_data_folder(here, write):
    write("owt/README.md")
    for number in (0, 1):
        write(f"owt/data/train-{number:05}-of-00002.parquet")
    assert names("owt") == [f"owt/data/train-{n:05}-of-00002.parquet" for n in (0, 1)]


def test_results_that_the_datasets_library_kept_are_no_shards(here, write):
    write("set/owt-train-00000-of-00001.arrow")
    write("set/cache-0123456789abcdef.arrow")
    assert names("set") == ["set/owt-train-00000-of-00001.arrow"]


@pytest.mark.parametrize("folder", ["owt", "owt/data"])
def test_a_directory_with_several_splits_asks_for_one(here, write, folder):
    for split in ("validation", "train", "test"):
        write(f"{folder}/{split}-00000-of-00001.parquet")
    assert refusal_of("owt") == (
        f"{folder} holds several splits (test, train, validation); "
        f"name the files of one with a glob, as test-00000-of-00001.parquet and its like"
    )
    assert names(f"{folder}/train-*") == [f"{folder}/train-00000-of-00001.parquet"]


def test_a_directory_with_several_kinds_asks_for_one(here, write):
    for name in ("a.jsonl", "a.jsonl.gz", "b.txt"):
        write(f"shards/{name}")
    assert refusal_of("shards") == (
        "shards holds files of several kinds (.jsonl, .jsonl.gz, .txt), perhaps of the same text; "
        "name those wanted, such as shards/*.jsonl"
    )


def test_a_directory_without_a_known_file_is_refused(here, write):
    write("shards/README.md")
    kinds = (
        ".txt, .raw, .jsonl, .ndjson, .tar, .parquet, .arrow, .bin, .txt.gz, .txt.zst, .txt.xz, .raw.gz, .raw.zst, "
        ".raw.xz, .jsonl.gz, .jsonl.zst, .jsonl.xz, .ndjson.gz, .ndjson.zst, .ndjson.xz, .tar.gz, .tar.zst, .tar.xz, "
        ".xz"
    )
    assert refusal_of("shards") == f"shards holds no file of a known kind ({kinds})"
    write("shards/train/a.txt")
    write("shards/test/a.txt")
    assert refusal_of("shards") == (
        f"shards holds no file of a known kind ({kinds}); name one of its directories: test, train"
    )


def test_a_list_is_what_each_of_its_lines_means_relative_to_it(here, write):
    write("shards/s10.txt")
    write("shards/s9.txt")
    other = write("elsewhere/o.txt")
    write(
        "shards/list.txt",
        f"\ufeffs10.txt\r\n\n  s9.txt  \r\n../elsewhere/o.txt\ns*.txt\n{other}\n../elsewhere",
    )
    assert names("@shards/list.txt") == [
        "shards/s10.txt",
        "shards/s9.txt",
        "shards/../elsewhere/o.txt",
        "shards/s9.txt",
        "shards/s10.txt",
        str(other),
        "shards/../elsewhere/o.txt",
    ]
    assert names(f"@{here}/shards/list.txt")[0] == str(here / "shards/s10.txt")


def test_a_list_that_cannot_be_right_is_refused(here, write):
    assert refusal_of("@lits.txt") == "lits.txt does not exist"
    write("list.txt", "\n \n")
    assert refusal_of("@lits.txt") == "lits.txt does not exist; did you mean 'list.txt'?"
    assert refusal_of("@list.txt") == "list.txt lists no file; write one path on each line"
    write("list.txt", b"a.txt\n\xff")
    assert refusal_of("@list.txt") == (
        "list.txt is not UTF-8 (byte 6: invalid start byte), expected a list of files, one path on each line"
    )
    write("list.txt", "a.txt\nb.txt")
    write("a.txt")
    assert refusal_of("@list.txt") == "b.txt does not exist; did you mean 'a.txt'?"
    write("list.txt", "@list.txt")
    assert refusal_of("@list.txt") == ("list.txt names another list, @list.txt; name the files themselves")


def test_a_link_to_nowhere_is_told_as_such_also_in_a_directory(here, write, refusal):
    (here / "shards").mkdir()
    (here / "shards/a.txt").symlink_to("gone.txt")
    assert names("shards") == ["shards/a.txt"]
    expected = " is a link to gone.txt, which does not exist; name the file itself"
    assert refusal(here / "shards/a.txt") == expected
    loop = here / "loop.txt"
    loop.symlink_to("loop.txt")
    assert refusal(loop) == " is a link to loop.txt, which does not exist; name the file itself"


def test_what_is_no_file_is_refused(here, refusal):
    os.mkfifo(here / "pipe.txt")
    assert refusal(here / "pipe.txt") == (
        " is no regular file, and a resumed run reads it again; save it as a file"
    )


def test_a_directory_that_may_not_be_read_is_refused(here, write, monkeypatch):
    write("shards/a.txt")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert refusal_of("shards") == "shards cannot be read: Permission denied; change its permissions"


def test_a_disk_that_fails_is_told_as_such(write, refusal, monkeypatch):
    path = write("a.txt", "some text")

    def failing(path, *args):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", failing)
    assert refusal(path) == " cannot be read: Input/output error; is its disk healthy?"
