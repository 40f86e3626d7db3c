"""How fast text is read and cut into token blocks, from every format of the same documents.

For each format: MB of text a second that `read_documents` alone gives, and that a resumed run passes over;
tokens a second that `token_blocks` gives to a consumer who does nothing; and that ÷ what the tokenizer alone
does with the texts in memory, in wall and in CPU time. The turns of all alternate in one process; figures are
medians. All formats must give the same blocks. Files are in the page cache. The text is random words unless
files are named. Nothing timed is asserted.

    python tests/benchmarks/bench_sources.py [--megabytes N] [--text FILE ...] [--tokenizer DIR] [--rounds N]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from pyarrow import parquet

from mdlm_interp.documents import (
    Document,
    StreamPosition,
    TokenBlock,
    document_blocks,
    read_documents,
    read_texts,
    token_blocks,
)
from mdlm_interp.tokenizers import Tokenizer, load_tokenizer

LENGTH = 1024
ENCODED_AT_ONCE = 128
SUBSET_DOCUMENTS = 400
"""About as many as OpenWebText's own subset files have."""


def random_texts(megabytes: float, seed: int = 0) -> list[str]:
    """Documents of some kilobytes, of words that are as frequent as in a language."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    words = ["".join(rng.choice(letters, 1 + rng.poisson(4))) for _ in range(20_000)]
    texts: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        ranks = (rng.zipf(1.3, rng.integers(50, 1500)) - 1) % len(words)
        texts.append(f"{len(texts)} " + " ".join(words[rank] for rank in ranks) + ".")
        size += len(texts[-1])
    return texts


def json_lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def tar_of(members: Iterator[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def subset(texts: Sequence[str]) -> bytes:
    return lzma.compress(tar_of((f"{n:07}.txt", text.encode()) for n, text in enumerate(texts)))


def owt_archive(texts: Sequence[str]) -> bytes:
    """A tar of tar.xz, as the original OpenWebText."""
    starts = range(0, len(texts), SUBSET_DOCUMENTS)
    return tar_of(
        (f"openwebtext/urlsf_subset00-{n}_data.xz", subset(texts[at : at + SUBSET_DOCUMENTS]))
        for n, at in enumerate(starts, 1)
    )


def parquet_shard(texts: Sequence[str]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table({"text": list(texts)}), stream, row_group_size=1000)
    return stream.getvalue()


def arrow_shard(texts: Sequence[str]) -> bytes:
    table = pa.table({"text": list(texts)})
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return stream.getvalue()


def zstandard(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def token_ids(texts: Sequence[str], tokenizer: Tokenizer) -> bytes:
    coded = tokenizer.encode_batch(list(texts))
    return b"".join(np.array([*ids, tokenizer.eos_id], "<u2").tobytes() for ids in coded)


WRITERS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "a.txt": lambda texts: "".join(text + "<|endoftext|>" for text in texts).encode(),
    "a.jsonl": json_lines,
    "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts), 6),
    "a.jsonl.zst": lambda texts: zstandard(json_lines(texts)),
    "a.jsonl.xz": lambda texts: lzma.compress(json_lines(texts), preset=1),
    "a.parquet": parquet_shard,
    "a.arrow": arrow_shard,
    "a.tar": owt_archive,
}


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def exhaust(stream: Callable[[str], Iterator[object]], name: str) -> None:
    deque(stream(name), 0)


def encode_alone(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """Tokens, end-of-texts included, from texts in memory."""
    return len(texts) + sum(
        len(ids)
        for at in range(0, len(texts), ENCODED_AT_ONCE)
        for ids in tokenizer.encode_batch(texts[at : at + ENCODED_AT_ONCE])
    )


def measure(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, directory: Path, rounds: int
) -> dict[str, dict[str, float]]:
    """Figures by format, medians over rounds; raises if two formats give different blocks."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    contents = {name: write(texts) for name, write in WRITERS.items()}
    contents["a.bin"] = token_ids(texts, tokenizer)
    tokens = encode_alone(texts, tokenizer)
    for name, content in contents.items():
        (directory / name).write_bytes(content)

    def documents(name: str) -> Iterator[Document]:
        return read_documents([directory / name], tokenizer)

    def blocks(name: str) -> Iterator[TokenBlock]:
        return token_blocks(documents(name), tokenizer, length)

    expected = [digest(block) for block in blocks("a.bin")]
    for name in contents:  # also warms up
        if [digest(block) for block in blocks(name)] != expected:
            raise AssertionError(f"{name} and a.bin give different blocks")

    def passed_over(name: str) -> Iterator[TokenBlock]:
        everything = StreamPosition(len(texts), len(texts))
        return document_blocks(documents(name), tokenizer, length, start=everything)

    works: dict[tuple[str, str], Callable[[], object]] = {
        ("alone", ""): partial(encode_alone, texts, tokenizer)
    }
    for name in contents:
        for what, stream in (("read", documents), ("blocks", blocks), ("skip", passed_over)):
            works[what, name] = partial(exhaust, stream, name)
    turns = {key: [seconds(work)] for key, work in works.items()}
    for _ in range(rounds - 1):
        for key, work in works.items():
            turns[key].append(seconds(work))
    wall = {key: median(found[0] for found in all_turns) for key, all_turns in turns.items()}
    cpu = {key: median(found[1] for found in all_turns) for key, all_turns in turns.items()}
    alone = wall["alone", ""], cpu["alone", ""]
    results = {
        name: {
            "file_mb": len(content) / 1e6,
            "read_mb_per_s": megabytes / wall["read", name],
            "read_mb_per_cpu_s": megabytes / cpu["read", name],
            "skip_mb_per_s": megabytes / wall["skip", name],
            "tokens_per_s": tokens / wall["blocks", name],
            "ratio_to_tokenizer_alone": alone[0] / wall["blocks", name],
            "cpu_ratio_to_tokenizer_alone": alone[1] / cpu["blocks", name],
        }
        for name, content in contents.items()
    }
    results["tokenizer alone"] = {"tokens_per_s": tokens / alone[0], "tokens_per_cpu_s": tokens / alone[1]}
    results["text"] = {"mb": megabytes, "documents": len(texts), "tokens": tokens, "blocks": len(expected)}
    return results


