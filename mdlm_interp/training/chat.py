"""Conversations for fine-tuning an encoder: files of JSON lines to token ids with the answers marked.

1. `read_chats` reads {"prompt": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}, ...]} a line.
2. A Jinja template writes a conversation out; what it encloses in {% generation %} is the assistant's.
3. `encode_chat` gives the ids and which of them are the answers; `encode_prompt` masks in place of an answer.

The published template of the dLLM recipe has no {% generation %}, so that transformers marks nothing and the
published decoder has no place to write at; here a template that marks nothing is an error.

Source:
    github.com/tom-pollak/dllm at 43ea9ff, train_dllm.py and train_flowlm.py (the template).
"""

# Axes: pos

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mdlm_interp.documents import expand_files
from mdlm_interp.documents.compression import PackedFile
from mdlm_interp.documents.failures import explained
from mdlm_interp.documents.kinds import check_file
from mdlm_interp.errors import DataError, nearest

Role = Literal["system", "user", "assistant"]

CHAT_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant:\n{% generation %}{{ message['content'] }}{% endgeneration %}{{ sep_token }}"
    "{% else %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n{{ sep_token }}\n"
    "{% endif %}{% endfor %}"
)
"""The published form, with the answer marked, any number of turns, and what an encoder's texts begin with."""

GENERATION_REMEDY = "enclose the assistant's text in {% generation %} and {% endgeneration %}"


@dataclass(frozen=True)
class Message:
    """One turn; its content has nothing invisible at either end."""

    role: Role
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one answer."""

    messages: tuple[Message, ...]
    place: str
    """File and line, for errors."""


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a conversation, of equal length with the marks."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]
    """Whether the template marked the token as the assistant's."""


def read_chats(files: Sequence[Path]) -> Iterator[Chat]:
    """Every conversation of the .jsonl files (also .gz, .zst, .xz), in their order; blank lines hold none.

    Raises:
        DataError: If a file is of another kind or cannot be read, or a line is no conversation with an answer.
    """
    for path in expand_files(files):
        kind = check_file(path)
        if kind.format != "jsonl":
            raise DataError(f"{path} holds no conversations; give .jsonl, one conversation a line")
        with explained(path), PackedFile(path, kind.compression).open_text() as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield _chat(line, f"{path}, line {number}")


def _chat(line: str, place: str) -> Chat:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON ({str(error).partition(';')[0]}); is the file cut off?"
        ) from None
    if isinstance(record, dict) and record.keys() >= {"prompt", "answer"}:
        turns: Any = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["answer"]},
        ]
    else:
        turns = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise DataError(
            f'{place} has neither "prompt" and "answer" nor a list "messages"; give one of the two'
        )
    messages = tuple(_message(turn, place) for turn in turns)
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{place} has no message of the assistant, so there is nothing to learn; remove it")
    return Chat(messages, place)


def _message(turn: Any, place: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if role not in get_args(Role):
        raise DataError(f"{place} has a message of role {role!r}{nearest(str(role), get_args(Role))}")
    if not isinstance(content, str):
        raise DataError(f"{place} has a message whose content is {type(content).__name__}, expected a string")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: a message has half a surrogate pair, which is no character; remove it"
        ) from None
    stripped = visible(content)
    if role == "assistant" and not stripped:
        raise DataError(f"{place} has an empty message of the assistant; remove the line")
    return Message(cast(Role, role), stripped)


def visible(text: str) -> str:
    """The text without white space and control characters at its ends.

    A tokenizer may drop or merge those, and then no token begins where the template says that the answer does.
    """
    shown = [n for n, c in enumerate(text) if not (c.isspace() or unicodedata.category(c).startswith("C"))]
    return text[shown[0] : shown[-1] + 1] if shown else ""


def encode_chat(tokenizer: Any, chat: Chat, *, template: str = CHAT_TEMPLATE) -> EncodedChat:
    """Ids of a conversation and which of them are answers.

    Args:
        tokenizer: A fast tokenizer of transformers.
    Raises:
        DataError: If a message spells one of the tokenizer's special tokens, or the template does not mark as
            many stretches of text as there are answers.
    """
    for message in chat.messages:
        for token in tokenizer.all_special_tokens:
            if token in message.content:
                raise DataError(
                    f"{chat.place}: a message contains {token!r}, which the tokenizer takes for a control token; "
                    f"remove it or spell it otherwise"
                )
    turns = [{"role": message.role, "content": message.content} for message in chat.messages]
    coded = tokenizer.apply_chat_template(
        turns,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},  # of conversations that are longer than the model takes
    )
    found = EncodedChat(tuple(coded["input_ids"]), tuple(mark == 1 for mark in coded["assistant_masks"]))
    _check_marks(found, chat)
    return found


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], answer_length: int, *, template: str = CHAT_TEMPLATE
) -> EncodedChat:
    """Ids of a conversation whose next answer is `answer_length` masks, the marked ones: what a decoder fills.

    The masks take the place of a short answer's ids. Written as text they would not all be found: the mask of
    ModernBERT swallows the newline before it.

    Args:
        messages: Up to and with the question.
    Raises:
        DataError: As `encode_chat`; also if the tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise DataError("the tokenizer has no mask token, so no answer can be filled in; take a masked LM's")
    if answer_length < 1:
        raise DataError(f"answer_length must be at least 1, got {answer_length}")
    chat = Chat((*messages, Message("assistant", "answer")), "the prompt")
    found = encode_chat(tokenizer, chat, template=template)
    end = len(found.ids) - found.is_answer[::-1].index(True)
    start = next((n + 1 for n in reversed(range(end)) if not found.is_answer[n]), 0)
    masks = (tokenizer.mask_token_id,) * answer_length
    return EncodedChat(
        found.ids[:start] + masks + found.ids[end:],
        (False,) * start + (True,) * answer_length + (False,) * (len(found.ids) - end),
    )


def _check_marks(found: EncodedChat, chat: Chat) -> None:
    n_answers = sum(message.role == "assistant" for message in chat.messages)
    if not any(found.is_answer):
        raise DataError(
            f"{chat.place}: the chat template marks no token as the assistant's; {GENERATION_REMEDY}"
        )
    stretches = sum(marked for marked, _ in groupby(found.is_answer))
    if stretches != n_answers:
        raise DataError(
            f"{chat.place}: the chat template marks {stretches} stretches of text for {n_answers} answers; "
            f"{GENERATION_REMEDY}, each one, with other text between them"
        )
