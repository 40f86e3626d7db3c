"""What the two recipes for encoders share: conversations as examples, their order, and the encoder's way in and out.

Row g of a run, counted over all steps, is example `permutation(seed, epoch)[g mod n]` of epoch g div n: each epoch
shows every conversation once, in an order of its own.
"""

# Axes: row, pos

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mdlm_interp.documents import expand_files
from mdlm_interp.errors import ConfigError, DataError
from mdlm_interp.randomness import permutation
from mdlm_interp.training.chat import CHAT_TEMPLATE, Chat, encode_chat, read_chats
from mdlm_interp.training.config import RunConfig
from mdlm_interp.training.data import TextSource, is_held_out, text_sources
from mdlm_interp.training.dllm_encoder import SAVED, Encoder, load_encoder, save_encoder
from mdlm_interp.training.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class ChatRunConfig(RunConfig):
    """Fine-tune a masked encoder of transformers on conversations."""

    RESUMABLE: ClassVar[tuple[str, ...]] = (
        *RunConfig.RESUMABLE,
        "files",  # these three may have moved: their content is compared by hash
        "encoder",
        "template",
        "validation_chats",
    )

    files: tuple[Path, ...]
    """Conversations (.jsonl), one a line: "prompt" and "answer", or "messages" of "role" and "content"."""
    encoder: Path
    """Directory of a masked LM of transformers with its tokenizer."""
    template: Path | None = None
    """Jinja file that writes a conversation, answers within {% generation %}; the published form if none."""
    max_length: int = 512
    """Tokens of a conversation at most; what is beyond is cut off."""
    batch_size: int = 32
    """Conversations in a step."""
    lr: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are evaluated and saved; 0 has the last weights, as published."""
    held_out_share: float = 0.05
    """Share of conversations kept for validation, chosen by the hash of their text."""
    validation_chats: int = 256
    """Held-out conversations in a validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ConfigError("files must name at least one file of conversations")
        for name in ("max_length", "validation_chats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (isfinite(self.held_out_share) and 0.0 < self.held_out_share < 1.0):
            raise ConfigError(f"held_out_share must be between 0 and 1, got {self.held_out_share}")


class Example(NamedTuple):
    """An encoded conversation."""

    ids: NDArray[np.int64]
    is_answer: NDArray[np.bool_]


@dataclass(frozen=True)
class ChatExamples:
    """Conversations as the encoder's tokens."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    n_dropped: int
    """Conversations whose first answer begins after max_length."""
    sources: tuple[TextSource, ...]


def read_examples(
    files: Sequence[Path], encoder: Encoder, template: str, max_length: int, held_out_share: float
) -> ChatExamples:
    """Encode the conversations and split them by the hash of what is said.

    Raises:
        DataError: If max_length is more than the encoder takes, a conversation cannot be used, or a side is empty.
    """
    if max_length > encoder.longest:
        raise DataError(f"max_length is {max_length}, the encoder takes {encoder.longest} tokens; lower it")
    files = expand_files(files)
    sides: dict[bool, list[Example]] = {True: [], False: []}
    n_dropped = 0
    for chat in read_chats(files):
        coded = encode_chat(encoder.tokenizer, chat, template=template)
        example = Example(
            np.array(coded.ids[:max_length], np.int64), np.array(coded.is_answer[:max_length], np.bool_)
        )
        if example.is_answer.any():
            sides[is_held_out(_said(chat), held_out_share)].append(example)
        else:
            n_dropped += 1
    for held_out, name in ((False, "training"), (True, "held-out")):
        if not sides[held_out]:
            raise DataError(
                f"no conversation fell on the {name} side ({n_dropped} have no answer within {max_length} tokens); "
                f"give more, raise max_length or change held_out_share"
            )
    return ChatExamples(tuple(sides[False]), tuple(sides[True]), n_dropped, text_sources(files))


def _said(chat: Chat) -> str:
    return json.dumps([[message.role, message.content] for message in chat.messages])


def read_template(path: Path | None) -> str:
    """The template of a file, or the published one.

    Raises:
        DataError: If the file cannot be read.
    """
    if path is None:
        return CHAT_TEMPLATE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template {path} cannot be read: {error}") from None


class ChatRecipe(Recipe):
    """A recipe for encoders: everything but what becomes of an example and the loss."""

    FINISHED: ClassVar[tuple[str, ...]] = SAVED

    def __init__(
        self, config: ChatRunConfig, encoder: Encoder, examples: ChatExamples, template: str
    ) -> None:
        self.config: ChatRunConfig = config
        self.encoder, self.examples, self.template = encoder, examples, template

    @classmethod
    def read(cls, config: ChatRunConfig) -> tuple[Encoder, ChatExamples, str]:
        """See `Recipe.read`."""
        template = read_template(config.template)
        encoder = load_encoder(config.encoder)
        examples = read_examples(config.files, encoder, template, config.max_length, config.held_out_share)
        return encoder, examples, template

    def summary(self) -> str:
        """See `Recipe.summary`."""
        answers = sum(int(example.is_answer.sum()) for example in self.examples.train)
        dropped = self.examples.n_dropped
        return (
            f"{len(self.examples.train):,} conversations with {answers:,} answer tokens, "
            f"{len(self.examples.held_out):,} held out"
            + (f"; {dropped:,} left out, whose answers begin after max_length" if dropped else "")
        )

    def inputs(self) -> dict[str, Any]:
        """See `Recipe.inputs`."""
        return {
            "sources": [asdict(source) for source in self.examples.sources],
            "encoder_sha256": self.encoder.sha256,
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
        }

    def rows(self, step: int) -> list[tuple[int, int, int]]:
        """Number in the run, epoch and example of each row of a step."""
        n, size = len(self.examples.train), self.config.batch_size
        numbers = range(step * size, (step + 1) * size)
        return [(g, g // n, int(_order(self.config.seed, g // n, n)[g % n])) for g in numbers]

    def validation_examples(self) -> Iterable[Example]:
        """Held-out conversations of a validation: evenly spread ones, always the same."""
        held_out, limit = self.examples.held_out, self.config.validation_chats
        chosen = np.linspace(0, len(held_out) - 1, min(limit, len(held_out))).astype(np.int64)
        return [held_out[n] for n in chosen]

    def save(self, module: nn.Module, directory: Path) -> None:
        """See `Recipe.save`; the chat template goes into the tokenizer, where a decoder finds it."""
        save_encoder(self.encoder, module, self.template, directory)


def unigram_chances(ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.float64]:
    """P(token) [vocab] by counts, with one half added to each: the yardstick in the final report."""
    counts = np.bincount(ids, minlength=vocab_size) + 0.5
    return np.asarray(counts / counts.sum(), np.float64)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return permutation(seed, "chats:order", epoch, n)
