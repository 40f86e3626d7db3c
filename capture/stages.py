"""Work beside the main thread: a stage takes jobs in order, holds few of them, and passes errors back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class EndedError(Exception):
    """The stage takes no more jobs."""


class Stage(Generic[Job]):
    """A thread that works jobs off one after another.

    Args:
        work: Called with each job, in order.
        depth: Jobs that may wait; `put` blocks while there are as many.
    """

    def __init__(self, work: Callable[[Job], None], *, depth: int, name: str) -> None:
        self._work, self._depth = work, depth
        self._jobs: deque[Job] = deque()
        """Those that wait."""
        self._error: BaseException | None = None
        self._ending = False
        """Whether no more jobs are taken."""
        self._ended = False
        """Whether the thread will touch nothing any more."""
        self._changed = threading.Condition()
        """Guards all of these, and tells of their changes."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Hand a job over; never blocks on a stage that has ended.

        Raises:
            BaseException: What an earlier job raised; jobs after it are not worked.
            EndedError: If the stage was closed or abandoned.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._jobs) < self._depth or self._error or self._ending)
            self._raise()
            if self._ending:
                raise EndedError
            self._jobs.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until every job is worked off; raises what one of them raised.

        If the wait is interrupted, this is `abandon`: no thread works on when the caller has given up.
        """
        try:
            self._end()
        except BaseException:
            self.abandon()
            raise
        self._raise()

    def abandon(self) -> None:
        """Drop the jobs that wait, and end; may be called again, and after `close`."""
        self._fail(EndedError())
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            # Not by `Thread.join`: one that a signal interrupts takes the thread for ended (CPython 3.11).
            self._changed.wait_for(lambda: self._ended)
        self._thread.join()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._jobs.clear()
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ending)
            job = self._jobs.popleft() if self._jobs else None
            self._ended = job is None
            self._changed.notify_all()
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._work(job)
            except BaseException as error:  # noqa: BLE001  # whoever feeds the stage raises it
                self._fail(error)
