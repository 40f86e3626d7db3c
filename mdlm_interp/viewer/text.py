"""Tokens as text that shows every character and obeys none.

A model can predict any bytes: an escape sequence that clears the terminal, a mark that turns the rest of the line
around. What is shown keeps its letters, and such characters become visible signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

# C0 and C1 controls but the newline; line and paragraph separators; marks and overrides of direction.
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_CONTROL_PICTURES = 0x2400
"""Where Unicode's pictures of the C0 controls begin."""


@runtime_checkable
class Decoder(Protocol):
    """What a viewer needs of a tokenizer."""

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""

    def token(self, token_id: int) -> str:
        """One token as text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of several."""


def visible(text: str) -> str:
    r"""The text with control characters and marks of direction as signs; newlines stay.

    >>> visible("a\x1b[2Jb\u202ec")
    'a␛[2Jb<U+202E>c'
    """
    return _UNSEEN.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(_CONTROL_PICTURES + code) if code < 0x20 else "\u2421" if code == 0x7F else f"<U+{code:04X}>"
