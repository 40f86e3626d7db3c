"""Reading takes no more memory for a large file than for a small one, whatever the format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

SMALL_MB, LARGE_MB = 4, 48
"""Text in the two files."""

LIMIT_MB = 20
"""How much more the large file may take: what the allocator of parquet keeps, however much more there is to read."""

PROGRAM = """
import json, sys
from pathlib import Path
from mdlm_interp.documents import read_documents
from mdlm_interp.tokenizers import load_tokenizer

def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

tokenizer = load_tokenizer(sys.argv[1])
keep, names = sys.argv[2] == "keep", sys.argv[3:]

def documents(size, name):
    stream = read_documents([f"{size}/{name}"], tokenizer)
    return sum(1 for _ in (list(stream) if keep else stream))

for name in names:
    documents("small", name)
    before = peak_mb()
    count = documents("large", name)
    print(json.dumps([name, count, peak_mb() - before]))
"""


def run(directory: Path, tokenizer: Path, way: str, names: list[str]) -> dict[str, tuple[int, float]]:
    """Documents, and MB by which the peak rose, for the large file of each format."""
    command = [sys.executable, "-c", PROGRAM, str(tokenizer), way, *names]
    path = {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(command, cwd=directory, env=path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {name: (count, grown) for name, count, grown in lines}


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_file(formats, token_file, gpt2_directory, gpt2_tokenizer, tmp_path):
    """Bounded, in a process of its own; the neighbour that keeps all documents goes far beyond the bound."""
    # A thousand documents of 4 kB each, over and over, that are quickly compressed.
    texts = [f"{n} is a number, and {n * n} too; " * 120 for n in range(1000)]
    ids = token_file(texts[:100], gpt2_tokenizer)
    names = [name for name in formats if not name.startswith("a.tar.")] + ["whole.parquet", "a.bin"]
    for size, megabytes in (("small", SMALL_MB), ("large", LARGE_MB)):
        (tmp_path / size).mkdir()
        many = texts * (megabytes // 4)
        for name in names:
            if name == "whole.parquet":  # as one row group, larger than what may be kept
                path, table = tmp_path / size / name, pa.table({"text": many})
                parquet.write_table(table, path, compression="none", use_dictionary=False)
                continue
            content = ids * (megabytes // 2) if name == "a.bin" else formats[name](many)
            (tmp_path / size / name).write_bytes(content)
    found = run(tmp_path, gpt2_directory, "stream", names)
    assert set(found) == set(names)
    assert {name: count for name, (count, _) in found.items() if name != "a.bin"} == dict.fromkeys(
        names[:-1], 12_000
    )
    assert {name: grown for name, (_, grown) in found.items() if grown > LIMIT_MB} == {}
    kept = run(tmp_path, gpt2_directory, "keep", ["a.jsonl.gz"])
    assert kept["a.jsonl.gz"][1] > 2 * LIMIT_MB