def digest(block: TokenBlock) -> bytes:
    """Of all that a block is."""
    found = hashlib.sha256(block.ids.tobytes() + block.documents.tobytes())
    found.update(f"{block.source} {block.offset} {block.start}".encode())
    return found.digest()


@pytest.mark.benchmark
def test_the_benchmark_runs_and_every_format_gives_the_same_blocks(tmp_path):
    """Behavioural, at a size that says nothing about speed."""
    found = measure(random_texts(0.05), load_tokenizer("bundled"), 32, tmp_path, rounds=1)
    assert set(found) == {*WRITERS, "a.bin", "tokenizer alone", "text"}
    assert found["text"]["blocks"] > 100
    assert all(found[name]["tokens_per_s"] > 0 for name in [*WRITERS, "a.bin", "tokenizer alone"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=16, help="random text to write (default: 16)")
    parser.add_argument("--text", nargs="+", help="files to take the text from instead")
    parser.add_argument("--tokenizer", default="bundled", help="directory or hub id (default: bundled)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    options = parser.parse_args()
    if options.text:  # without outer white space, which the reader of archives takes away
        texts = [text.strip() for text in read_texts(options.text)]
    else:
        texts = random_texts(options.megabytes)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = load_tokenizer(options.tokenizer)
        results = measure(texts, tokenizer, LENGTH, Path(directory), options.rounds)
    sys.stdout.write(
        f"{'':12} {'file':>7} {'read':>9} {'skip':>9} {'blocks':>11} {'÷ alone':>8} {'CPU':>5}\n"
    )
    for name in [*WRITERS, "a.bin"]:
        found = results[name]
        sys.stdout.write(
            f"{name:12} {found['file_mb']:5.1f}MB {found['read_mb_per_s']:5.0f}MB/s {found['skip_mb_per_s']:5.0f}MB/s "
            f"{found['tokens_per_s']:9,.0f}/s {found['ratio_to_tokenizer_alone']:8.2f} "
            f"{found['cpu_ratio_to_tokenizer_alone']:5.2f}\n"
        )
    machine = {
        "cores": os.cpu_count(),
        "tokenizers": tokenizers.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
    }
    sys.stdout.write(json.dumps({"benchmark": "sources", **machine, "results": results}) + "\n")


if __name__ == "__main__":
    main()
