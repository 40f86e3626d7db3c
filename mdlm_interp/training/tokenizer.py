"""Training a byte-level BPE tokenizer: <|endoftext|>, other special tokens, 256 bytes, merges, and [MASK] last.

The `tokenizers` library trains and encodes; `bpe` has what special tokens need beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mdlm_interp.config_args import parse_args
from mdlm_interp.documents import read_texts
from mdlm_interp.errors import DataError, OutputExistsError
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer
from mdlm_interp.training.bpe import (
    SpecialTokenizer,
    check_special_tokens,
    without_specials,
)
from mdlm_interp.training.config import TokenizerConfig

TOKENIZER = "tokenizer.json"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> SpecialTokenizer:
    """Learn merges from texts; lossless on any UTF-8 because every byte is a token.

    Args:
        special_tokens: Texts that are one token each in `encode_with_specials`, and part of no other token.
    Raises:
        ConfigError: If a special token cannot be one.
        DataError: If the texts are too small for that many merges.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    check_special_tokens(special_tokens, alphabet)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(without_specials(texts, special_tokens), trainer)
    tokenizer = SpecialTokenizer(backend)
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"the text yields only {tokenizer.vocab_size} of {vocab_size} ids; "
            f"give more text or lower vocab_size"
        )
    return tokenizer


def refuse_existing(directory: Path) -> None:
    """Raise OutputExistsError if the directory has a tokenizer."""
    if (directory / TOKENIZER).exists():
        raise OutputExistsError(
            f"{directory / TOKENIZER} exists; choose another directory or remove it first"
        )


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, never over another."""
    refuse_existing(directory)
    tokenizer.save(directory)


def main(argv: list[str]) -> int:
    """`mdlm-interp train-tokenizer FILES... --out DIR`."""
    config = parse_args(
        TokenizerConfig, argv, prog="mdlm-interp train-tokenizer", positional=("files",), config_file=True
    )
    refuse_existing(config.out)
    tokenizer = train_tokenizer(read_texts(config.files), config.vocab_size, config.special_tokens)
    save_tokenizer(tokenizer, config.out)
    sys.stdout.write(f"{config.out / TOKENIZER}: {tokenizer.vocab_size} ids\n")
    return 0
