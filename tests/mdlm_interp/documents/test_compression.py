"""Compressed files: several streams in one, what may stand between and after them, and names that are wrong."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

import pyarrow as pa
import pytest

from mdlm_interp.documents import compression

HELLO = b"hello\n\n"
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
"""A zstandard frame without content, as pzstd writes."""


def zst(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zst, "xz": lzma.compress}


@pytest.mark.parametrize("kind", COMPRESS)
def test_streams_after_one_another_are_one_text(write, texts, kind):
    compress = COMPRESS[kind]
    assert texts(write(f"a.txt.{kind}", compress(b"one, ") + compress(b"two") + compress(b""))) == [
        "one, two"
    ]


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_second_stream_that_is_cut_or_damaged_is_refused_at_every_place(write, refusal, kind):
    """Exact: `lzma.open` passes over one whose header is damaged, zstandard's reader over any that is cut."""
    first, second = COMPRESS[kind](HELLO), COMPRESS[kind](b"world")
    for cut in range(1, len(second)):
        assert refusal(write(f"a.txt.{kind}", first + second[:cut])).endswith("; copy or download it again")
    damaged = bytes([second[0] ^ 0x40]) + second[1:]
    assert " is damaged (" in refusal(write(f"a.txt.{kind}", first + damaged))


@pytest.mark.parametrize("kind", COMPRESS)
def test_what_is_no_stream_after_one_is_refused(write, refusal, kind):
    assert " is damaged (" in refusal(write(f"a.txt.{kind}", COMPRESS[kind](HELLO) + b"something else"))


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_zeros_after_a_stream_are_padding(write, texts, kind):
    content = COMPRESS[kind](HELLO) + bytes(512) + COMPRESS[kind](b"world") + bytes(512)
    assert texts(write(f"a.txt.{kind}", content)) == ["hello", "world"]


def test_xz_padding_and_streams_may_fall_on_any_boundary_of_a_read(write, texts, monkeypatch):
    content = lzma.compress(b"one\n\n") + bytes(8) + lzma.compress(b"two") + bytes(4)
    path = write("a.txt.xz", content)
    for piece in range(1, 80):
        monkeypatch.setattr(compression, "PIECE", piece)
        assert texts(path) == ["one", "two"]


def test_a_zstandard_file_may_begin_with_a_frame_without_content(write, texts):
    assert texts(write("a.txt.zst", SKIPPABLE + zst(b"one"))) == ["one"]


def test_a_checksum_that_does_not_fit_is_refused(write, refusal):
    whole = bytearray(gzip.compress(HELLO * 100, mtime=0))
    whole[-4] ^= 1  # the length
    assert refusal(write("a.txt.gz", bytes(whole))) == (
        " is damaged (Incorrect length of data produced); copy or download it again"
    )
    whole[-4] ^= 1
    whole[-8] ^= 1  # the CRC
    assert refusal(write("a.txt.gz", bytes(whole))).startswith(" is damaged (CRC check failed 0x")


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_byte_that_is_no_utf8_is_named_by_its_place_in_the_uncompressed_text(write, refusal, kind):
    content = "é ".encode() * 200_000 + b"\xff" + "é".encode()
    assert refusal(write(f"a.txt.{kind}", COMPRESS[kind](content))) == (
        " is not UTF-8 (uncompressed byte 600000: invalid start byte); convert it first"
    )


def test_a_mark_at_the_start_of_a_text_is_no_part_of_it(write, texts):
    assert texts(write("a.txt", "\ufeffone")) == ["one"]
    assert texts(write("a.jsonl", '\ufeff{"text": "one"}')) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", gzip.compress(HELLO, mtime=0), " holds gzip data, not plain text; rename it to a.txt.gz"),
        ("a.jsonl", zst(HELLO), " holds zstandard data, not plain text; rename it to a.jsonl.zst"),
        ("a.TXT", lzma.compress(HELLO), " holds xz data, not plain text; rename it to a.TXT.xz"),
        ("a.txt", b"PAR1....PAR1", " holds a parquet file, not plain text; rename it to a.parquet"),
        ("a.txt", b"PK\x03\x04....", " holds a zip archive, not plain text; unpack it"),
        (
            "a.jsonl.gz",
            b'{"text": "one"}',
            " is named as gzip data and starts with b'{\"text\":', which is not; rename it to its kind",
        ),
        (
            "a.txt.zst",
            gzip.compress(HELLO, mtime=0),
            " is named as zstandard data and starts with b'\\x1f\\x8b\\x08\\x00\\x00\\x00\\x00\\x00', "
            "which is not; rename it to its kind",
        ),
        (
            "a.parquet",
            b"id,text\n1,one\n",
            " is named as a parquet file and starts with b'id,text\\n', which is not; rename it to its kind",
        ),
        (
            "a.xz",
            b"one",
            " is named as xz data and starts with b'one', which is not; rename it to its kind",
        ),
    ],
)
def test_a_name_that_does_not_fit_the_first_bytes_is_refused(write, refusal, name, content, expected):
    assert refusal(write(name, content)) == expected
