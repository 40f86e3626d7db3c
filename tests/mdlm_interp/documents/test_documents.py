"""Plain text, JSON lines and parquet: the rules of each, any read boundary, and each input that is refused."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mdlm_interp.documents import compression, read_documents, text
from mdlm_interp.errors import DataError

MARKER = "<|endoftext|>"
FIRST_KINDS = "'.txt', '.raw', '.jsonl', '.ndjson', '.tar', '.parquet', '.arrow', '.bin'"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one", ["one"]),
        ("one\ntwo\n", ["one\ntwo"]),
        ("one\n\ntwo", ["one", "two"]),
        ("\n\n\none\n\n\n\ntwo\n\n\n", ["one", "two"]),
        ("one\n \t \n  two, indented\n", ["one", "  two, indented"]),
        ("one\n \n \n\t\n two", ["one", " two"]),
        ("one\r\n\r\ntwo\r\nthree\r\n", ["one", "two\nthree"]),
        (" \none\n\x0c\ntwo", ["one", "two"]),
    ],
)
def test_blank_lines_separate_the_documents_of_a_plain_text(write, texts, content, expected):
    assert texts(write("a.txt", content)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"one\n\nstill one{MARKER}two", ["one\n\nstill one", "two"]),
        (f"{MARKER}one{MARKER}{MARKER}\n \n{MARKER}two\n{MARKER}\n", ["one", "", " ", "two"]),
        (f" \n{MARKER}one", ["one"]),
        (f"a <|endoftext> b\n\nc{MARKER}", ["a <|endoftext> b\n\nc"]),
    ],
)
def test_a_file_with_the_marker_is_separated_by_it_alone(write, texts, content, expected):
    assert texts(write("a.txt", content)) == expected


@pytest.mark.parametrize("before", [2**20 - 5, 2**20, 3 * 2**20 + 7])
def test_a_marker_far_into_the_file_decides_for_all_of_it(write, texts, before):
    """Exact: also where it straddles a read boundary; blank lines before it separate nothing."""
    head = ("line\n\n" * (before // 6 + 1))[:before]
    assert texts(write("a.txt", head + MARKER + "tail\n\nend")) == [head.strip("\n"), "tail\n\nend"]


ALPHABET = st.sampled_from(["a", "é", "\n", "\n\n", " ", "\t", "<|endof", "text|>", MARKER])


@given(st.lists(ALPHABET, max_size=30).map("".join), st.integers(1, 20))
def test_documents_do_not_depend_on_where_the_file_is_cut_into_pieces(
    tmp_path_factory, texts, content, piece
):
    """Exact, against the rule applied to the whole text."""
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_text(content, encoding="utf-8")
    if MARKER in content:
        first, *rest, last = content.split(MARKER)
        expected = [*([first] if first.strip() else []), *rest, *([last] if last.strip() else [])]
    else:
        expected = [""]
        for line in content.split("\n"):
            expected[-1:] = [expected[-1] + line + "\n"] if line.strip() else [expected[-1], ""]
        expected = [one for one in expected if one.strip()]
    expected = [one.strip("\n") for one in expected]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text, "PIECE", piece)
        patched.setattr(compression, "PIECE", piece)
        if "".join(expected).strip():
            assert texts(path) == expected
        else:
            with pytest.raises(DataError, match="holds no text"):
                texts(path)


def test_json_lines_are_a_document_a_line(write, texts):
    expected = ["one\n\nstill one", f"two {MARKER}", " \n", "três"]
    content = "\n".join(json.dumps({"id": 3, "text": text}) for text in expected) + "\n\n"
    assert texts(write("a.jsonl", content)) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_file_is_a_document_a_row_of_its_text_column(tmp_path, texts, kind):
    column = pa.array(["one", None, "", "two\n\nstill two"], kind)
    parquet.write_table(pa.table({"id": [1, 2, 3, 4], "text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "", "two\n\nstill two"]


def test_documents_are_numbered_as_paragraphs_lines_and_marks_are(write):
    """Exact: the number leads back to the place in the file."""
    paths = [
        write("a.txt", "\n\none\n\n\n \n\ntwo\n\n\n"),
        write("b.jsonl", '{"text": ""}\n\n{"text": "three"}\n \n{"text": "four"}\n{"text": " "}\n'),
        write("c.txt", f"{MARKER}five{MARKER}{MARKER}\n{MARKER}six{MARKER}\n"),
    ]
    found = list(read_documents(paths))
    assert [(one.text, one.source, one.number, one.before) for one in found] == [
        ("one", 0, 0, 0),
        ("two", 0, 1, 0),
        ("", 1, 0, 2),
        ("three", 1, 2, 2),
        ("four", 1, 4, 2),
        (" ", 1, 5, 2),
        ("five", 2, 1, 8),
        ("", 2, 2, 8),
        ("", 2, 3, 8),
        ("six", 2, 4, 8),
    ]
    assert [one.running for one in found] == [0, 1, 2, 4, 6, 7, 9, 10, 11, 12]
    assert paths[1].read_text().splitlines()[found[3].number] == '{"text": "three"}'
    assert paths[2].read_text().split(MARKER)[found[-1].number] == "six"


def test_documents_are_read_as_they_are_asked_for(write):
    """Behavioural: the first one comes although the file is broken further on."""
    stream = read_documents([write("a.jsonl", '{"text": "one"}\n{')])
    assert next(stream).text == "one"
    with pytest.raises(DataError, match="line 2 is not JSON"):
        next(stream)


def test_a_missing_file_is_named_with_the_nearest(write, refusal):
    path = write("corpus.txt", "text")
    assert refusal(path.with_name("corpsu.txt")) == " does not exist; did you mean 'corpus.txt'?"
    assert refusal(path.parent / "nowhere" / "a.txt") == " does not exist"


@pytest.mark.parametrize(
    ("name", "content"), [("A.TXT", "one"), ("a.Txt", "one"), ("a.JSONL", '{"text": "one"}')]
)
def test_capitals_in_a_suffix_mean_the_same(write, texts, name, content):
    assert texts(write(name, content)) == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_a_link_to_nowhere_is_told_as_such(tmp_path, refusal, name):
    (tmp_path / name).symlink_to("gone.txt")
    assert refusal(tmp_path / name) == " is a link to gone.txt, which does not exist; name the file itself"


@pytest.mark.parametrize(
    ("name", "tool"), [("a.txt.bz2", "bunzip2"), ("a.ZIP", "unzip"), ("a.jsonl.lz4", "unlz4")]
)
def test_a_compressed_file_is_refused_with_what_unpacks_it(write, refusal, name, tool):
    assert refusal(write(name, "text")) == f" is compressed; unpack it first, with {tool} for instance"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.json", ": unknown kind of text file '.json'; did you mean '.jsonl'?"),
        ("a.json.gz", ": unknown kind of text file '.json.gz'; did you mean '.jsonl.gz'?"),
        ("a.parquet.gz", ": unknown kind of text file '.parquet.gz'; did you mean '.parquet'?"),
        ("a.csv", f": unknown kind of text file '.csv'; known: {FIRST_KINDS}, ..."),
        ("a", f": unknown kind of text file ''; known: {FIRST_KINDS}, ..."),
    ],
)
def test_an_unknown_suffix_is_refused(write, refusal, name, expected):
    assert refusal(write(name, "text")) == expected


@pytest.mark.parametrize(("name", "pack"), [("wiki.valid.raw", bytes), ("wiki.valid.RAW.gz", gzip.compress)])
def test_wikitext_is_read_under_its_own_names(write, texts, name, pack):
    """As distributed, the three splits are wiki.train.raw, wiki.valid.raw and wiki.test.raw."""
    path = write(name, pack(b" = One = \n\n Two two . \n"))
    assert texts(path) == texts(write("same.txt", b" = One = \n\n Two two . \n")) != []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.raw"])
@pytest.mark.parametrize("before", [b"", b" " * 10, "é ".encode() * 700_000], ids=["first", "near", "far"])
def test_a_byte_that_is_no_utf8_is_named_by_its_place_in_the_file(write, refusal, name, before):
    assert refusal(write(name, before + b"\xff")) == (
        f" is not UTF-8 (byte {len(before)}: invalid start byte); convert it first"
    )


@pytest.mark.parametrize("before", range(10))
def test_the_place_of_a_byte_does_not_depend_on_where_the_file_is_cut_into_pieces(
    write, refusal, monkeypatch, before
):
    """Exact: also after a piece that ends inside a character."""
    monkeypatch.setattr(compression, "PIECE", 4)
    content = b"a" * before + "é😀é".encode() + b"\xff" + "é".encode()
    assert refusal(write("a.txt", content)) == (
        f" is not UTF-8 (byte {before + 8}: invalid start byte); convert it first"
    )


def test_a_file_cut_off_inside_a_character_is_refused(write, refusal):
    assert refusal(write("a.txt", b"caf" + "é".encode()[:1])) == (
        " is not UTF-8 (byte 3: unexpected end of data); convert it first"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "cut', ", line 3 is not JSON (Invalid control character at); is the file cut off?"),
        ('{"txt": "a"}', ", line 3 has no \"text\" string; did you mean 'txt'?"),
        ('{"text": 3}', ', line 3 has a "text" that is a number, expected a string'),
        ('{"text": null}', ', line 3 has a "text" that is null, expected a string'),
        ('["a"]', ', line 3 is a list, expected an object with a "text" string'),
        (
            "[" * 100_000,
            ", line 3 cannot be read (maximum recursion depth exceeded while decoding a JSON array from a "
            "unicode string); remove the line",
        ),
        (
            f'{{"id": {"9" * 5000}}}',
            ", line 3 cannot be read (Exceeds the limit (4300 digits) for integer string conversion: "
            "value has 5000 digits); remove the line",
        ),
        (r'{"text": "\ud83d"}', ", line 3: the text has half a surrogate pair, which is no character"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(write, refusal, line, expected):
    assert refusal(write("a.jsonl", f'{{"text": "one"}}\n\n{line}\n')) == expected


def test_a_whole_surrogate_pair_is_a_character(write, texts):
    assert texts(write("a.jsonl", r'{"text": "\ud83d\ude00"}')) == ["😀"]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_a_truncated_parquet_file_is_refused(tmp_path, refusal, share):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["some text"] * 100}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert refusal(path).startswith(" is truncated or no parquet file (")


def test_a_parquet_file_without_a_text_column_is_refused(tmp_path, refusal):
    parquet.write_table(pa.table({"texts": ["a"], "id": [1]}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == " has no column \"text\"; did you mean 'texts'?"


def test_a_text_column_of_numbers_is_refused(tmp_path, refusal):
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == (
        ': column "text" holds int64, expected strings; name a file of texts'
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ""),
        ("a.txt", " \n\n\t\n"),
        ("a.txt", MARKER * 3),
        ("a.jsonl", ""),
        ("a.jsonl", '{"text": ""}'),
    ],
)
def test_a_file_without_text_is_refused(write, refusal, name, content):
    assert (
        refusal(write(name, content)) == " holds no text; remove it from the list or check how it was written"
    )
