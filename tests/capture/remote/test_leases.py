"""A lock in an object store has one holder, outlives no dead one for long, and is noticed when it is lost."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from capture import leases
from capture.remote import ObjectStore
from mdlm_interp.errors import StoreError
from tests.capture.remote.service import DROPPED, Answer

PATH = "rank-0.lock"


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def place(store: MemoryStore) -> ObjectStore:
    return ObjectStore(store, name="s3://bucket/run")


def left_behind(store: MemoryStore, **changes: object) -> None:
    """The lock of a process that is gone, on this machine."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    content = {
        "owner": "another",
        "machine": platform.node(),
        "processes": leases._processes(),
        "pid": process.pid,
        "since": "2026-01-01T00:00:00+00:00",
    }
    obstore.put(store, PATH, json.dumps({**content, **changes}).encode())


def held(store: MemoryStore) -> bool:
    return PATH in place(store).names()


def test_a_second_holder_is_refused_and_told_who_holds_it(store):
    with place(store).lock("rank-0"):
        with (
            pytest.raises(StoreError) as caught,
            place(store).lock("rank-0"),
        ):
            pass
        assert held(store)
    message = str(caught.value)
    assert message.startswith(
        f"s3://bucket/run is being written by process {os.getpid()} on {platform.node()} since 20"
    )
    assert message.endswith(
        "s ago; wait for it, or stop it first; if it was killed, this works in 120 s, or once rank-0.lock is removed"
    )
    assert not held(store)


def test_locks_of_other_names_are_independent(store):
    with place(store).lock("rank-0"), place(store).lock("rank-1"):
        assert place(store).names() == ["rank-0.lock", "rank-1.lock"]


def test_a_lock_is_given_back_on_an_error(store):
    with pytest.raises(KeyError), place(store).lock("rank-0"):
        raise KeyError
    assert not held(store)


def test_one_who_waits_gets_the_lock_when_it_is_given_back(store, monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    order = []

    def second() -> None:
        with place(store).lock("rank-0", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with place(store).lock("rank-0"):
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert not held(store)


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(store):
    left_behind(store)
    with place(store).lock("rank-0"):
        assert json.loads(place(store).read(PATH) or b"")["pid"] == os.getpid()
    assert not held(store)


@pytest.mark.parametrize(
    "changes",
    [{"machine": "node17"}, {"processes": "pid:[1]"}, {"pid": os.getpid()}],
    ids=["machine", "kind", "pid"],
)
def test_of_any_other_process_it_is_taken_over_when_it_was_not_renewed_for_long(store, monkeypatch, changes):
    left_behind(store, **changes)
    with pytest.raises(StoreError, match="is being written by process"), place(store).lock("rank-0"):
        pass
    monkeypatch.setattr(leases, "LEASE_S", 0.3)
    time.sleep(0.31)
    with place(store).lock("rank-0"):
        pass


def test_a_lock_that_is_no_record_is_taken_over_when_it_is_old(store, monkeypatch):
    obstore.put(store, PATH, b"[1]")
    with pytest.raises(StoreError, match="by process 0 on an unknown machine"), place(store).lock("rank-0"):
        pass
    monkeypatch.setattr(leases, "LEASE_S", 0.0)
    with place(store).lock("rank-0"):
        pass


def test_what_another_took_over_meanwhile_is_not_taken_from_it(store, monkeypatch):
    left_behind(store)
    holder, looked = leases.Lease._holder, 0
    with ExitStack() as stack:

        def late(self: leases.Lease) -> leases.Holder | None:
            nonlocal looked
            looked += 1
            found = holder(self)
            if looked == 1:
                stack.enter_context(place(store).lock("rank-0"))
            return found

        monkeypatch.setattr(leases.Lease, "_holder", late)
        with pytest.raises(StoreError, match=f"by process {os.getpid()} on"), place(store).lock("rank-0"):
            pass
        assert held(store)


def test_of_many_who_would_take_over_one_at_a_time_does(store, monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.001)
    left_behind(store)
    inside, most, done = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, done
        with place(store).lock("rank-0", wait=True):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1
            done += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, done) == (1, 8)


def test_a_lock_that_is_renewed_is_not_taken_over(store, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 0.4)
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    with place(store).lock("rank-0"):
        for _ in range(10):
            time.sleep(0.1)
            with pytest.raises(StoreError, match="is being written"), place(store).lock("rank-0"):
                pass


def test_a_holder_that_was_overtaken_writes_nothing_more_and_leaves_the_lock(store, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.02)
    first = place(store)
    with first.lock("rank-0"):
        left_behind(store)
        time.sleep(0.3)
        for write in (
            lambda: first.replace("manifest.json", b"{}"),
            lambda: first.publish([first.draft("acts/x/c.0")]),
            lambda: first.remove("acts"),
        ):
            with pytest.raises(
                StoreError, match=r"^s3://bucket/run was taken over by another process, because"
            ):
                write()
    assert place(store).names() == [PATH]


def test_a_holder_that_cannot_renew_stops_when_its_lease_ends_and_not_before(store, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_S", 0.5)
    monkeypatch.setattr(leases, "RENEW_S", 0.05)
    monkeypatch.setattr(leases, "POLL_S", 0.0)
    away = False
    put = obstore.put

    def unreachable(store: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if away and path == PATH:
            raise GenericError("no route to host")
        return put(store, path, *arguments, **options)

    monkeypatch.setattr(obstore, "put", unreachable)
    first = place(store)
    with first.lock("rank-0"):
        away = True
        time.sleep(0.1)
        first.replace("manifest.json", b"1")
        time.sleep(0.6)
        with pytest.raises(StoreError, match="was taken over"):
            first.replace("manifest.json", b"2")
        away = False
        # Nobody took it over: the next renewal holds.
        first.replace("manifest.json", b"3")
    assert first.read("manifest.json") == b"3"


def test_a_lock_whose_answer_was_lost_is_held(url, through, monkeypatch):
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    lost: list[str] = []

    def fault(method: str, path: str) -> Answer | None:
        if method == "PUT" and not lost:
            lost.append(path)
            return DROPPED
        return None

    one = ObjectStore(url, endpoint=through.endpoint)
    through.fault = fault
    with one.lock("rank-0"):
        assert lost
        assert one.names() == [PATH]
        one.replace("manifest.json", b"{}")
    assert one.names() == ["manifest.json"]
