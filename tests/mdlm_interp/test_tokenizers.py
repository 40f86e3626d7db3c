"""Byte-level BPE: lossless on any text, which is always literal; only masks asked for are masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdlm_interp import checkpoints
from mdlm_interp.errors import CheckpointError, DataError
from mdlm_interp.tokenizers import END_OF_TEXT, GPT2, MASK, load_tokenizer

TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [END_OF_TEXT, MASK, " ", "  ", "\n", "\r\n", "\t", "France", "é", "日本", "😀", "\x00", "\ufeff"]
    )
).map("".join)


@given(TEXTS)
def test_any_text_comes_back_from_its_ids(gpt2_tokenizer, text):
    """Exact, for every string that has a UTF-8 form, special tokens' spelling included."""
    ids = gpt2_tokenizer.encode(text)
    assert gpt2_tokenizer.decode(ids) == text
    assert gpt2_tokenizer.count_bytes(ids) == len(text.encode())
    assert gpt2_tokenizer.encode_batch([text, "x", text]) == [ids, gpt2_tokenizer.encode("x"), ids]


@given(TEXTS)
def test_special_tokens_written_in_a_text_are_text(gpt2_tokenizer, text):
    assert not {gpt2_tokenizer.mask_id, gpt2_tokenizer.eos_id} & set(gpt2_tokenizer.encode(text))


def test_merges_are_used(gpt2_tokenizer):
    vocabulary = [gpt2_tokenizer.token(i) for i in gpt2_tokenizer.encode("The capital of France is")]
    assert vocabulary == [
        "The",
        " ",
        "c",
        "a",
        "p",
        "i",
        "t",
        "a",
        "l",
        " of",
        " ",
        "F",
        "r",
        "a",
        "n",
        "c",
        "e",
        " is",
    ]


def test_ids_end_with_end_of_text_and_mask(gpt2_tokenizer):
    assert gpt2_tokenizer.mask_id == gpt2_tokenizer.vocab_size - 1
    assert gpt2_tokenizer.eos_id == gpt2_tokenizer.vocab_size - 2
    assert gpt2_tokenizer.token(gpt2_tokenizer.eos_id) == END_OF_TEXT
    assert gpt2_tokenizer.token(gpt2_tokenizer.mask_id) == MASK


def test_a_mask_stands_for_a_word_with_its_leading_space(gpt2_tokenizer):
    """Exact: the words around it have the ids that they have without it."""
    encode, mask = gpt2_tokenizer.encode, gpt2_tokenizer.mask_id
    found = gpt2_tokenizer.encode_with_masks("The capital of France is [MASK].")
    assert found == [*encode("The capital of France is"), mask, *encode(".")]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("no mask", ["no mask"]),
        ("[MASK]", [MASK]),
        (" [MASK]", [MASK]),
        ("[MASK][MASK] [MASK]", [MASK, MASK, MASK]),
        ("a [MASK] [MASK] b", ["a", MASK, MASK, " b"]),
        ("a  [MASK]", ["a ", MASK]),
        ("a\n[MASK]", ["a\n", MASK]),
        ("pre[MASK]fix", ["pre", MASK, "fix"]),
        ("[mask] [ MASK]", ["[mask] [ MASK]"]),
        (f"{END_OF_TEXT}[MASK]", [END_OF_TEXT, MASK]),
    ],
)
def test_encode_with_masks(gpt2_tokenizer, text, pieces):
    expected: list[int] = []
    for piece in pieces:
        expected += [gpt2_tokenizer.mask_id] if piece == MASK else gpt2_tokenizer.encode(piece)
    assert gpt2_tokenizer.encode_with_masks(text) == expected


@given(st.lists(st.just(MASK) | st.sampled_from(["a", "é", " the", ".", "\n"]), max_size=10))
def test_text_with_masks_comes_back_when_masks_are_written_with_their_space(gpt2_tokenizer, pieces):
    text = "".join(" " + MASK if piece == MASK else piece for piece in pieces)
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode_with_masks(text)) == text


def test_decoding_shows_end_of_text_and_replaces_broken_characters(gpt2_tokenizer):
    first, second, third = gpt2_tokenizer.encode("日")
    assert gpt2_tokenizer.decode([first, gpt2_tokenizer.eos_id]) == "\ufffd" + END_OF_TEXT
    # A mask between the bytes of a character keeps them apart.
    assert gpt2_tokenizer.decode([first, second, gpt2_tokenizer.mask_id]) == "\ufffd [MASK]"
    assert gpt2_tokenizer.decode([first, second, third]) == "日"


