"""A directory and an object store keep the same promises."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from obstore.store import MemoryStore

from capture.manifest import MANIFEST
from capture.places import Directory, Place
from capture.remote import PART_BYTES, ObjectStore
from tests.capture.remote.stores import contents, filled


@pytest.fixture(params=["directory", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Opens the same empty place, as often as it is called."""
    if request.param == "directory":
        return lambda: Directory(tmp_path / "run.zarr")
    if request.param == "memory":
        store = MemoryStore()
        return lambda: ObjectStore(store, name="s3://bucket/run")
    url, service = request.getfixturevalue("url"), request.getfixturevalue("service")
    return lambda: ObjectStore(url, endpoint=service)


def published(place: Place, files: dict[str, list[bytes]]) -> None:
    drafts = []
    for path, pieces in files.items():
        draft = place.draft(path)
        for piece in pieces:
            draft.write([piece, np.frombuffer(piece, np.uint8)])
        drafts.append(draft)
    place.publish(drafts)


def test_files_are_there_once_published_and_not_before(place):
    one = place()
    filled(one)
    draft = one.draft("acts/x/c.0")
    draft.write([b"abc"])
    assert one.read("acts/x/c.0") is None
    draft.write([b"def"])
    one.publish([draft])
    published(one, {"acts/x/c.1": [b"gh", b"i"], "acts/y/c.0": [b""]})
    other = place()
    assert {path: data for path, data in contents(other).items() if path.startswith("acts")} == {
        "acts/x/c.0": b"abcdef",
        "acts/x/c.1": b"ghghii",
        "acts/y/c.0": b"",
    }
    assert other.names("acts/x") == ["c.0", "c.1"]
    assert other.names("acts") == []
    assert other.names() == [MANIFEST, "zarr.json"]


def test_a_file_is_replaced_whole(place):
    one = place()
    filled(one)
    for content in (b"longer content", b"", b"1"):
        one.replace("done", content)
        assert place().read("done") == content


def test_what_is_removed_takes_its_files_along_and_no_neighbours(place):
    one = place()
    filled(one)
    published(one, {name: [b"x"] for name in ("seqs/t/c.0", "seqs/c.0", "seqs2/c.0", "seqs.json")})
    one.remove("seqs")
    one.remove("seqs.json")
    one.remove("was/never/there")
    assert one.files() == [MANIFEST, "seqs2/c.0", "zarr.json"]


def test_a_place_exists_once_something_is_there(place):
    assert not place().exists()
    filled(place())
    assert place().exists()
    assert place().files() == [MANIFEST, "zarr.json"]


def test_of_two_who_create_one_wins_whole(place):
    one, other = place(), place()
    with one.create("rank-0") as first, other.create("rank-1") as second:
        for number, made in enumerate((first, second)):
            zarr.create_group(made.zarr_store(), attributes={"number": number})
            made.replace(f"manifest.rank-{number}-of-2.json", b"{}")
    # The inner context ends first.
    assert place().files() == ["manifest.rank-1-of-2.json", "zarr.json"]
    assert dict(zarr.open_group(place().zarr_store(), mode="r").attrs) == {"number": 1}


def test_a_failed_creation_leaves_nothing(place):
    def fail() -> None:
        with place().create("rank-0") as made:
            zarr.create_group(made.zarr_store())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not place().exists()
    assert place().files() == []


def test_large_files_arrive_whole(place):
    one = place()
    filled(one)
    pieces = [bytes([number]) * (PART_BYTES // 3) for number in range(4)]
    published(one, {"acts/x/c.0": pieces})
    assert place().read("acts/x/c.0") == b"".join(2 * piece for piece in pieces)
