"""A store in an object store is the one that a directory would hold, byte for byte."""

import os

import pytest
import torch

from capture import leases, open_store, run_capture
from capture.checked_files import verify_files
from capture.remote import ObjectStore
from mdlm_interp.errors import OutputExistsError, StoreError, WriteError
from tests.capture.remote.service import DROPPED, Answer
from tests.capture.remote.stores import OVERLOADED, contents, filled


def test_a_capture_gives_the_same_bytes_as_into_a_directory(local, remote):
    assert remote.complete
    expected, found = contents(local.place), contents(remote.place)
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path] != found[path]] == []


def test_an_interrupted_capture_goes_on_to_the_same_bytes(wanted, local, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("capture.run.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_capture(wanted)
    store = open_store(wanted.out, endpoint=wanted.endpoint)
    assert not store.complete
    assert len(store) == 504
    assert torch.equal(store.times(), local.times())
    assert not any(name.endswith(".lock") for name in store.place.names())
    assert run_capture(wanted).complete
    assert contents(store.place) == contents(local.place)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(OVERLOADED, id="overloaded", marks=pytest.mark.slow),
        pytest.param(DROPPED, id="answers get lost"),
    ],
)
def test_a_capture_passes_through_a_service_that_stumbles(wanted, local, through, monkeypatch, wrong):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    requests = 0

    def fault(method: str, path: str) -> Answer | None:
        nonlocal requests
        requests += 1
        # Not the first of all, which is to find a wrong address soon.
        return wrong if requests % 17 == 0 else None

    through.fault = fault
    found = run_capture(wanted)
    assert requests > 17
    assert contents(found.place) == contents(local.place)


def test_a_service_that_goes_away_leaves_what_was_committed(wanted, local, through, monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    rule = rf"^{wanted.out} cannot be written: the service is overloaded \(SlowDown\); run this again later$"
    through.fault = lambda method, path: (
        OVERLOADED if method == "PUT" and path.endswith("hook_in/c.1.0") else None
    )
    with monkeypatch.context() as patched:
        patched.setattr("capture.remote_connection.PATIENCE_S", 0.2)
        with pytest.raises(WriteError, match=rule):
            run_capture(wanted)
    through.fault = lambda method, path: None
    store = open_store(wanted.out, endpoint=wanted.endpoint)
    assert len(store) == 256
    verify_files(store)
    assert contents(run_capture(wanted).place) == contents(local.place)


def test_something_else_under_the_prefix_is_left_alone(wanted):
    place = ObjectStore(wanted.out, endpoint=wanted.endpoint)
    place.replace("notes.txt", b"mine")
    with pytest.raises(
        OutputExistsError, match=rf"^{wanted.out} exists and is no activation store; choose another"
    ):
        run_capture(wanted)
    assert contents(place) == {"notes.txt": b"mine"}


def test_a_second_writer_is_refused_and_changes_nothing(wanted):
    place = ObjectStore(wanted.out, endpoint=wanted.endpoint)
    with place.lock("rank-0"):
        filled(place)
        place.remove("rank-0.lock")  # as the end of a capture does with what is temporary
        before = contents(place)
        rule = rf"^{wanted.out} is being written by process {os.getpid()} on "
        second = ObjectStore(wanted.out, endpoint=wanted.endpoint)
        with pytest.raises(StoreError, match=rule), second.lock("rank-0"):
            pass
        assert contents(place) == before
