"""Packing documents into blocks, against upstream's rule written out naively."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp.documents import BETWEEN, Document, StreamPosition, document_blocks, token_blocks
from mdlm_interp.documents import blocks as blocks_module
from mdlm_interp.errors import DataError

TEXTS = st.lists(st.text("ab the é", min_size=1, max_size=12), max_size=20)


def upstream_blocks(tokenizer, texts: list[str], length: int, group: int, wrap: bool) -> list[list[int]]:
    """Per group of documents: join ids and an end-of-text each, cut, drop the rest, wrap."""
    inner = length - 2 if wrap else length
    blocks = []
    for start in range(0, len(texts), group):
        joined = list(
            chain(*([*tokenizer.encode(text), tokenizer.eos_id] for text in texts[start : start + group]))
        )
        whole = len(joined) // inner * inner
        for at in range(0, whole, inner):
            piece = joined[at : at + inner]
            blocks.append([tokenizer.eos_id, *piece, tokenizer.eos_id] if wrap else piece)
    return blocks


def numbered(texts: list[str]) -> list[Document]:
    """Documents of two files: the first five in one, the rest in the other."""
    return [
        Document(text, int(n >= 5), n - 5 * int(n >= 5), None, 5 * int(n >= 5))
        for n, text in enumerate(texts)
    ]


@given(TEXTS, st.integers(3, 9), st.integers(1, 6), st.booleans())
def test_blocks_are_upstreams(gpt2_tokenizer, texts, length, group, wrap):
    """Exact."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks_module, "GROUP_DOCUMENTS", group)
        blocks = list(token_blocks(numbered(texts), gpt2_tokenizer, length, wrap=wrap))
    expected = upstream_blocks(gpt2_tokenizer, texts, length, group, wrap)
    assert [block.ids.tolist() for block in blocks] == expected
    assert all(block.ids.dtype == block.documents.dtype == np.int64 for block in blocks)


@given(TEXTS, st.integers(3, 9), st.integers(1, 6), st.booleans())
def test_every_token_says_whose_it_is_and_every_block_where_it_starts(
    gpt2_tokenizer, texts, length, group, wrap
):
    """Exact: the tokens that blocks say are a document's are that document's, in order, as far as they go."""
    given_documents = numbered(texts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks_module, "GROUP_DOCUMENTS", group)
        blocks = list(token_blocks(given_documents, gpt2_tokenizer, length, wrap=wrap))
    found: dict[int, list[int]] = {}
    for block in blocks:
        inner = slice(1, -1) if wrap else slice(None)
        if wrap:
            assert block.documents[0] == block.documents[-1] == BETWEEN
        for token, owner in zip(block.ids[inner].tolist(), block.documents[inner].tolist(), strict=True):
            found.setdefault(owner, []).append(token)
        first = given_documents[int(block.documents[inner][0])]
        assert (block.source, block.offset) == (first.source, first.number)
    for owner, tokens in found.items():
        whole = [*gpt2_tokenizer.encode(texts[owner]), gpt2_tokenizer.eos_id]
        assert tokens == whole[: len(tokens)]


def test_a_group_is_a_thousand_documents(gpt2_tokenizer):
    """Exact: what remains of the first thousand is dropped, not carried into the next."""
    texts = [f"{n}" for n in range(2050)]
    blocks = [block.ids.tolist() for block in token_blocks(numbered(texts), gpt2_tokenizer, 64)]
    assert blocks == upstream_blocks(gpt2_tokenizer, texts, 64, 1000, wrap=True)
    assert blocks != upstream_blocks(gpt2_tokenizer, texts, 64, 10_000, wrap=True)


@pytest.mark.parametrize("cut", [token_blocks, document_blocks])
def test_blocks_come_as_documents_are_read(gpt2_tokenizer, cut):
    """Behavioural: bounded memory, a group ahead of what is asked for and no more."""
    read = 0

    def endless():
        nonlocal read
        while True:
            yield Document("some text", 0, read)
            read += 1

    stream = cut(endless(), gpt2_tokenizer, 16)
    first = next(stream)
    assert read <= 2001
    while next(stream).start == first.start:
        pass
    assert read <= 3001
    stream.close()


@pytest.mark.parametrize(
    ("length", "wrap", "needed"), [(2, True, 3), (0, True, 3), (0, False, 1), (-5, False, 1)]
)
def test_a_length_without_room_for_a_token_is_refused(gpt2_tokenizer, length, wrap, needed):
    for cut in (token_blocks, document_blocks):
        with pytest.raises(DataError) as caught:
            list(cut([], gpt2_tokenizer, length, wrap=wrap))
        assert str(caught.value) == f"a block needs at least {needed} tokens, got length {length}"


# One document a block


@given(TEXTS, st.integers(3, 9), st.booleans())
def test_a_documents_block_is_its_beginning_and_whose_it_is(gpt2_tokenizer, texts, length, wrap):
    """Exact: nothing of another document, no padding, end-of-texts outside when wrapped."""
    found = list(document_blocks(numbered(texts), gpt2_tokenizer, length, wrap=wrap))
    eos = gpt2_tokenizer.eos_id
    for number, (block, document) in enumerate(zip(found, numbered(texts), strict=True)):
        coded = gpt2_tokenizer.encode(document.text)
        if wrap:
            inner = coded[: length - 2]
            assert block.ids.tolist() == [eos, *inner, eos]
            assert block.documents.tolist() == [BETWEEN, *[number] * len(inner), BETWEEN]
        else:
            assert block.ids.tolist() == coded[:length]
            assert block.documents.tolist() == [number] * len(block.ids)
        assert block.ids.dtype == block.documents.dtype == np.int64
        assert (block.source, block.offset) == (document.source, document.number)
        assert block.start == StreamPosition(number, number)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_document_without_a_token_has_no_block_but_keeps_its_number(gpt2_tokenizer, wrap):
    documents = [Document("a", 0, 0), Document("", 0, 1), Document("b", 0, 2)]
    found = list(document_blocks(documents, gpt2_tokenizer, 8, wrap=wrap))
    assert [block.documents.max() for block in found] == [0, 2]
    assert [block.start for block in found] == [StreamPosition(0, 0), StreamPosition(2, 1)]
    assert [len(block.ids) for block in found] == [1 + 2 * wrap] * 2


