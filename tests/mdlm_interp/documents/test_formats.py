"""All formats: the same documents, the same blocks, and nothing that is cut off passes as a shorter file."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mdlm_interp.documents import blocks as blocks_module
from mdlm_interp.documents import document_blocks, read_documents, read_texts, token_blocks
from mdlm_interp.errors import DataError
from mdlm_interp.tokenizers import END_OF_TEXT


def test_every_format_gives_the_same_documents_in_the_same_order(text_format, write, sentences, texts):
    """Exact."""
    name, content = text_format
    assert texts(write(name, content(sentences(300)))) == sentences(300)


def test_every_format_numbers_documents_by_their_place_empty_ones_counted(
    text_format, write, sentences, token_file, gpt2_tokenizer
):
    """Exact, over two files and beside a file of token ids, which have the empty ones too."""
    name, content = text_format
    places = [0, 3, 4, 7]
    given = ["" for _ in range(9)]
    for place, text in zip(places, sentences(4), strict=True):
        given[place] = text
    files = [
        write(f"1/{name}", content(given)),
        write(f"2/{name}", content(given)),
        write("3/a.bin", token_file(given, gpt2_tokenizer)),
    ]
    found = list(read_documents(files, gpt2_tokenizer))
    assert [one.number for one in found] == list(range(9)) * 3
    assert [one.running for one in found] == list(range(27))
    assert [one.text for one in found[:18]] == given * 2
    assert [0 if one.ids is None else len(one.ids) > 0 for one in found[18:]] == [
        bool(text) for text in given
    ]


def test_places_without_a_document_are_counted_and_no_documents(write, gpt2_tokenizer):
    """Blank lines, nulls of a table, and what is before a first mark or after a last one."""
    lines = write("a.jsonl", '\n{"text": "one"}\n \n{"text": ""}\n')
    table = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": [None, "one", None, ""]}), table)
    rows = write("a.parquet", table.getvalue().to_pybytes())
    marked = write("a.txt", f"\n{END_OF_TEXT}one{END_OF_TEXT}{END_OF_TEXT}two{END_OF_TEXT}\n")
    for file, expected in (
        (lines, [(1, "one"), (3, "")]),
        (rows, [(1, "one"), (3, "")]),
        (marked, [(1, "one"), (2, ""), (3, "two")]),
    ):
        assert [(one.number, one.text) for one in read_documents([file])] == expected


@pytest.mark.parametrize("wrap", [True, False])
def test_an_empty_document_is_packed_as_upstream_does(
    text_format, write, sentences, gpt2_tokenizer, monkeypatch, wrap
):
    """Exact: it counts in its group and gives an end-of-text."""
    monkeypatch.setattr(blocks_module, "GROUP_DOCUMENTS", 10)
    name, content = text_format
    given = [text for n, one in enumerate(sentences(60)) for text in ([one, ""] if n % 7 == 0 else [one])]
    end, inner = gpt2_tokenizer.eos_id, 32 - 2 * wrap
    expected = []
    for start in range(0, len(given), 10):
        flat = [token for text in given[start : start + 10] for token in [*gpt2_tokenizer.encode(text), end]]
        cuts = [flat[at : at + inner] for at in range(0, len(flat) - inner + 1, inner)]
        expected += [[end, *cut, end] if wrap else cut for cut in cuts]
    found = token_blocks(read_documents([write(name, content(given))]), gpt2_tokenizer, 32, wrap=wrap)
    assert [block.ids.tolist() for block in found] == expected


@pytest.mark.parametrize("cut", [token_blocks, document_blocks])
def test_the_documents_of_a_block_are_found_again_in_the_file(write, formats, sentences, gpt2_tokenizer, cut):
    """Exact: with empty documents between, from any start."""
    given = [text for one in sentences(60) for text in (one, "")]
    path = write("a.jsonl", formats["a.jsonl"](given))
    blocks = list(cut(read_documents([path]), gpt2_tokenizer, 16, wrap=False))
    assert len(blocks) > 50
    for block in blocks:
        first = int(block.documents[0])
        assert first == block.offset
        coded = gpt2_tokenizer.encode(given[first])
        own = [token for token, of in zip(block.ids, block.documents, strict=True) if of == first]
        assert "".join(f"{t}," for t in own) in "".join(f"{t}," for t in [*coded, gpt2_tokenizer.eos_id])
    again = list(cut(read_documents([path]), gpt2_tokenizer, 16, wrap=False, start=blocks[30].start))
    assert [(one.offset, one.documents.tolist()) for one in blocks[-len(again) :]] == [
        (one.offset, one.documents.tolist()) for one in again
    ]


def test_capitals_in_a_name_mean_the_same(text_format, write, sentences, texts):
    name, content = text_format
    assert texts(write(name.upper(), content(sentences(20)))) == sentences(20)


@pytest.mark.parametrize("cut", [token_blocks, document_blocks])
def test_every_format_gives_the_same_blocks_as_token_ids_do(
    formats, token_file, write, sentences, gpt2_tokenizer, monkeypatch, cut
):
    """Exact: ids, numbers of documents and offsets, from two files in several groups."""
    monkeypatch.setattr(blocks_module, "GROUP_DOCUMENTS", 30)
    first, second = sentences(70), sentences(40)

    def blocks(name, content):
        files = [write(f"1/{name}", content(first)), write(f"2/{name}", content(second))]
        found = list(cut(read_documents(files, gpt2_tokenizer), gpt2_tokenizer, 64))
        return [(b.ids.tolist(), b.documents.tolist(), b.source, b.offset, b.start) for b in found]

    expected = blocks("a.bin", lambda texts: token_file(texts, gpt2_tokenizer))
    assert len(expected) > 40
    for name, content in formats.items():
        assert blocks(name, content) == expected, name


def test_no_cut_passes_as_a_shorter_file(text_format, write, sentences, refusal):
    """Exact, at a hundred places, the last twenty bytes among them.

    Only what no reader can see is left out: a plain text, a cut between two lines of JSON, zeros after a tar.
    """
    name, content = text_format
    whole = content(sentences(60))
    ends = {"a.txt": range(len(whole)), "a.tar": range(len(whole.rstrip(b"\0")), len(whole))}
    unseen = set(ends.get(name, ()))
    if name == "a.jsonl":
        unseen = {at for at in range(len(whole)) if b"\n" in whole[at - 1 : at + 1]}
    cuts = {*np.linspace(1, len(whole) - 1, 80).astype(int).tolist(), *range(len(whole) - 20, len(whole))}
    for cut in sorted(cuts - unseen):
        found = refusal(write(name, whole[:cut]))
        assert re.search("cut off before its end mark|is truncated or no|is the file cut off", found), cut


def test_a_plain_tar_without_some_of_its_last_zeros_is_whole(write, formats, sentences, texts, refusal):
    whole = formats["a.tar"](sentences(30))
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    assert texts(write("a.tar", whole[: end + 512])) == sentences(30)
    assert refusal(write("a.tar", whole[: end + 511])).endswith("copy or download it again")
    assert (
        refusal(write("a.tar", whole[:end])) == " is cut off before its end mark; copy or download it again"
    )


@pytest.mark.parametrize("mode", ["flip", "zero", "insert"])
def test_damage_is_refused_or_seen_in_the_text_and_nothing_else_happens(
    text_format, write, sentences, texts, refusal, mode
):
    """Behavioural, at thirty places: one line that names the file, and no other exception.

    gzip and xz keep a checksum of their content, so there nothing of it can change.
    """
    name, content = text_format
    whole = content(sentences(60))
    rng = np.random.default_rng(3)
    for at in rng.integers(0, len(whole), 30).tolist():
        broken = bytearray(whole)
        if mode == "flip":
            broken[at] ^= 1 << int(rng.integers(8))
        elif mode == "zero":
            broken[at : at + 16] = bytes(min(16, len(whole) - at))
        else:
            broken[at:at] = rng.bytes(5)
        path = write(name, bytes(broken))
        try:
            found = texts(path)
        except DataError:
            refusal(path)
            continue
        if name.endswith((".gz", ".xz")):
            assert found == sentences(60)


def test_an_empty_file_is_refused_before_any_other_is_read(text_format, write, sentences):
    """Exact: the good file before it gives nothing."""
    name, content = text_format
    good, empty = write(f"1/{name}", content(sentences(3))), write(f"2/{name}", b"")
    stream = read_documents([good, empty])
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value) == f"{empty} holds no text; remove it from the list or check how it was written"


def test_a_file_without_a_document_is_refused(text_format, write, refusal):
    name, content = text_format
    for texts in ([], ["", " \n", ""]):
        assert refusal(write(name, content(texts))) == (
            " holds no text; remove it from the list or check how it was written"
        )


def test_a_file_that_may_not_be_read_is_refused(text_format, write, sentences, refusal, blocked_reads):
    name, content = text_format
    path = write(name, content(sentences(3)))
    blocked_reads.add(path.name)
    assert refusal(path) == " cannot be read: Permission denied; change its permissions"


def test_texts_are_those_of_the_documents_and_token_ids_have_none(
    write, sentences, token_file, gpt2_tokenizer
):
    path = write("a.bin", token_file(sentences(3), gpt2_tokenizer))
    with pytest.raises(DataError) as caught:
        list(read_texts([path]))
    assert str(caught.value) == f"{path} holds token ids, and this needs text; name the text that they are of"
    assert list(read_texts([write("a.txt", "one\n\ntwo")])) == ["one", "two"]
