"""From files to the sequences that a perplexity is of: form of the text, end-of-texts, blocks."""

# Axes: sequence, pos

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdlm_interp.documents import read_documents, token_blocks
from mdlm_interp.documents.blocks import GROUP_DOCUMENTS
from mdlm_interp.documents.reading import Document
from mdlm_interp.errors import DataError
from mdlm_interp.evaluation.detokenise import TextForm, detokenised
from mdlm_interp.shapes import Int64
from mdlm_interp.tokenizers import Tokenizer


def text_sequences(
    file: Path,
    tokenizer: Tokenizer,
    length: int,
    *,
    wrap: bool = True,
    insert_eos: bool = True,
    form: TextForm = "raw",
    max_sequences: int | None = None,
) -> Int64[Tensor, "sequence pos"]:
    """Token blocks of one file, or of what a glob or directory means.

    Args:
        wrap: Put an end-of-text around each block, as upstream does.
        insert_eos: Put an end-of-text after each document; without it, and without wrap, blocks are what the paper's
            zero-shot figures are of (upstream's own loader always inserts it).
        form: How the corpus is tokenised, to be undone.
    Raises:
        DataError: If the text is shorter than one block, or cannot be read.
    """
    documents = _in_form(read_documents([file], tokenizer), form)
    if insert_eos:
        blocks: Iterable[NDArray[np.int64]] = (
            block.ids for block in token_blocks(documents, tokenizer, length, wrap=wrap)
        )
    else:
        blocks = joined_blocks(documents, tokenizer, length, wrap=wrap)
    rows = list(islice(blocks, max_sequences))
    if not rows:
        raise DataError(
            f"{file} is shorter than one sequence of {length} tokens; lower length or leave it out"
        )
    return torch.from_numpy(np.stack(rows))


def joined_blocks(
    documents: Iterator[Document], tokenizer: Tokenizer, length: int, *, wrap: bool
) -> Iterator[NDArray[np.int64]]:
    """Equal blocks of documents with nothing between them, cut within the groups that `token_blocks` cuts within."""
    inner = length - 2 if wrap else length
    while group := list(islice(documents, GROUP_DOCUMENTS)):
        flat = np.concatenate([_coded(document, tokenizer) for document in group])
        for start in range(0, len(flat) - inner + 1, inner):
            block = flat[start : start + inner]
            yield np.concatenate([[tokenizer.eos_id], block, [tokenizer.eos_id]]) if wrap else block


def _coded(document: Document, tokenizer: Tokenizer) -> NDArray[np.int64]:
    ids: Sequence[int] | NDArray[np.uint16] = (
        tokenizer.encode(document.text) if document.ids is None else document.ids
    )
    return np.asarray(ids, np.int64)


def _in_form(documents: Iterator[Document], form: TextForm) -> Iterator[Document]:
    for document in documents:
        if form == "raw":
            yield document
            continue
        if document.ids is not None:
            raise DataError(
                f"a file of token ids has no text to bring into another form than raw, got {form!r}; name the text"
            )
        yield replace(document, text=detokenised(document.text, form))
