"""The text that a perplexity is of: corpora put back together, end-of-texts or none."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from mdlm_interp.errors import DataError
from mdlm_interp.evaluation import detokenise, detokenised
from mdlm_interp.evaluation.packing import text_sequences


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [
        ("raw", ' a , " b " ', ' a , " b " '),
        ("wikitext", " = = Early life = = ", "== Early life =="),
        ("wikitext", " = = = Work = = = ", "=== Work ==="),
        ("wikitext", " = Title = ", "= Title ="),
        ("wikitext", " 0 @.@ 7 – 2 @.@ 2 kg ( 1 @.@ 5 lb ) ", "0.7 – 2.2 kg (1.5 lb)"),
        (
            "wikitext",
            ' only becoming " lobster red " on cooking . ',
            'only becoming "lobster red" on cooking.',
        ),
        ("wikitext", ' " One " , he said ; " two " ! ', '"One", he said; "two"!'),
        ("wikitext", " Dylan 's album wasn 't 5 % of it ", "Dylan's album wasn't 5% of it"),
        ("wikitext", ' an inch ( 5 " ) \n and a line ', 'an inch (5 ")\nand a line'),
        (
            "ptb",
            " mr. <unk> said they 've N shares and do n't sell ",
            "mr. <unk> said they've N shares and don't sell",
        ),
        ("ptb", " `` the players ' union '' has $ N million ", '"the players\' union" has $N million'),
        ("lm1b", "That 's $ 5 , he said ; -LRB- AP -RRB- ...", "That's $5, he said; (AP)..."),
        ("lambada", "``Well,'' she\u2019d said", '"Well," she\'d said'),
    ],
)
def test_a_corpus_reads_as_people_write(form, before, after):
    assert detokenised(before, form) == after
    if form != "raw":
        assert detokenised(after, form) == after, "text that is written so already must stay"


def test_the_examples_in_the_module_hold():
    found = doctest.testmod(detokenise)
    assert (found.failed, found.attempted > 3) == (0, True)


@pytest.fixture
def two_documents(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "the house is of , the"}\n{"text": "The other , is"}\n', "utf-8")
    return file


def test_without_end_of_texts_documents_follow_each_other(two_documents, gpt2_tokenizer):
    """Exact: the ids of both, cut; with them, one after each."""
    texts = ["the house is of , the", "The other , is"]
    plain = [token for text in texts for token in gpt2_tokenizer.encode(text)]
    ended = [token for text in texts for token in [*gpt2_tokenizer.encode(text), gpt2_tokenizer.eos_id]]
    for insert_eos, flat in ((True, ended), (False, plain)):
        for wrap, inner in ((False, 7), (True, 5)):
            found = text_sequences(two_documents, gpt2_tokenizer, 7, wrap=wrap, insert_eos=insert_eos)
            count = len(flat) // inner
            expected = np.array(flat[: count * inner]).reshape(count, inner)
            assert (
                found[:, 1:-1].tolist() == expected.tolist() if wrap else found.tolist() == expected.tolist()
            )
            if wrap:
                assert set(found[:, [0, -1]].flatten().tolist()) == {gpt2_tokenizer.eos_id}
    assert gpt2_tokenizer.eos_id in text_sequences(two_documents, gpt2_tokenizer, 7, wrap=False)
    assert gpt2_tokenizer.eos_id not in text_sequences(
        two_documents, gpt2_tokenizer, 7, wrap=False, insert_eos=False
    )


def test_the_form_is_undone_before_tokens_are_made(two_documents, gpt2_tokenizer):
    flat = [t for text in ("the house is of, the", "The other, is") for t in gpt2_tokenizer.encode(text)]
    found = text_sequences(two_documents, gpt2_tokenizer, 5, wrap=False, insert_eos=False, form="wikitext")
    assert found.flatten().tolist() == flat[: found.numel()]
    assert torch.equal(
        text_sequences(
            two_documents, gpt2_tokenizer, 5, wrap=False, insert_eos=False, form="wikitext", max_sequences=1
        ),
        found[:1],
    )


def test_token_files_have_no_form_and_short_texts_no_sequence(tmp_path, two_documents, gpt2_tokenizer):
    ids = tmp_path / "ids.bin"
    np.arange(50, dtype=np.uint16).tofile(ids)
    with pytest.raises(
        DataError, match="a file of token ids has no text to bring into another form than raw, got 'ptb'"
    ):
        text_sequences(ids, gpt2_tokenizer, 7, form="ptb")
    assert text_sequences(ids, gpt2_tokenizer, 50, wrap=False, insert_eos=False).tolist() == [list(range(50))]
    with pytest.raises(
        DataError, match="is shorter than one sequence of 500 tokens; lower length or leave it out"
    ):
        text_sequences(two_documents, gpt2_tokenizer, 500, insert_eos=False)
