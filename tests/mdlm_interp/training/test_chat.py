"""Conversations: what is read, what the template marks, and what is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from mdlm_interp.errors import DataError
from mdlm_interp.training.chat import (
    CHAT_TEMPLATE,
    Chat,
    Message,
    encode_chat,
    encode_prompt,
    read_chats,
    visible,
)
from tests.mdlm_interp.training.dllm_encoders import KINDS, answer, make_tokenizer, question

PUBLISHED_DLLM = (
    "User: {{ messages[0]['content'] }}\n{{ sep_token }}\nAssistant:\n{{ messages[1]['content'] }}"
)
"""The template of train_dllm.py, which marks nothing."""


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple(Message(role, content) for role, content in turns), "here")  # type: ignore[arg-type]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture
def file(tmp_path):
    def write(*lines: object):
        path = tmp_path / "chats.jsonl"
        path.write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8"
        )
        return path

    return write


def test_both_forms_of_a_line_are_the_same_conversation(file):
    turns = [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "Because.\n"}]
    first, second = read_chats([file({"prompt": " Why? ", "answer": "Because.\n"}, "", {"messages": turns})])
    assert first.messages == second.messages == (Message("user", "Why?"), Message("assistant", "Because."))
    assert second.place.endswith("chats.jsonl, line 3")


def test_a_compressed_file_is_read_too(tmp_path):
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "answer": "b"}\n'))
    assert [one.messages[1].content for one in read_chats([path])] == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1 is not JSON .*cut off"),
        ('["a"]', 'line 1 has neither "prompt" and "answer" nor a list "messages"'),
        ('{"prompt": "a"}', 'neither "prompt" and "answer"'),
        ('{"prompt": "a", "answer": 3}', "whose content is int, expected a string"),
        ('{"prompt": "a", "answer": " \\n"}', "an empty message of the assistant; remove the line"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "asistant", "content": "a"}]}', "did you mean 'assistant'"),
        ('{"prompt": "a", "answer": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_line_that_is_no_conversation_is_refused(file, line, message):
    with pytest.raises(DataError, match=message):
        list(read_chats([file(line)]))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("hello", "utf-8")
    with pytest.raises(DataError, match=r"holds no conversations; give .jsonl"):
        list(read_chats([tmp_path / "text.txt"]))


def test_invisible_characters_are_dropped_at_the_ends_only():
    assert visible("\u200b\n a\u200b b\x00 ") == "a\u200b b"
    assert visible(" \u200b") == ""


def test_the_template_marks_the_answer_and_nothing_else(tokenizer):
    coded = encode_chat(
        tokenizer, chat(("user", question("red", "fox")), ("assistant", answer("red", "fox")))
    )
    expected = tokenizer(answer("red", "fox"), add_special_tokens=False)["input_ids"]
    assert [i for i, marked in zip(coded.ids, coded.is_answer, strict=True) if marked] == expected
    assert coded.ids[0] == tokenizer.cls_token_id
    assert coded.ids[-1] == tokenizer.sep_token_id
    assert not coded.is_answer[-1]


def test_every_answer_of_a_longer_conversation_is_marked(tokenizer):
    turns = [
        ("system", "sleep"),
        ("user", "where"),
        ("assistant", "in the barn"),
        ("user", "why"),
        ("assistant", "old"),
    ]
    coded = encode_chat(tokenizer, chat(*turns))
    separate = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("in the barn", "old")]
    assert [i for i, marked in zip(coded.ids, coded.is_answer, strict=True) if marked] == [
        *separate[0],
        *separate[1],
    ]


def test_the_published_template_without_marks_is_refused_with_the_remedy(tokenizer):
    with pytest.raises(DataError, match=r"marks no token as the assistant's; enclose .* \{% generation %\}"):
        encode_chat(tokenizer, chat(("user", "a"), ("assistant", "b")), template=PUBLISHED_DLLM)


def test_a_template_that_marks_two_answers_as_one_is_refused(tokenizer):
    everything = "{% generation %}{% for m in messages %}{{ m['content'] }} {% endfor %}{% endgeneration %}"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(DataError, match=r"marks 1 stretches of text for 2 answers"):
        encode_chat(tokenizer, chat(*turns), template=everything)


def test_a_message_that_spells_a_control_token_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"here: a message contains '\[MASK\]'.*spell it otherwise"):
        encode_chat(tokenizer, chat(("user", "what is [MASK]?"), ("assistant", "b")))


def test_a_prompt_is_the_conversation_with_masks_in_place_of_the_answer(tokenizer):
    asked, said = question("red", "fox"), answer("red", "fox")
    whole = encode_chat(tokenizer, chat(("user", asked), ("assistant", said)))
    length = sum(whole.is_answer)
    prompt = encode_prompt(tokenizer, [Message("user", asked)], length)
    assert prompt.is_answer == whole.is_answer
    assert prompt.ids == tuple(
        tokenizer.mask_token_id if marked else i for i, marked in zip(whole.ids, whole.is_answer, strict=True)
    )


def test_in_a_longer_conversation_only_the_next_answer_is_masked(tokenizer):
    given = [Message("user", "where"), Message("assistant", "in the barn"), Message("user", "why")]
    prompt = encode_prompt(tokenizer, given, 5)
    assert sum(prompt.is_answer) == 5
    assert "barn" in tokenizer.decode(prompt.ids)


def test_a_template_may_begin_with_the_answer(tokenizer):
    bare = "{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}"
    prompt = encode_prompt(tokenizer, [], 3, template=bare)
    assert prompt.ids == (tokenizer.mask_token_id,) * 3


def test_an_answer_of_no_tokens_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"answer_length must be at least 1, got 0"):
        encode_prompt(tokenizer, [], 0)


def test_the_built_in_template_writes_the_published_form_between_an_encoders_own_ends(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False)
    assert text == "[CLS]" + "User: a\n[SEP]\nAssistant:\nb" + "[SEP]"
