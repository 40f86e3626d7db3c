"""Byte-level BPE: lossless, encoded by replaying merges, and special tokens that stay whole."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mdlm_interp.__main__ import main
from mdlm_interp.errors import CheckpointError, ConfigError
from mdlm_interp.tokenizers import END_OF_TEXT, MASK, load_tokenizer
from mdlm_interp.training.bpe import SpecialTokenizer
from mdlm_interp.training.tokenizer import train_tokenizer

SPECIALS = ("<|user|>", "<|user|>!", "<｜répondre｜>", "a b")
PIECES = (
    "the old fox ",
    "sees the river. ",
    "a red bird sings to the stone, ",
    "my small dog sleeps near our house; ",
    "one quiet child runs over the hill\n",
    "naïve café ",
    "12 345\n\n",
    "  \t",
    "日本語 ",
    "🦊🦊 ",
)
TEXTS = ["".join(PIECES[(n * 3 + k * k) % len(PIECES)] for k in range(6)) for n in range(60)]
CHATS = [f"<|user|>{text}<｜répondre｜>{text}<|user|>!" for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer() -> SpecialTokenizer:
    return train_tokenizer(CHATS, 360, SPECIALS)


@pytest.fixture(scope="module")
def merges(tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer._backend.to_str())["model"]["merges"]]


any_text = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*PIECES, *SPECIALS, MASK, END_OF_TEXT, "<|", "user", "\x00", "e\u0301"])).map(
        "".join
    ),
)


def replayed(tokenizer: SpecialTokenizer, merges: list[tuple[str, str]], text: str) -> list[str]:
    """Tokens by the definition: in each word the earliest merge that applies, leftmost first, again and again."""
    rank = {pair: number for number, pair in enumerate(merges)}
    tokens: list[str] = []
    for word, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text):
        parts = list(word)
        while True:
            ranks = [rank.get(pair, math.inf) for pair in pairwise(parts)]
            if not ranks or min(ranks) == math.inf:
                break
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        tokens += parts
    return tokens


@given(any_text)
@example("")
@example("\ud7ff\ue000\U0010ffff\ufffd\x00\r\n \u00a0")
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    """Exact: taken literally, and with special tokens."""
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if MASK not in text:  # decoded as a word, with a space before it
        assert tokenizer.decode(tokenizer.encode_with_specials(text)) == text


@given(st.binary())
def test_any_bytes_have_tokens(tokenizer, data):
    """Exact: bytes that are no UTF-8 by their own tokens, so nothing is unknown."""
    text = data.decode("utf-8", errors="replace")
    ids = tokenizer.encode(text)
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(any_text)
def test_encoding_replays_the_merges_in_the_order_they_were_learned(tokenizer, merges, text):
    """Exact: against the definition, pair by pair."""
    tokens = [tokenizer._backend.id_to_token(i) for i in tokenizer.encode(text)]
    assert tokens == replayed(tokenizer, merges, text)


def test_merge_replay_is_not_the_longest_match(tokenizer, merges):
    """The check above can fail: a greedy longest match, as the published tokenizer has it, gives other tokens."""
    known = set(tokenizer._backend.get_vocab())

    def longest_match(word: str) -> list[str]:
        found = []
        while word:
            size = next(n for n in range(len(word), 0, -1) if word[:n] in known)
            found.append(word[:size])
            word = word[size:]
        return found

    words = {word[:n] + "xq" for word in TEXTS for n in range(len(word))}
    assert any(
        replayed(tokenizer, merges, word)
        != [
            t
            for part, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(word)
            for t in longest_match(part)
        ]
        for word in words
    )


def test_a_special_token_is_one_id_wherever_it_stands(tokenizer):
    user, longer = tokenizer.special_tokens["<|user|>"], tokenizer.special_tokens["<|user|>!"]
    text = "fox<|user|>the<|user|>! <|user|><|user|>"
    expected = [
        *tokenizer.encode("fox"),
        user,
        *tokenizer.encode("the"),
        longer,
        *tokenizer.encode(" "),
        user,
        user,
    ]
    assert tokenizer.encode_with_specials(text) == expected
    assert tokenizer.special_tokens.keys() == {END_OF_TEXT, *SPECIALS, MASK}


@given(any_text)
def test_special_tokens_are_found_as_the_library_finds_them(tokenizer, text):
    """Exact: its own search, which sets them apart before anything else, is the reference."""
    backend = tokenizer._backend
    backend.encode_special_tokens = False
    try:
        expected = backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True
    assert tokenizer.encode_with_specials(text) == expected


@given(any_text)
def test_text_taken_literally_has_no_special_token(tokenizer, text):
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())


def test_merges_are_learned_from_the_text_between_special_tokens(tokenizer, merges):
    """Exact: the merges of the texts alone; the library by itself spends some on the tokens' spelling."""
    alone = [piece for text in TEXTS for piece in (text, text)]
    other = train_tokenizer(alone, 360 - len(SPECIALS))
    assert merges == [tuple(pair) for pair in json.loads(other._backend.to_str())["model"]["merges"]]
    spelled = {"".join(pair) for pair in merges}
    assert not any("|" in token for token in spelled)
    naive = json.loads(train_tokenizer(CHATS, 360)._backend.to_str())["model"]["merges"]
    assert any("|" in "".join(pair) for pair in naive)


@pytest.mark.parametrize(
    ("specials", "message"),
    [
        (("",), "must have visible characters, got ''"),
        ((" \n",), "must have visible characters"),
        ((MASK,), r"\[MASK\] is a special token already"),
        (
            ("<|répondre|>",),
            "would be decoded as other text, since each .* stands for a byte; spell it in ASCII",
        ),
        (("Ã¯",), "'Ã¯' would be decoded as other text"),
        ((END_OF_TEXT,), "is a special token already"),
        (("a",), r"'a' is how a byte is spelled.*take a longer one, as <\|a\|>"),
        (("Ġ",), "'Ġ' is how a byte is spelled"),
        (("<|x|>", "<|x|>"), r"'<\|x\|>' is given twice"),
    ],
)
def test_a_special_token_that_cannot_be_one_is_refused(specials, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(TEXTS, 360, specials)


def test_the_command_keeps_special_tokens_whole(tmp_path, capsys):
    text, out = tmp_path / "chats.jsonl", tmp_path / "tokenizer"
    text.write_text("\n".join(json.dumps({"text": chat}) for chat in CHATS), "utf-8")
    options = ["--out", str(out), "--vocab-size", "340", "--special-tokens", "<|user|>,<｜répondre｜>"]
    assert main(["train-tokenizer", str(text), *options]) == 0
    assert "340 ids" in capsys.readouterr().out
    loaded = SpecialTokenizer.from_directory(out)
    assert len(loaded.encode_with_specials("<|user|><｜répondre｜>")) == 2
    assert loaded.mask_id == 339
    # As any other tokenizer of a model it takes all text literally.
    assert len(load_tokenizer(out).encode("<|user|>")) > 1


def test_a_directory_without_a_tokenizer_or_with_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; make one with"):
        SpecialTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"is damaged"):
        SpecialTokenizer.from_directory(tmp_path)
