"""Forward passes that run side by side, each on its share of the threads, with results in the batches' order.

Two passes on half of the threads each do more than one after the other on all of them: within a pass the threads wait
for each other at the end of every operation, and a thread that writes rows beside them makes each of those waits
longer, while two passes never wait for one another.

The bits of native activations depend on how many threads one pass has, which is why a store records that number, and
on nothing else here: not on what runs beside it, nor on the order in which passes end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Barrier, Event
from typing import TypeAlias

import torch
from torch import Tensor

from capture.forward import Forward
from capture.plan import Batch
from capture.row_pool import RowPool

Lent: TypeAlias = "tuple[Mapping[str, Tensor], Callable[[], None]]"
"""Activations by hook, and what to call when nobody needs their memory any more."""

AHEAD = 1
"""Batches that may be computed or wait beyond those that are under way."""


@dataclass(frozen=True)
class Shares:
    """How the threads of this process are shared out."""

    passes: int
    """Forward passes side by side."""
    threads: int
    """Of each."""

    @classmethod
    def of(cls, passes: int | None, *, alone: bool) -> Shares:
        """The shares of torch's threads.

        Args:
            passes: As many as were asked for; none takes two where each has a thread.
            alone: Whether a pass uses more than its own threads (an accelerator's, the oracle's, a sampler's
                between the passes), so that none takes one.
        """
        threads = torch.get_num_threads()
        if passes is None:
            passes = 1 if alone or threads < 2 else 2
        return cls(passes, max(1, threads // passes))


class Passes:
    """A context in which batches go through a model, several at a time.

    Args:
        forward: Runs in the caller's thread if it is the only one.
    """

    def __init__(self, forward: Forward, shares: Shares) -> None:
        self._shares = shares
        self._pool = RowPool(forward.shapes)
        self._idle: SimpleQueue[Forward] = SimpleQueue()
        for _ in range(shares.passes - 1):
            self._idle.put(forward.twin())
        self._idle.put(forward)
        self._threads: ThreadPoolExecutor | None = None
        self._stopping = Event()

    def __enter__(self) -> Passes:
        if self._shares.passes > 1:
            before = torch.get_num_threads()
            self._threads = ThreadPoolExecutor(self._shares.passes, "capture-forward")
            begun = Barrier(self._shares.passes)
            waiting = []
            try:
                for _ in range(self._shares.passes):
                    waiting.append(self._threads.submit(_begin, self._shares.threads, begun))
                for future in waiting:
                    future.result()
            except BaseException:
                begun.abort()
                self._threads.shutdown()
                raise
            finally:
                # What a thread sets for itself is also what every later thread of the process begins with.
                torch.set_num_threads(before)
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            # A pass may take minutes, and who interrupts a capture should not wait for it.
            self._stopping.set()
            self._threads.shutdown(cancel_futures=True)

    def run(self, jobs: Iterable[tuple[Batch, bool | None]]) -> Iterator[tuple[Batch, Lent | None]]:
        """Each batch in order with its activations.

        Args:
            jobs: Batches, and whether to compare the sums of the residual stream; none leaves the batch out.
        """
        begun: deque[tuple[Batch, Future[Lent] | None]] = deque()
        for batch, check in jobs:
            if self._threads is None:
                yield batch, None if check is None else self._one(batch, check)
                continue
            begun.append((batch, None if check is None else self._threads.submit(self._one, batch, check)))
            if len(begun) > self._shares.passes + AHEAD:
                yield _ended(*begun.popleft())
        while begun:
            yield _ended(*begun.popleft())

    def _one(self, batch: Batch, check: bool) -> Lent:
        acts, release = self._pool.take(batch.stop - batch.start, batch.most_rows)
        forward = self._idle.get_nowait()  # there are as many as threads
        try:
            forward(batch, check=check, out=acts, stopping=self._stopping.is_set)
        finally:
            self._idle.put(forward)
        return acts, release


def _begin(threads: int, begun: Barrier) -> None:
    torch.get_num_threads()  # a thread's first question gives it the process's number, also one set before
    torch.set_num_threads(threads)
    begun.wait()  # so that none of them takes the job of another, and all have begun


def _ended(batch: Batch, future: Future[Lent] | None) -> tuple[Batch, Lent | None]:
    return batch, None if future is None else future.result()
