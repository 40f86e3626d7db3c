"""Tokens as text that shows every character and obeys none."""

from __future__ import annotations

import unicodedata

from mdlm_interp.viewer.text import visible


def test_no_character_is_left_that_does_something():
    """Every character of the first 64Ki code points, halves of surrogate pairs apart."""
    everything = "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    shown = visible(everything)
    rulers = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    left = {
        character
        for character in shown
        if (unicodedata.category(character) in {"Cc", "Zl", "Zp"} and character != "\n")
        or unicodedata.bidirectional(character) in rulers
    }
    assert left == set()
    assert visible(shown) == shown


def test_other_text_is_left_alone():
    text = 'a b\nc <b>&amp;"é日本語👍🏽 שלום'
    assert visible(text) == text
    assert visible("\x00\x1b[31m\x7f\x9b\u2028\u200f") == "␀␛[31m␡<U+009B><U+2028><U+200F>"
