"""Byte-level BPE tokenizers whose last id is the mask token.

Text is always taken literally: "<|endoftext|>" inside a document is encoded as those characters. Only
`encode_with_masks` gives "[MASK]" a meaning, and there the mask stands for a word with its leading space.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

from mdlm_interp.atomic_files import replacing
from mdlm_interp.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
MASK = "[MASK]"

GPT2 = "openai-community/gpt2"
"""The repository of the tokenizer that published MDLMs were trained with."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Encode and decode text; ids are below `vocab_size` and the mask is the last one."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise CheckpointError(
                f"the tokenizer has no {END_OF_TEXT} token; is it GPT-2's or one made by this package?"
            )
        if backend.token_to_id(MASK) is None:
            backend.add_special_tokens([MASK])
        if backend.token_to_id(MASK) != backend.get_vocab_size() - 1:
            raise CheckpointError(f"{MASK} must be the tokenizer's last id, got {backend.token_to_id(MASK)}")
        self.eos_id: int = end_of_text
        """Id of <|endoftext|>, which separates documents."""
        # Special tokens written out in a document are text, not control.
        backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """Number of ids, the mask included."""
        return self._backend.get_vocab_size()

    @property
    def mask_id(self) -> int:
        """Id of the mask token: always the last."""
        return self.vocab_size - 1

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's whole definition."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    @cached_property
    def _byte_lengths(self) -> list[int]:
        # A byte-level token is spelled with one character a byte.
        lengths = [len(self._backend.id_to_token(i) or "") for i in range(self.vocab_size)]
        lengths[self.eos_id] = lengths[self.mask_id] = 0
        return lengths

    def encode(self, text: str) -> list[int]:
        """Ids of a text taken literally.

        Raises:
            DataError: If the text holds half a surrogate pair, as one does that was read from other bytes
                than UTF-8.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except TypeError:
            _check_unicode([text])
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts; faster than one at a time."""
        try:
            coded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:
            _check_unicode(texts)
            raise
        return [list(one.ids) for one in coded]

    def encode_with_masks(self, text: str) -> list[int]:
        """Ids of a text in which each "[MASK]" is the mask token; one space before it belongs to the mask."""
        ids: list[int] = []
        pieces = text.split(MASK)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            ids += self.encode(piece if last else piece.removesuffix(" "))
            if not last:
                ids.append(self.mask_id)
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of ids; the mask reads " [MASK]", bytes that are no UTF-8 become U+FFFD."""
        parts: list[str] = []
        for is_mask, run in groupby(self._checked(ids), key=self.mask_id.__eq__):
            tokens = list(run)
            if is_mask:
                parts += [" " + MASK] * len(tokens)
            else:
                parts.append(self._backend.decode(tokens, skip_special_tokens=False))
        return "".join(parts)

    def _checked(self, ids: Iterable[SupportsIndex]) -> Iterator[int]:
        size = self.vocab_size
        for token in map(index, ids):
            if not 0 <= token < size:
                raise DataError(f"token ids must be in [0, {size}), got {token}; another model's ids?")
            yield token

    def token(self, token_id: int) -> str:
        """One token as readable text."""
        return MASK if token_id == self.mask_id else self.decode([token_id])

    def count_bytes(self, ids: Iterable[SupportsIndex]) -> int:
        """Bytes of UTF-8 that the ids stand for; <|endoftext|> and the mask count zero."""
        return sum(self._byte_lengths[token] for token in self._checked(ids))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json."""
        with replacing(Path(directory) / "tokenizer.json") as partial:
            # Not the library's own `save`, which takes no path that is not UTF-8.
            partial.write_text(self._backend.to_str(pretty=True), encoding="utf-8")


def _check_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        found = _SURROGATE.search(text)
        if found is not None:
            raise DataError(
                f"the text is not Unicode: its character {found.start()} is {found[0]!r}, which stands for a "
                f"byte that was not UTF-8 or for half a character; convert the text to UTF-8 first"
            )


def load_tokenizer(source: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model source, or of a directory with tokenizer.json or vocab.json + merges.txt.

    A published MDLM carries no tokenizer files: it uses GPT-2's, so the tokenizer of a hub repository
    without one is the repository "gpt2".

    Raises:
        CheckpointError: If the directory holds no tokenizer or a damaged one.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from mdlm_interp.checkpoints import resolve_source

    directory = resolve_source(source, revision)
    try:
        if (directory / "tokenizer.json").is_file():
            return Tokenizer(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
            backend = tokenizers.Tokenizer(model)
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            backend.add_special_tokens([END_OF_TEXT])
            return Tokenizer(backend)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001  (what the tokenizers library raises for a damaged file)
        raise CheckpointError(f"the tokenizer in {directory} is damaged: {error}") from None
    if Path(source).is_dir() or source in ("bundled", GPT2):
        raise CheckpointError(
            f"{directory} has no tokenizer.json (nor vocab.json with merges.txt); "
            f"name the tokenizer's directory as well, GPT-2's for the published checkpoint"
        )
    return load_tokenizer(GPT2)
