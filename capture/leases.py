"""Locks in an object store, where nothing ends with the process that holds it.

1. A lock is an object that says who holds it. It is put on condition that there is none (If-None-Match), so
   only one process gets it, and it is removed at the end.
2. The holder puts it again every `RENEW_S` on condition that it is still its own (If-Match). A holder that
   could not do so for `LEASE_S` may no longer write, and says so.
3. What a killed process leaves behind is taken over, again on condition that it did not change: at once if
   the process is known to be gone, which another on the same machine can tell; otherwise once it was not
   renewed for `LEASE_S`, by the clocks of this machine and of the service.

Clocks that disagree can make two processes believe that they hold a lock. No commit is lost then: see
`ObjectStore.replace`, which is conditional too, so that the one that was overtaken stops at its next commit.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

from mdlm_interp.errors import StoreError

LEASE_S = 120.0
"""Seconds without renewal after which a lock may be taken over."""
RENEW_S = 20.0
"""Seconds between renewals."""
POLL_S = 0.5
"""Seconds between two looks at a lock that is waited for."""

TRIES = 2
"""Times that a put is tried; obstore tries again by itself, but only what may be done twice unseen."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as its object says."""

    owner: str
    """Another one for each taking of a lock."""
    machine: str
    processes: str
    """What numbers of processes refer to on that machine."""
    pid: int
    since: str
    version: Mapping[str, Any]
    """Of the object."""
    age_s: float
    """Since it was last put."""

    def is_gone(self) -> bool:
        """Whether this can only be what a dead process left behind."""
        if self.age_s > LEASE_S:
            return True
        if (self.machine, self.processes) != (platform.node(), _processes()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class Lease:
    """One lock object, held or not.

    Args:
        store: An obstore.
        path: The object's path there.
        name: What messages call what it guards.
    """

    def __init__(self, store: Any, path: str, name: str) -> None:
        self._store, self._path, self._name = store, path, name
        self._owner = uuid.uuid4().hex
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._version: Mapping[str, Any] = {}
        self._confirmed = 0.0
        """When the lock was last known to be held, by the monotonic clock."""
        self._lost = False
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.overtaken = False
        """Whether the lock was taken from one that is gone."""

    def acquire(self, *, wait: bool, errors: Callable[[], Any]) -> None:
        """Take the lock.

        Args:
            wait: Until another one gives it back, rather than not at all.
            errors: Gives a context manager that turns the store's errors into ours.
        Raises:
            StoreError: If another one holds it, and we do not wait.
        """
        told = False
        while True:
            with errors():
                if self._put("create"):
                    self.overtaken = False
                    break
                asked = time.monotonic()
                holder = self._holder()
                if holder is None:
                    continue
                if holder.owner == self._owner:  # our own put, whose answer was lost
                    self._version, self._confirmed = holder.version, asked
                    break
                if holder.is_gone():
                    self.overtaken = True
                    if self._put(holder.version):
                        log.warning(
                            "%s: going on after process %d on %s", self._name, holder.pid, holder.machine
                        )
                        break
                    continue
            if not wait:
                raise StoreError(
                    f"{self._name} is being written by process {holder.pid} on {holder.machine} since {holder.since}, "
                    f"last heard of {holder.age_s:.0f} s ago; wait for it, or stop it first; if it was killed, this "
                    f"works in {max(1.0, LEASE_S - holder.age_s):.0f} s, or once {self._path} is removed"
                )
            if not told:
                log.info("%s: waiting for process %d on %s", self._name, holder.pid, holder.machine)
                told = True
            time.sleep(POLL_S)
        self._thread = threading.Thread(target=self._renew_often, name="capture-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if it is still held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            holder = self._holder()
            if holder is not None and holder.owner == self._owner:
                insist(lambda: obstore.delete(self._store, self._path))
        except (BaseError, OSError) as error:
            # The work is done, or failed for a reason that matters more; the lock ends by itself.
            log.warning(
                "%s/%s stays for %.0f s: %s", self._name, self._path, LEASE_S, str(error).partition("\n")[0]
            )

    def check(self) -> None:
        """Raise StoreError unless the lock is held for certain."""
        if not self._lost and time.monotonic() - self._confirmed > LEASE_S:
            self._renew()
        if self._lost or time.monotonic() - self._confirmed > LEASE_S:
            raise StoreError(
                f"{self._name} was taken over by another process, because this one did not reach it for "
                f"{LEASE_S:.0f} s; what was committed stays"
            )

    def _renew_often(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._renew()

    def _renew(self) -> None:
        with self._mutex:
            try:
                if self._put(self._version):
                    return
                # Not renewed by another one, but by us, if the answer to that was lost.
                holder = self._holder()
                self._lost = holder is None or holder.owner != self._owner
                if holder is not None and not self._lost:
                    self._version = holder.version
            except (BaseError, OSError) as error:
                log.warning("%s: a lock could not be renewed: %s", self._name, str(error).partition("\n")[0])

    def _put(self, mode: Any) -> bool:
        """Put the object, unless its condition does not hold."""
        before = time.monotonic()
        # The time makes every version of the object another one.
        content = {
            "owner": self._owner,
            "machine": platform.node(),
            "processes": _processes(),
            "pid": os.getpid(),
            "since": self._since,
            "renewed": datetime.now(UTC).isoformat(),
        }
        try:
            data = json.dumps(content).encode()
            result = insist(lambda: obstore.put(self._store, self._path, data, mode=mode))
        except (AlreadyExistsError, PreconditionError):
            return False
        self._version, self._confirmed = version_of(result), before
        return True

    def _holder(self) -> Holder | None:
        return holder_of(self._store, self._path)


def insist(request: Callable[[], Result]) -> Result:
    """Make a request again if it fails for no reason that would last; its answer may have been lost."""
    for _ in range(TRIES - 1):
        try:
            return request()
        except (GenericError, FileNotFoundError) as error:
            log.warning("trying again: %s", str(error).partition("\n")[0])
            time.sleep(POLL_S)
    return request()


def holder_of(store: Any, path: str) -> Holder | None:
    """Who holds a lock; None if nobody does."""
    try:
        result = obstore.get(store, path)
        content = bytes(result.bytes())
    except FileNotFoundError:
        return None
    try:
        found = dict(json.loads(content))
        pid = int(found["pid"])
    except (ValueError, TypeError, KeyError):
        found, pid = {}, 0
    meta = result.meta
    age = datetime.now(UTC) - meta["last_modified"]
    return Holder(
        owner=str(found.get("owner", "")),
        machine=str(found.get("machine", "an unknown machine")),
        processes=str(found.get("processes", "")),
        pid=pid,
        since=str(found.get("since", "an unknown time")),
        version=version_of(meta),
        age_s=max(0.0, age.total_seconds()),
    )


def version_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Which version of an object this is, for a put on condition that it is still that."""
    return {name: result[name] for name in ("e_tag", "version") if result[name] is not None}


def _processes() -> str:
    """Containers may share a machine's name, and number their processes each for itself."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