@pytest.mark.parametrize("kind", [torch.tensor, np.array, iter])
def test_ids_may_come_as_a_tensor_an_array_or_an_iterator(gpt2_tokenizer, kind):
    ids = gpt2_tokenizer.encode_with_masks("of [MASK] is")
    assert gpt2_tokenizer.decode(kind(ids)) == "of [MASK] is"
    assert gpt2_tokenizer.count_bytes(kind(ids)) == 5


def test_end_of_text_and_masks_count_no_bytes(gpt2_tokenizer):
    assert gpt2_tokenizer.count_bytes([gpt2_tokenizer.eos_id, gpt2_tokenizer.mask_id]) == 0


@pytest.mark.parametrize("outside", [-1, -100, "size", 10**9])
@pytest.mark.parametrize("method", ["decode", "count_bytes"])
def test_ids_outside_the_vocabulary_are_refused(gpt2_tokenizer, outside, method):
    size = gpt2_tokenizer.vocab_size
    outside = size if outside == "size" else outside
    with pytest.raises(DataError) as caught:
        getattr(gpt2_tokenizer, method)([0, outside])
    assert str(caught.value) == f"token ids must be in [0, {size}), got {outside}; another model's ids?"


def test_a_saved_tokenizer_is_the_same(gpt2_tokenizer, tmp_path):
    """Exact: ids and hash, from tokenizer.json."""
    gpt2_tokenizer.save(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    text = f"The capital of é {END_OF_TEXT}\n\n[MASK] 日本"
    assert loaded.encode(text) == gpt2_tokenizer.encode(text)
    assert loaded.sha256 == gpt2_tokenizer.sha256
    assert (loaded.vocab_size, loaded.mask_id, loaded.eos_id) == (
        gpt2_tokenizer.vocab_size, gpt2_tokenizer.mask_id, gpt2_tokenizer.eos_id
    )  # fmt: skip


def test_the_hash_changes_with_the_merges(gpt2_tokenizer, gpt2_directory, tmp_path):
    merges = (gpt2_directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:-1]) + "\n", encoding="utf-8")
    (tmp_path / "vocab.json").write_bytes((gpt2_directory / "vocab.json").read_bytes())
    assert load_tokenizer(tmp_path).sha256 != gpt2_tokenizer.sha256


def test_a_directory_without_a_tokenizer_says_what_to_name(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no tokenizer.json (nor vocab.json with merges.txt); "
        "name the tokenizer's directory as well, GPT-2's for the published checkpoint"
    )


@pytest.mark.parametrize("files", [{"tokenizer.json": "{"}, {"vocab.json": "{}", "merges.txt": "a b c d"}])
def test_a_damaged_tokenizer_is_one_line_that_names_its_directory(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"the tokenizer in {tmp_path} is damaged: ")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"the tokenizer has no {END_OF_TEXT} token; is it GPT-2's or one made by this package?"
    )


def test_a_mask_that_is_not_the_last_id_is_refused(tmp_path):
    vocabulary = {END_OF_TEXT: 0, MASK: 1, "a": 2}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"\[MASK\] must be the tokenizer's last id, got 1"):
        load_tokenizer(tmp_path)


def test_a_hub_model_without_a_tokenizer_has_gpt2s(gpt2_directory, gpt2_tokenizer, tmp_path, monkeypatch):
    directories = {"kuleshov-group/mdlm-owt": tmp_path, GPT2: gpt2_directory}
    monkeypatch.setattr(checkpoints, "resolve_source", lambda source, revision: directories[source])
    assert load_tokenizer("kuleshov-group/mdlm-owt").sha256 == gpt2_tokenizer.sha256
    directories[GPT2] = tmp_path
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer("kuleshov-group/mdlm-owt")


def test_the_vocabulary_is_the_files_and_a_mask(gpt2_directory, gpt2_tokenizer):
    vocabulary = json.loads((gpt2_directory / "vocab.json").read_text(encoding="utf-8"))
    assert gpt2_tokenizer.vocab_size == len(vocabulary) + 1
