"""Packing documents into blocks, against upstream's rule written out naively."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp import documents
from mdlm_interp.documents import BETWEEN, Document, token_blocks
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
    return [Document(text, int(n >= 5), n - 5 * int(n >= 5)) for n, text in enumerate(texts)]


@given(TEXTS, st.integers(3, 9), st.integers(1, 6), st.booleans())
def test_blocks_are_upstreams(gpt2_tokenizer, texts, length, group, wrap):
    """Exact."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(documents, "GROUP_DOCUMENTS", group)
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
        patched.setattr(documents, "GROUP_DOCUMENTS", group)
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


def test_blocks_come_as_documents_are_read(gpt2_tokenizer):
    """Behavioural: bounded memory, one group at a time."""
    read = 0

    def endless():
        nonlocal read
        while True:
            yield Document("some text", 0, read)
            read += 1

    next(token_blocks(endless(), gpt2_tokenizer, 16))
    assert read < 1000


@pytest.mark.parametrize(
    ("length", "wrap", "needed"), [(2, True, 3), (0, True, 3), (0, False, 1), (-5, False, 1)]
)
def test_a_length_without_room_for_a_token_is_refused(gpt2_tokenizer, length, wrap, needed):
    with pytest.raises(DataError) as caught:
        list(token_blocks([], gpt2_tokenizer, length, wrap=wrap))
    assert str(caught.value) == f"a block needs at least {needed} tokens, got length {length}"
