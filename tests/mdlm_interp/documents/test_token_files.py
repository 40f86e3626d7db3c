"""Files of token ids: where documents end, on any boundary of a read, and ids of another vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp.documents import read_documents, token_files

EOS = 266


def numbered_ids_of(path, tokenizer) -> list[tuple[int, list[int]]]:
    found = list(read_documents([path], tokenizer))
    assert all(document.text == "" for document in found)
    return [(document.number, document.ids.tolist()) for document in found if document.ids is not None]


def ids_of(path, tokenizer) -> list[list[int]]:
    return [ids for _, ids in numbered_ids_of(path, tokenizer)]


def as_bytes(*ids: int) -> bytes:
    return np.array(ids, "<u2").tobytes()


@given(st.lists(st.lists(st.integers(0, 20), max_size=6), max_size=8), st.booleans(), st.integers(1, 9))
def test_documents_do_not_depend_on_where_the_file_is_cut_into_pieces(
    gpt2_tokenizer, tmp_path_factory, documents, leading, piece
):
    """Exact, with the mark after each document or before each; a document's number is the marks before it."""
    assert gpt2_tokenizer.eos_id == EOS
    ids = [token for one in documents for token in ([EOS, *one] if leading else [*one, EOS])]
    expected = list(enumerate(documents, start=leading))
    if not any(documents):
        return
    if leading and not documents[-1]:
        expected.pop()  # nothing follows the last mark
    if not leading and not documents[0]:
        expected.pop(0)  # the file might as well have the mark before each
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    path.write_bytes(as_bytes(*ids))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(token_files, "PIECE_TOKENS", piece)
        assert numbered_ids_of(path, gpt2_tokenizer) == expected


def test_a_file_without_an_end_of_text_is_one_document(write, gpt2_tokenizer):
    assert ids_of(write("a.bin", as_bytes(1, 2, 3)), gpt2_tokenizer) == [[1, 2, 3]]


@pytest.mark.parametrize("piece", [2, 1 << 19])
def test_a_last_document_without_an_end_is_refused(write, refusal, gpt2_tokenizer, monkeypatch, piece):
    monkeypatch.setattr(token_files, "PIECE_TOKENS", piece)
    assert refusal(write("a.bin", as_bytes(1, 2, EOS, 3, 4, 5)), gpt2_tokenizer) == (
        " ends inside a document: its last 3 ids have no <|endoftext|> (266) after them; is the file cut off?"
    )


def test_half_an_id_is_refused(write, refusal, gpt2_tokenizer):
    assert refusal(write("a.bin", as_bytes(1, EOS) + b"\0"), gpt2_tokenizer) == (
        " has 5 bytes, and token ids take two bytes each; is the file cut off?"
    )


@pytest.mark.parametrize("piece", [2, 1 << 19])
@pytest.mark.parametrize(("at", "token"), [(0, 267), (3, 268), (4, 65535)])
def test_an_id_of_another_vocabulary_is_named_with_its_place(
    write, refusal, gpt2_tokenizer, monkeypatch, piece, at, token
):
    """Exact: the mask id, 267 here, is no text either."""
    monkeypatch.setattr(token_files, "PIECE_TOKENS", piece)
    ids = [1, 2, EOS, 4, 5, 500, EOS]
    ids[at] = token
    assert refusal(write("a.bin", as_bytes(*ids)), gpt2_tokenizer) == (
        f", token {at} (from 0) is {token}, and the tokenizer's text tokens are 0 to 266; "
        f"wrong vocabulary? Name the tokenizer that it was written with"
    )


def test_no_document_with_a_wrong_id_comes_out(write, gpt2_tokenizer):
    path = write("a.bin", as_bytes(1, EOS, 2, 300, EOS))
    stream = read_documents([path], gpt2_tokenizer)
    with pytest.raises(ValueError, match="wrong vocabulary"):
        next(stream)


@pytest.mark.parametrize("before", [[], [EOS, 1, EOS]])
def test_a_document_without_an_end_in_sight_is_refused(write, refusal, gpt2_tokenizer, monkeypatch, before):
    """Exact: as a file is whose ends of documents are another id; memory stays bounded."""
    monkeypatch.setattr(token_files, "PIECE_TOKENS", 7)
    monkeypatch.setattr(token_files, "LONGEST", 20)
    documents = [1] * 20 + [EOS]
    assert ids_of(write("a.bin", as_bytes(*documents)), gpt2_tokenizer) == [[1] * 20]
    assert refusal(write("a.bin", as_bytes(*before, *[1] * 30, EOS)), gpt2_tokenizer) == (
        " has more than 20 ids without <|endoftext|> (266) among them; wrong vocabulary? "
        "Name the tokenizer that it was written with"
    )


def test_files_with_a_header_of_llm_c_are_refused(write, refusal, gpt2_tokenizer):
    header = np.array([20240520, 1, 3, *[0] * 253], "<i4").tobytes()
    assert refusal(write("a.bin", header + as_bytes(1, 2, 3)), gpt2_tokenizer) == (
        " has the header of llm.c's files; remove its first 1,024 bytes"
    )


def test_a_file_of_nothing_but_ends_is_refused(write, refusal, gpt2_tokenizer):
    assert refusal(write("a.bin", as_bytes(EOS, EOS)), gpt2_tokenizer) == (
        " holds no text; remove it from the list or check how it was written"
    )


@pytest.mark.parametrize("width", ["<i4", "<u4", "<i8"])
@pytest.mark.parametrize("count", [16, 100_000])
def test_ids_of_four_or_eight_bytes_are_refused(write, refusal, gpt2_tokenizer, width, count):
    """Exact: also where the other words are ids of the vocabulary, as here."""
    ids = np.arange(count) % 200 + 1
    ids[-1] = EOS
    looked_at = min(count * np.dtype(width).itemsize // 2, 2**15)
    assert refusal(write("a.bin", ids.astype(width).tobytes()), gpt2_tokenizer) == (
        f": every second of its first {looked_at:,} ids is 0, as where ids take four or eight bytes (uint32, int64), "
        f"and they must take two; write them as uint16: ids.astype('<u2').tofile(...)"
    )


def test_wide_ids_are_found_in_the_last_file_before_the_first_is_read(write, gpt2_tokenizer):
    paths = [write("1/a.bin", as_bytes(1, EOS)), write("2/a.bin", np.arange(99, dtype="<u4").tobytes())]
    with pytest.raises(ValueError, match="every second of its first 198 ids is 0"):
        next(read_documents(paths, gpt2_tokenizer))


@pytest.mark.parametrize(
    "ids",
    [
        [1, 0, 2, 0, 3, EOS],
        [*[5, 0] * 20, 5, 1, EOS],
        [*[0, 5] * 40, EOS],
        [*[5, 256] * 40, EOS],
    ],
    ids=["few", "one other", "the others", "low byte zero"],
)
def test_ids_that_are_often_zero_are_read(write, gpt2_tokenizer, ids):
    assert ids_of(write("a.bin", as_bytes(*ids)), gpt2_tokenizer) == [ids[:-1]]
