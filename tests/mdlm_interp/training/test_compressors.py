"""The compressor's code length of the training text."""

from __future__ import annotations

import lzma
import math
import random

import numpy as np
import pytest

from mdlm_interp.training import compressors
from mdlm_interp.training.compressors import code_length


@pytest.mark.parametrize("compressor", ["lzma", "bz2", "zlib"])
def test_random_letters_cost_what_information_theory_says(compressor, tokenizer):
    """Bounded: eight letters are three bits each, which no code is below; four bits need no compressor."""
    text = "".join(random.Random(0).choices("abcdefgh", k=40_000))
    ids = np.array(tokenizer.encode(text), np.uint16)
    found = code_length(ids, tokenizer, compressor)
    assert (found.n_bytes, found.n_tokens) == (40_000, len(ids))
    assert 3.0 <= found.bits_per_byte < 4.0
    ideal = 40_000 * 3 * math.log(2) / len(ids)
    assert found.nats_per_token == pytest.approx(ideal * found.bits_per_byte / 3.0)


def test_the_text_that_is_compressed_is_that_of_the_stream(streams, tokenizer, texts):
    found = code_length(streams.train, tokenizer, "lzma")
    text = tokenizer.decode(streams.train.tolist()).encode()
    n_documents = int((streams.train == tokenizer.eos_id).sum())
    assert found.n_bytes == len(text) == streams.train_bytes + n_documents * len("<|endoftext|>")
    # A container adds a header and a checksum; otherwise it is the same code.
    assert 0 < len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) - found.compressed_bytes < 100
    assert found.nats_per_token == 8 * found.compressed_bytes * math.log(2) / len(streams.train)
    assert found.nats_per_token < math.log(300)


def test_long_text_is_cut_and_what_was_compressed_is_said(streams, tokenizer, monkeypatch):
    monkeypatch.setattr(compressors, "MOST_TOKENS", 100)
    found = code_length(streams.train, tokenizer, "zlib")
    assert found.n_tokens == 100
    assert "zlib on 100 training tokens; a code length, not a bound" in str(found)
    assert f"ideal-loss estimate: {found.nats_per_token:.4f} nats/token" in str(found)
