"""Work beside the main thread: a stage takes jobs in order, holds few of them, and passes errors back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Stage(Generic[Job]):
    """A thread that works jobs off one after another.

    Args:
        work: Called with each job, in order.
        depth: Jobs that may wait; `put` blocks while there are as many.
    """

    def __init__(self, work: Callable[[Job], None], *, depth: int, name: str) -> None:
        self._work = work
        self._jobs: queue.Queue[Job | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Hand a job over.

        Raises:
            BaseException: What an earlier job raised; jobs after it are not worked.
        """
        self._raise()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until every job is worked off; raises what one of them raised."""
        self._jobs.put(None)
        self._thread.join()
        self._raise()

    def abandon(self) -> None:
        """Drop the jobs that wait, and end."""
        self._error = self._error or _AbandonedError()
        self._jobs.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            # After an error the queue is still emptied, so that nobody blocks on it.
            if self._error is None:
                try:
                    self._work(job)
                except BaseException as error:  # noqa: BLE001  # whoever feeds the stage raises it
                    self._error = error


class _AbandonedError(Exception):
    """Jobs were dropped on request."""
