"""From what a user names to the files that are read: paths, globs, directories of shards, and lists.

Files of a glob or a directory come in natural order, shard-2 before shard-10.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mdlm_interp.documents.datasets_directory import saved_shards
from mdlm_interp.documents.failures import explained, missing, siblings
from mdlm_interp.documents.kinds import KINDS, kind_of, suffix_of
from mdlm_interp.errors import DataError, nearest

LIST_MARK = "@"
"""Start of an argument that names a list of files."""

HUB_FOLDER = "data"
"""Where a dataset repository on the Hugging Face hub keeps its shards."""

_DIGITS = re.compile(r"(\d+)", re.ASCII)
_MAGIC = re.compile(r"[*?\[]")
_SPLIT = re.compile(r"(?:^|[-_.])(train|training|validation|valid|val|dev|test)(?=[-_.]|$)", re.IGNORECASE)


def natural_key(path: str | Path) -> tuple[tuple[str | int, ...], str]:
    """Sorts numbers inside names by their value.

    >>> sorted(["shard-10", "shard-2", "shard-02"], key=natural_key)
    ['shard-02', 'shard-2', 'shard-10']
    """
    parts = _DIGITS.split(str(path))
    return tuple(int(part) if at % 2 else part for at, part in enumerate(parts)), str(path)


def expand_files(paths: Iterable[str | Path]) -> tuple[Path, ...]:
    """The files that arguments mean, in order; files themselves are not opened.

    An argument is a path that exists, a glob, a directory of shards, or `@list.txt`: a text file with one of
    the others on each line, relative to the list. Expanding the result again gives the same.

    Raises:
        DataError: If an argument means no file, or a directory could be meant in more than one way.
    """
    return tuple(file for path in paths for file in _expand(str(path)))


def _expand(argument: str, list_file: Path | None = None) -> Iterator[Path]:
    path = Path(argument) if list_file is None else list_file.parent / argument
    with explained(path):
        if path.is_dir():
            yield from _in_directory(path)
        elif path.exists() or path.is_symlink():
            yield path
        elif argument.startswith(LIST_MARK) and list_file is not None:
            raise DataError(f"{list_file} names another list, {argument}; name the files themselves")
        elif argument.startswith(LIST_MARK):
            yield from _in_list(Path(argument[len(LIST_MARK) :]))
        elif _MAGIC.search(argument):
            yield from _matching(path)
        else:
            raise missing(path)


def _in_list(path: Path) -> Iterator[Path]:
    with explained(path):
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            where = f"byte {error.start}: {error.reason}"
            raise DataError(
                f"{path} is not UTF-8 ({where}), expected a list of files, one path on each line"
            ) from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path} lists no file; write one path on each line")
    for name in names:
        yield from _expand(name, path)


def _matching(pattern: Path) -> Iterator[Path]:
    found = sorted(glob.glob(str(pattern), recursive=True), key=natural_key)
    if not found:
        parts = pattern.parts
        known = next(at for at, part in enumerate(parts) if _MAGIC.search(part))
        # The first part with a wildcard is compared with what stands in its place.
        there = siblings(Path(*parts[: known + 1]))
        raise DataError(f"{pattern} matches no file{nearest(parts[known], there)}")
    for match in map(Path, found):
        yield from _in_directory(match) if match.is_dir() else [match]


def _in_directory(directory: Path) -> Iterator[Path]:
    shards = saved_shards(directory)
    if shards is None:
        shards = _known_files(directory)
        if not shards and (directory / HUB_FOLDER).is_dir():
            shards = _known_files(directory / HUB_FOLDER)
    if not shards:
        folders = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
        inside = f"; name one of its directories: {', '.join(folders[:8])}" if folders else ""
        raise DataError(f"{directory} holds no file of a known kind ({', '.join(KINDS)}){inside}")
    yield from shards


def _known_files(directory: Path) -> list[Path]:
    files = sorted(
        (
            entry
            for entry in directory.iterdir()
            if suffix_of(entry) in KINDS
            and not entry.is_dir()
            and not entry.name.startswith(".")
            # What the datasets library keeps of its own computations, beside the data.
            and not (entry.name.startswith("cache-") and suffix_of(entry) == ".arrow")
        ),
        key=natural_key,
    )
    kinds = {kind_of(file): suffix_of(file) for file in reversed(files)}
    if len(kinds) > 1:
        suffixes = sorted(kinds.values())
        raise DataError(
            f"{directory} holds files of several kinds ({', '.join(suffixes)}), perhaps of the same text; "
            f"name those wanted, such as {directory / ('*' + suffixes[0])}"
        )
    splits = sorted({found[1].lower() for file in files if (found := _SPLIT.search(file.name))})
    if len(splits) > 1:
        example = next(file.name for file in files if (found := _SPLIT.search(file.name)))
        raise DataError(
            f"{directory} holds several splits ({', '.join(splits)}); "
            f"name the files of one with a glob, as {example} and its like"
        )
    return files
