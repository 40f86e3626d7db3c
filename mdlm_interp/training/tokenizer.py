"""Training a byte-level BPE tokenizer: 256 bytes, merges, <|endoftext|> first and [MASK] last."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from mdlm_interp.config_args import parse_args
from mdlm_interp.documents import read_texts
from mdlm_interp.errors import DataError, OutputExistsError
from mdlm_interp.tokenizers import END_OF_TEXT, Tokenizer
from mdlm_interp.training.config import TokenizerConfig

TOKENIZER = "tokenizer.json"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from texts; lossless on any UTF-8 because every byte is a token.

    Raises:
        DataError: If the texts are too small for that many merges.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend)
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
    tokenizer = train_tokenizer(read_texts(config.files), config.vocab_size)
    save_tokenizer(tokenizer, config.out)
    sys.stdout.write(f"{config.out / TOKENIZER}: {tokenizer.vocab_size} ids\n")
    return 0
