"""What an object store does besides: nobody undoes another's commit, and stumbles are got over."""

import json
import subprocess
import sys
import time

import pytest
import zarr

from capture import leases
from capture.manifest import MANIFEST
from capture.remote import ObjectStore
from mdlm_interp.errors import StoreError, WriteError
from tests.capture.remote.service import DROPPED, Answer
from tests.capture.remote.stores import OVERLOADED, filled


def gone(place: ObjectStore, lock: str) -> None:
    """Make a lock look like one of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    content = json.loads(place.read(lock) or b"")
    place.replace(lock, json.dumps({**content, "owner": "another", "pid": process.pid}).encode())


def test_a_creation_that_was_killed_is_made_anew(url, service, monkeypatch):
    def killed(self: ObjectStore, made: ObjectStore, path: str) -> None:
        if path == "zarr.json":
            raise SystemExit
        copy(self, made, path)

    copy = ObjectStore._copy
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "_copy", killed)
        patched.setattr(ObjectStore, "_delete", lambda self, path: None)
        patched.setattr(leases.Lease, "release", lambda self: self._stop.set())
        with pytest.raises(SystemExit):
            filled(ObjectStore(url, endpoint=service))
    place = ObjectStore(url, endpoint=service)
    assert place.files() == ["create.lock", MANIFEST]
    assert not place.exists()
    gone(place, "create.lock")
    with place.create("rank-0") as made:
        zarr.create_group(made.zarr_store(), attributes={"a": 2})
        made.replace("manifest.rank-0-of-2.json", b"{}")
    assert place.files() == ["manifest.rank-0-of-2.json", "zarr.json"]


def test_a_lock_of_a_creation_that_ended_puts_no_store_at_risk(url, service, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(leases.Lease, "release", lambda self: self._stop.set())
        filled(ObjectStore(url, endpoint=service))
    place = ObjectStore(url, endpoint=service)
    place.replace(MANIFEST, b"committed")
    assert place.exists()
    gone(place, "create.lock")
    filled(place)
    assert place.files() == [MANIFEST, "zarr.json"]
    assert place.read(MANIFEST) == b"committed"


def test_a_creator_that_is_overtaken_leaves_the_store_of_the_other(url, service, monkeypatch):
    def overtaken(self: ObjectStore, made: ObjectStore, path: str) -> None:
        if path == "zarr.json":
            monkeypatch.setattr(ObjectStore, "_copy", copy)
            gone(self, "create.lock")
            with other.create("rank-1") as theirs:
                zarr.create_group(theirs.zarr_store(), attributes={"a": 2})
                theirs.replace(MANIFEST, b"theirs")
            other.replace(MANIFEST, b"committed")
        copy(self, made, path)

    copy = ObjectStore._copy
    one, other = (ObjectStore(url, endpoint=service) for _ in range(2))
    monkeypatch.setattr(ObjectStore, "_copy", overtaken)
    with pytest.raises(
        StoreError, match=r"zarr\.json was changed by another process, which took this store over"
    ):
        filled(one)
    assert other.files() == [MANIFEST, "zarr.json"]
    assert other.read(MANIFEST) == b"committed"
    assert dict(zarr.open_group(other.zarr_store(), mode="r").attrs) == {"a": 2}


def test_a_failed_put_of_a_creation_leaves_nothing(url, through):
    place = ObjectStore(url, endpoint=through.endpoint)
    denied = Answer(403, "<Error><Code>AccessDenied</Code></Error>")
    through.fault = lambda method, path: (
        denied if method == "PUT" and path.endswith("where.zarr/zarr.json") else None
    )
    with pytest.raises(WriteError, match="access is denied"):
        filled(place)
    assert any(done.method == "PUT" and done.path.endswith(MANIFEST) for done in through.exchanges)
    assert place.files() == []


def test_who_was_overtaken_cannot_undo_a_commit(url, service):
    one, other = (ObjectStore(url, endpoint=service) for _ in range(2))
    filled(one)
    assert one.read(MANIFEST) == b"{}"
    other.read(MANIFEST)
    other.replace(MANIFEST, b"next")
    other.replace(MANIFEST, b"after")
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            one.replace(MANIFEST, b"stale")
        assert str(caught.value) == (
            f"{one.name}/{MANIFEST} was changed by another process, which took this store over; what that one "
            f"commits stays"
        )
    assert other.read(MANIFEST) == b"after"


@pytest.mark.parametrize("what", ["its answer is lost", "its answer comes late", "the service is overloaded"])
def test_a_commit_is_tried_again(url, through, monkeypatch, what):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    monkeypatch.setattr("capture.remote_connection.REQUEST_S", 0.5 if "late" in what else 60.0)
    place = ObjectStore(url, endpoint=through.endpoint)
    filled(place)
    place.read(MANIFEST)
    seen: list[str] = []

    def fault(method: str, path: str) -> Answer | None:
        if method not in ("PUT", "POST"):
            return None
        seen.append(path)
        if len(seen) % 2 == 0:
            return None
        if "late" in what:
            time.sleep(0.7)
        return OVERLOADED if "overloaded" in what else DROPPED

    through.fault = fault
    place.replace(MANIFEST, b"next")
    place.replace(MANIFEST, b"after")
    place.remove("zarr.json")
    assert len(seen) == 6
    through.fault = lambda method, path: None
    assert place.read(MANIFEST) == b"after"


def test_a_prefix_may_hold_spaces_and_letters_of_any_kind_and_none_is_needed(service, url):
    bucket = url.split("/")[2]
    for number, where in enumerate((f"s3://{bucket}/a b/é+=&(1)", f"s3://{bucket}/")):
        place = ObjectStore(where, endpoint=service)
        place.replace("deep/file", bytes([number]))
        assert ObjectStore(where, endpoint=service).read("deep/file") == bytes([number])
    assert ObjectStore(f"s3://{bucket}", endpoint=service).names("deep") == ["file"]


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_the_endpoint_may_come_from_the_environment_and_the_option_wins(url, service, monkeypatch, variable):
    monkeypatch.setenv(variable, service)
    ObjectStore(url).replace("x", b"1")
    assert ObjectStore(url).read("x") == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert ObjectStore(url, endpoint=service).read("x") == b"1"
