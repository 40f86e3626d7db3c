"""An iterator that runs ahead of its consumer in a thread of its own."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def prefetched(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """The same items in the same order, with up to `depth` of them made before they are asked for.

    What making an item raises is raised where it would have come. The thread starts at the first item and
    ends with the last one, or as soon as this iterator is closed or dropped and the item in the making is
    done; also when the program ends. It does not survive a fork: start after forking, or set
    TOKENIZERS_PARALLELISM=false as the tokenizers library asks of those who fork.
    """
    room = threading.Semaphore(depth)
    ready: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    stopped = threading.Event()
    process = os.getpid()

    def make() -> None:
        iterator = iter(items)
        try:
            # Room is waited for before an item is made, so that no more than `depth` wait or are in the making.
            while room.acquire() and not stopped.is_set():
                try:
                    item = next(iterator)
                except StopIteration:
                    ready.put((False, None))
                    return
                ready.put((True, item))
                del item
        except BaseException as error:  # noqa: BLE001  (raised again in the consumer's thread)
            ready.put((False, error))

    thread = threading.Thread(target=make, name="prefetched", daemon=True)

    def stop() -> None:
        stopped.set()
        room.release()
        if thread is not threading.current_thread():  # the garbage collector may run in any
            thread.join()

    thread.start()
    # A daemon thread that outlives the interpreter may crash it inside the tokenizers library.
    atexit.register(stop)
    try:
        while True:
            if os.getpid() != process:
                raise RuntimeError("a prefetched iterator does not survive a fork; start it afterwards")
            more, item = ready.get()
            if not more:
                if item is None:
                    return
                try:
                    raise item
                finally:
                    del item  # an error that refers to this frame and the frame to it would keep both
            room.release()
            yield item
            del item
    finally:
        atexit.unregister(stop)
        if os.getpid() == process:
            stop()
