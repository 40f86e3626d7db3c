"""Special tokens of a byte-level BPE tokenizer: kept out of the merges in training, kept whole in encoding.

The `tokenizers` library trains and encodes (by replaying its merges; every byte is a token, so any text comes back).
What it leaves open is here:
- its trainer counts the letters of a special token that stands in a text, and spends merges on its spelling;
- a special token spelled with the letters that stand for bytes would be decoded as those bytes, and one letter of
  them is a byte's own token, so that plain text could hold a control token. Such are refused.

`Tokenizer.encode` takes all text literally; `encode_with_specials` gives special tokens their meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdlm_interp.errors import CheckpointError, ConfigError
from mdlm_interp.tokenizers import END_OF_TEXT, MASK, Tokenizer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"


def check_special_tokens(special_tokens: Sequence[str], alphabet: Iterable[str]) -> None:
    """Raise ConfigError unless they are different, not empty, and none reads as bytes or is one of the package's own.

    Args:
        alphabet: The characters that stand for bytes.
    """
    known = set(alphabet)
    for number, token in enumerate(special_tokens):
        if not token or token.isspace():
            raise ConfigError(f"a special token must have visible characters, got {token!r}")
        if token in (END_OF_TEXT, MASK):
            raise ConfigError(f"{token} is a special token already; leave it out of special_tokens")
        if token in known:
            raise ConfigError(
                f"the special token {token!r} is how a byte is spelled, so every text with it would hold a control "
                f"token; take a longer one, as <|{token}|>"
            )
        if not token.isascii() and known.issuperset(token):
            raise ConfigError(
                f"the special token {token!r} would be decoded as other text, since each of its letters also stands "
                f"for a byte; spell it in ASCII"
            )
        if token in special_tokens[:number]:
            raise ConfigError(f"the special token {token!r} is given twice; leave one out")


def without_specials(texts: Iterable[str], special_tokens: Sequence[str]) -> Iterator[str]:
    """The texts between special tokens, <|endoftext|> among them: what merges are learned from."""
    pattern = _pattern([END_OF_TEXT, *special_tokens])
    for text in texts:
        yield from filter(None, pattern.split(text))


class SpecialTokenizer(Tokenizer):
    """A tokenizer that can also give special tokens in a text their meaning."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend)
        added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {
            token.content: number for number, token in sorted(added.items()) if token.special
        }
        """Ids of all special tokens: <|endoftext|>, those it was trained with, and [MASK]."""
        self._split = re.compile(f"({_pattern(list(self.special_tokens)).pattern})")

    @classmethod
    def from_directory(cls, directory: Path) -> SpecialTokenizer:
        """Read the tokenizer.json of `mdlm-interp train-tokenizer`.

        Raises:
            CheckpointError: If it is not there, damaged or another kind's.
        """
        import tokenizers

        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no {TOKENIZER_FILE}; make one with mdlm-interp train-tokenizer"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  (what the library raises for a damaged file)
            raise CheckpointError(f"the tokenizer in {directory} is damaged: {error}") from None
        return cls(backend)

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of a text in which each special token is one id; of two that begin together the longer one counts.

        Raises:
            DataError: As `encode`.
        """
        ids: list[int] = []
        for piece in self._split.split(text):
            special = self.special_tokens.get(piece)
            ids += self.encode(piece) if special is None else [special]
        return ids


def _pattern(special_tokens: Sequence[str]) -> re.Pattern[str]:
    # The longest first: an alternation takes the first that fits.
    return re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