# Starting again


def assert_same(found, expected) -> None:
    """All that a block is."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.documents, other.documents)
        assert (one.source, one.offset, one.start) == (other.source, other.offset, other.start)


@given(TEXTS, st.integers(3, 9), st.integers(1, 6), st.booleans(), st.booleans(), st.data())
def test_from_the_start_of_any_block_come_the_blocks_that_follow(
    gpt2_tokenizer, texts, length, group, wrap, packed, data
):
    """Exact, and `start.blocks` is the number of the first of them."""
    cut = token_blocks if packed else document_blocks
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks_module, "GROUP_DOCUMENTS", group)
        patched.setattr(blocks_module, "BATCH_DOCUMENTS", 3)
        whole = list(cut(numbered(texts), gpt2_tokenizer, length, wrap=wrap))
        if not whole:
            return
        number = data.draw(st.integers(0, len(whole) - 1))
        start = whole[number].start
        assert start.blocks <= number
        again = cut(numbered(texts), gpt2_tokenizer, length, wrap=wrap, start=start)
        assert_same(list(again), whole[start.blocks :])
        first = next(n for n, block in enumerate(whole) if block.start == start)
        assert first == start.blocks


def test_what_comes_before_the_start_is_not_tokenised(gpt2_tokenizer, monkeypatch):
    """Exact: only the texts of the groups from there on reach the tokenizer."""
    documents = numbered([f"text {n}" for n in range(2500)])
    start = list(token_blocks(documents, gpt2_tokenizer, 16))[-1].start
    assert start.documents == 2000
    coded: list[str] = []
    encode = gpt2_tokenizer.encode_batch

    def seen(texts):
        coded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(gpt2_tokenizer, "encode_batch", seen)
    list(token_blocks(documents, gpt2_tokenizer, 16, start=start))
    assert coded == [document.text for document in documents[2000:]]


def test_a_start_that_is_no_groups_is_refused(gpt2_tokenizer):
    with pytest.raises(DataError) as caught:
        list(token_blocks([], gpt2_tokenizer, 8, start=StreamPosition(1500, 3)))
    assert str(caught.value) == (
        "a group of blocks starts at a multiple of 1000 documents, got 1500; take the start of a block"
    )


@pytest.mark.parametrize("cut", [token_blocks, document_blocks])
def test_a_text_that_became_shorter_than_the_start_is_refused(gpt2_tokenizer, cut):
    documents = numbered([f"text {n}" for n in range(1500)])
    assert list(cut(documents[:1000], gpt2_tokenizer, 8, start=StreamPosition(1000, 7))) == []
    with pytest.raises(DataError) as caught:
        list(cut(documents, gpt2_tokenizer, 8, start=StreamPosition(2000, 7)))
    assert str(caught.value) == (
        "the text has 1500 documents, and the place to continue from is after 2000; "
        "keep the files as they were"
    )


# Tokens


@given(TEXTS, st.integers(1, 5), st.integers(1, 40))
def test_blocks_do_not_depend_on_how_documents_are_given_to_the_tokenizer(
    gpt2_tokenizer, texts, batch, characters
):
    """Exact."""
    expected = list(token_blocks(numbered(texts), gpt2_tokenizer, 4))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks_module, "BATCH_DOCUMENTS", batch)
        patched.setattr(blocks_module, "BATCH_CHARACTERS", characters)
        assert_same(list(token_blocks(numbered(texts), gpt2_tokenizer, 4)), expected)


@given(TEXTS, st.booleans())
def test_ids_and_text_give_the_same_blocks(gpt2_tokenizer, texts, packed):
    """Exact, also where a stream has both."""
    cut = token_blocks if packed else document_blocks
    mixed = [
        replace(document, text="", ids=np.array(gpt2_tokenizer.encode(document.text), "<u2"))
        if number % 3
        else document
        for number, document in enumerate(numbered(texts))
    ]
    expected = list(cut(numbered(texts), gpt2_tokenizer, 4))
    assert_same(list(cut(mixed, gpt2_tokenizer, 4)), expected)


@pytest.mark.parametrize("cut", [token_blocks, document_blocks])
@pytest.mark.parametrize("beyond", [0, 1])
def test_a_text_token_that_is_the_mask_or_beyond_is_refused(gpt2_tokenizer, cut, beyond):
    token = gpt2_tokenizer.mask_id + beyond
    documents = [Document("fine", 0, 0), Document("", 2, 7, np.array([3, token, 4], np.uint16))]
    with pytest.raises(DataError) as caught:
        list(cut(documents, gpt2_tokenizer, 3, wrap=False))
    assert str(caught.value) == (
        f"document 7 of file 2 (from 0) has token id {token}, and text may have 0 to 266, below the mask; "
        f"is it another tokenizer's?"
    )


def test_a_block_keeps_nothing_else_alive(gpt2_tokenizer):
    """Behavioural: no view of its whole group."""
    block = next(token_blocks(numbered(["some text"] * 50), gpt2_tokenizer, 8, wrap=False))
    assert block.ids.base is None
    assert block.documents.base is None
