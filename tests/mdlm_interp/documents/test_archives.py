"""The original OpenWebText's archives: which members are documents, how they are cleaned, and what is refused."""

from __future__ import annotations

import io
import lzma
import os
import tarfile

import pytest


@pytest.fixture
def pack():
    """A tar of (TarInfo or name, content)."""

    def pack(*members, pax: bool = False) -> bytes:
        stream = io.BytesIO()
        kind = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
        with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
            for member, content in members:
                info = tarfile.TarInfo(member) if isinstance(member, str) else member
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    return pack


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_document_is_cleaned_as_the_hub_loader_does(pack, write, texts):
    """Exact: runs of blank lines become one, outer white space goes, carriage returns stay."""
    content = " \n\none\n\n\n\n\ntwo\n\nthree\r\n\r\n\r\nfour\nfive \n"
    expected = "one\n\ntwo\n\nthree\r\n\r\n\r\nfour\nfive"
    assert texts(write("a.tar", pack(("a.txt", content.encode())))) == [expected]
    # Nothing separates documents in a member, neither a blank line nor a marker.
    assert texts(write("a.tar", pack(("a.txt", b"one\n\ntwo<|endoftext|>three")))) == [
        "one\n\ntwo<|endoftext|>three"
    ]


def test_links_devices_directories_and_other_files_are_passed_over(pack, write, texts, tmp_path):
    """Exact, at both depths; a link to a document does not repeat it."""
    secret = write("secret.txt", "not in the archive")
    odd = [
        (special("folder", tarfile.DIRTYPE), b""),
        (special("folder.txt", tarfile.DIRTYPE), b""),
        (special("link.txt", tarfile.SYMTYPE, str(secret)), b""),
        (special("hard.txt", tarfile.LNKTYPE, "one.txt"), b""),
        (special("hard-outside.txt", tarfile.LNKTYPE, str(secret)), b""),
        (special("pipe.txt", tarfile.FIFOTYPE), b""),
        (special("disk.txt", tarfile.BLKTYPE), b""),
        (special("null.txt", tarfile.CHRTYPE), b""),
        ("README", b"about"),
        ("._one.tx", b"\xff\xfe"),
    ]
    inner = lzma.compress(pack(("one.txt", b"one"), *odd, ("TWO.TXT", b"two")))
    content = pack(*odd, ("subset.xz", inner), ("empty.txt", b""), ("three.txt", b"three"))
    assert texts(write("a.tar", content)) == ["one", "two", "", "three"]


@pytest.mark.parametrize("name", ["../../outside.txt", "/outside.txt", "a/../../b.txt", "x" * 300 + ".txt"])
@pytest.mark.parametrize("pax", [False, True])
def test_nothing_is_written_wherever_a_member_wants_to_go(
    pack, write, texts, tmp_path, monkeypatch, name, pax
):
    monkeypatch.chdir(tmp_path)
    path = write("down/a.tar", pack((name, b"one"), pax=pax))
    before = sorted(tmp_path.rglob("*"))
    assert texts(path) == ["one"]
    assert sorted(tmp_path.rglob("*")) == before
    assert not os.path.exists("/outside.txt")


def test_members_are_documents_in_the_order_of_the_archive(pack, write, texts):
    members = [(f"{n}.txt", f"text {n}".encode()) for n in (3, 1, 2)]
    assert texts(write("a.tar", pack(*members))) == ["text 3", "text 1", "text 2"]


def test_many_members_are_not_remembered(pack, write, texts, monkeypatch):
    """Behavioural: tarfile's own list would hold one entry for each of OpenWebText's eight million documents."""
    kept = []
    original = tarfile.TarFile.next

    def counted(archive):
        kept.append(len(archive.members))
        return original(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    path = write("a.tar", pack(*((f"{n}.txt", b"text") for n in range(50))))
    assert len(texts(path)) == 50
    assert max(kept) <= 1


def test_a_member_that_is_no_utf8_is_named(pack, write, refusal):
    inner = lzma.compress(pack(("one.txt", b"one"), ("two.txt", b"caf\xe9 noir")))
    expected = (
        "is not UTF-8 (byte 3: invalid continuation byte); convert or remove it, or copy or download it again"
    )
    assert (
        refusal(write("a.tar", pack(("set.xz", inner)))) == f", member 'set.xz', member 'two.txt' {expected}"
    )
    assert refusal(write("a.xz", inner)) == f", member 'two.txt' {expected}"


def test_damage_inside_names_the_member(pack, write, refusal):
    inner = lzma.compress(pack(("one.txt", b"one")))
    cut = pack(("good.xz", inner), ("cut.xz", inner[:-1]))
    assert refusal(write("a.tar", cut)) == (
        ", member 'cut.xz' is cut off before its end mark; copy or download it again"
    )
    other = pack(("other.xz", b"no xz at all"))
    assert refusal(write("a.tar", other)) == (
        ", member 'other.xz' is damaged (Input format not supported by decoder); copy or download it again"
    )
    no_tar = pack(("other.xz", lzma.compress(b"no tar" * 200)))
    assert refusal(write("a.tar", no_tar)) == (
        ", member 'other.xz' is damaged (invalid header); copy or download it again"
    )


def test_a_damaged_header_does_not_end_the_archive_early(pack, write, refusal):
    """Exact: tarfile alone would stop there without a word."""
    content = bytearray(pack(("one.txt", b"one"), ("two.txt", b"two"), ("three.txt", b"three")))
    content[1024 + 3] ^= 1  # in the second header
    assert refusal(write("a.tar", bytes(content))) == " is damaged (bad checksum); copy or download it again"


def test_archives_after_one_another_are_refused(pack, write, refusal):
    """Exact: the second would be passed over."""
    content = pack(("one.txt", b"one")) + pack(("two.txt", b"two"))
    expected = " goes on after its end mark; are these several archives in one file? Split them"
    assert refusal(write("a.tar", content)) == expected
    assert refusal(write("a.tar.xz", lzma.compress(content))) == expected


def test_an_archive_three_deep_is_refused(pack, write, refusal):
    inner = lzma.compress(pack(("one.txt", b"one")))
    middle = lzma.compress(pack(("inner.xz", inner)))
    assert refusal(write("a.tar", pack(("middle.xz", middle)))) == (
        ", member 'middle.xz', member 'inner.xz' is an archive in an archive in an archive; unpack the outer one"
    )
