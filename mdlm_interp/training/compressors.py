"""How far a general-purpose compressor gets with the training text: a yardstick to set a loss beside.

bits / N * ln 2, with the compressed size in bits and N tokens, is the compressor's code length in nats a token.
It is an estimate of how predictable the text is and no bound: not on the model, which may be better (and is,
where it knows the language) or worse, nor on the text's entropy. It depends on the compressor and, as a
compressor starts from nothing, falls with the length of the text.
"""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mdlm_interp.tokenizers import Tokenizer

Compressor = Literal["lzma", "bz2", "zlib"]

COMPRESS: dict[Compressor, Callable[[bytes], bytes]] = {
    # Without a container: its header and checksum are no part of the code.
    "lzma": lambda text: lzma.compress(
        text, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    ),
    "bz2": lambda text: bz2.compress(text, 9),
    "zlib": lambda text: zlib.compress(text, 9),
}
"""Each at its highest setting."""

MOST_TOKENS = 2_000_000
"""Tokens that are compressed, from the start of the text: some eight megabytes, which take lzma ten seconds."""


@dataclass(frozen=True)
class CodeLength:
    """What a compressor made of a text."""

    compressor: Compressor
    n_tokens: int
    n_bytes: int
    """Bytes of UTF-8, <|endoftext|> between documents included."""
    compressed_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Compressed bits a token, in nats."""
        return 8 * self.compressed_bytes / self.n_tokens * math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Compressed bits a byte of text."""
        return 8 * self.compressed_bytes / self.n_bytes

    def __str__(self) -> str:
        return (
            f"ideal-loss estimate: {self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte "
            f"({self.compressor} on {self.n_tokens:,} training tokens; a code length, not a bound)"
        )


def code_length(stream: NDArray[np.uint16], tokenizer: Tokenizer, compressor: Compressor) -> CodeLength:
    """Compress the text of a stream's first MOST_TOKENS tokens [pos]."""
    ids = stream[:MOST_TOKENS].tolist()
    text = tokenizer.decode(ids).encode()
    return CodeLength(compressor, len(ids), len(text), len(COMPRESS[compressor](text)))
