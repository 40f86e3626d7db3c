"""Writers of every format that is read, and what reading a bad file says."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mdlm_interp.documents import read_documents
from mdlm_interp.errors import DataError
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer


def plain_text(texts: Sequence[str]) -> bytes:
    return "".join(text + END_OF_TEXT for text in texts).encode()


def json_lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def tar_of(members: Sequence[tuple[str, bytes]]) -> bytes:
    """An uncompressed tar of files, in its directory."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("openwebtext")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members:
            member = tarfile.TarInfo(f"openwebtext/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def subset(texts: Sequence[str]) -> bytes:
    """As one of OpenWebText's urlsf_subset files."""
    members = [(f"{n:07}-abc.txt", text.encode()) for n, text in enumerate(texts)]
    return lzma.compress(tar_of(members), preset=0)


def whole_archive(texts: Sequence[str]) -> bytes:
    """A tar of three subsets, unevenly filled."""
    cuts = [0, len(texts) // 5, len(texts) // 2, len(texts)]
    return tar_of(
        [
            (f"urlsf_subset00-{n}_data.xz", subset(texts[at:end]))
            for n, (at, end) in enumerate(pairwise(cuts), 1)
        ]
    )


def parquet_table(texts: Sequence[str]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table({"text": list(texts)}), stream, row_group_size=100)
    return stream.getvalue()


def arrow_stream(texts: Sequence[str]) -> bytes:
    """As `datasets` saves it."""
    table = pa.table({"text": pa.array(list(texts), pa.string())})
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return stream.getvalue()


def arrow_file(texts: Sequence[str]) -> bytes:
    table = pa.table({"text": pa.array(list(texts), pa.string())})
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return stream.getvalue()


def zstandard(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


FORMATS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "a.txt": plain_text,
    "a.txt.gz": lambda texts: gzip.compress(plain_text(texts)),
    "a.txt.zst": lambda texts: zstandard(plain_text(texts)),
    "a.txt.xz": lambda texts: lzma.compress(plain_text(texts), preset=0),
    "a.jsonl": json_lines,
    "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts)),
    "a.jsonl.zst": lambda texts: zstandard(json_lines(texts)),
    "a.jsonl.xz": lambda texts: lzma.compress(json_lines(texts), preset=0),
    "a.tar": whole_archive,
    "a.tar.gz": lambda texts: gzip.compress(whole_archive(texts)),
    "a.tar.zst": lambda texts: zstandard(whole_archive(texts)),
    "a.tar.xz": lambda texts: lzma.compress(whole_archive(texts), preset=0),
    "urlsf_subset00-1_data.xz": subset,
    "a.parquet": parquet_table,
    "a.arrow": arrow_stream,
    "footer.arrow": arrow_file,
}
"""By file name: what writes texts in that format. Token files need a tokenizer besides."""


@pytest.fixture(params=list(FORMATS))
def text_format(request: pytest.FixtureRequest) -> tuple[str, Callable[[Sequence[str]], bytes]]:
    """A file name and what writes texts into a file of that name, for each format of text."""
    return request.param, FORMATS[request.param]


@pytest.fixture(scope="session")
def formats() -> dict[str, Callable[[Sequence[str]], bytes]]:
    """What writes texts in each format, by file name."""
    return FORMATS


@pytest.fixture(scope="session")
def token_file() -> Callable[[Sequence[str], Tokenizer], bytes]:
    """Writes texts as nanoGPT does."""

    def write(texts: Sequence[str], tokenizer: Tokenizer) -> bytes:
        ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
        return np.array(ids, "<u2").tobytes()

    return write


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file, with its directories, and returns its path."""

    def write(name: str, content: str | bytes = "text") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    """Every text of some files."""
    return lambda *paths: [document.text for document in read_documents(paths)]


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """What reading a file says: one line that starts with its path, which is left out."""

    def refusal(path: Path, tokenizer: Tokenizer | None = None) -> str:
        with pytest.raises(DataError) as caught:
            list(read_documents([path], tokenizer))
        found = str(caught.value)
        assert found.startswith(str(path))
        assert "\n" not in found
        return found.removeprefix(str(path))

    return refusal


@pytest.fixture(scope="session")
def sentences() -> Callable[[int], list[str]]:
    """Texts of a few lines, all different, with characters of one to four bytes; no two blank lines."""

    def sentences(count: int) -> list[str]:
        rng = np.random.default_rng(count)
        words = ["the", "of", "is", "Thé", "naïve", "—", "😀", "other", "\n\n", "it\n", '"quoted"']
        return [f"{n} {' '.join(rng.choice(words, rng.integers(3, 60)))} end" for n in range(count)]

    return sentences


@pytest.fixture
def blocked_reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that may not be opened: root may open all, so permissions cannot show it."""
    names: set[str] = set()
    original: Callable[..., Any] = Path.open

    def guarded(path: Path, *args: object, **keywords: object) -> object:
        if path.name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **keywords)

    monkeypatch.setattr(Path, "open", guarded)
    return names
