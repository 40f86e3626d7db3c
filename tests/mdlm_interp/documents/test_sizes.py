"""How much text files hold: exact where it says so, near the truth elsewhere, and cheap."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pytest
from pyarrow import parquet

from mdlm_interp.documents import TextSize, compression, read_documents, sizes, text_bytes
from mdlm_interp.errors import DataError


def true_bytes(path) -> int:
    return sum(len(document.text.encode()) for document in read_documents([path]))


def test_a_small_file_is_counted_whole(text_format, write, sentences):
    """Exact, but for parquet, whose metadata is all that is read; a plain text's separators count."""
    name, content = text_format
    path = write(name, content(sentences(80)))
    found, true = text_bytes([path]), true_bytes(path)
    separators = 80 * len("<|endoftext|>") if name.startswith("a.txt") else 0
    if name == "a.parquet":
        assert not found.exact
        assert found.bytes == pytest.approx(true, rel=0.1)
    else:
        assert found == TextSize(true + separators, True, 0)


def test_a_large_file_is_estimated_from_its_beginning(text_format, write, sentences, monkeypatch):
    """Bounded: within a fifth, from half of the text, read in pieces that are small beside it."""
    name, content = text_format
    monkeypatch.setattr(compression, "PIECE", 1 << 10)
    monkeypatch.setattr(compression, "BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr(io, "DEFAULT_BUFFER_SIZE", 1 << 10)
    texts = sentences(2000) * (4 if name.endswith("zst") else 1)  # of which pyarrow reads 64 kB at a time
    if name.endswith("zst"):
        texts = [f"{hashlib.sha256(str(n).encode()).hexdigest()} {text}" for n, text in enumerate(texts)]
    path = write(name, content(texts))
    true = true_bytes(path)
    monkeypatch.setattr(sizes, "SAMPLE_BYTES", true // 2)
    found = text_bytes([path])
    if name == "a.txt":
        assert found == TextSize(path.stat().st_size, True, 0)
    else:
        assert not found.exact
        separators = len(texts) * len("<|endoftext|>") if name.startswith("a.txt") else 0
        assert found.bytes == pytest.approx(true + separators, rel=0.2)


def test_of_many_files_of_a_kind_a_few_are_read(write, formats, sentences, monkeypatch):
    """Exact: of thirty files, no more than eight are opened for more than their first bytes."""
    content = formats["a.jsonl.gz"]
    files = [write(f"s{n}.jsonl.gz", content(sentences(40 + n % 3))) for n in range(30)]
    sampled = []
    original = sizes._sample

    def seen(path, kind):
        sampled.append(path)
        return original(path, kind)

    monkeypatch.setattr(sizes, "_sample", seen)
    found = text_bytes(files)
    assert len(sampled) == 8
    assert sampled == files[::4]
    assert not found.exact
    assert found.bytes == pytest.approx(sum(map(true_bytes, files)), rel=0.03)


def test_tokens_are_counted_and_kinds_added_up(write, token_file, sentences, gpt2_tokenizer):
    content = token_file(sentences(9), gpt2_tokenizer)
    tokens = len(content) // 2
    assert text_bytes([write("a.bin", content)]) == TextSize(0, True, tokens)
    files = [
        write("a.bin", content),
        write("b.bin", content),
        write("a.txt", "one"),
        write("b.jsonl", '{"text":"é"}'),
    ]
    assert text_bytes(files) == TextSize(3 + 2, True, 2 * tokens)


def test_other_columns_of_a_parquet_file_do_not_count(tmp_path, sentences):
    texts = sentences(500)
    table = pa.table({"url": ["https://example.org/" * 20] * 500, "text": texts, "id": list(range(500))})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert text_bytes([tmp_path / "a.parquet"]).bytes == pytest.approx(
        sum(len(text.encode()) for text in texts), rel=0.02
    )


def test_places_without_a_document_have_no_bytes(write):
    """Exact: blank lines, and nulls of an Arrow file."""
    assert text_bytes([write("a.jsonl", '\n{"text": "é"}\n\n{"text": ""}\n')]) == TextSize(2, True, 0)
    stream, table = io.BytesIO(), pa.table({"text": pa.array([None, "é", None, ""], pa.string())})
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    assert text_bytes([write("a.arrow", stream.getvalue())]) == TextSize(2, True, 0)


def test_what_cannot_be_read_is_an_error_here_too(write, formats, sentences):
    whole = formats["a.jsonl.gz"](sentences(20))
    cut = write("a.jsonl.gz", whole[:-9])
    with pytest.raises(DataError) as caught:
        text_bytes([cut])
    assert str(caught.value) == f"{cut} is cut off before its end mark; copy or download it again"
